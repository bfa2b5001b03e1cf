"""h2spec, the conformance suite for HTTP/2 servers, against a real listening server."""

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest

from bench.h2_server import METHODS
from workers.h2.server import H2Server

ROOT = Path(__file__).parents[3]
INSTALL = "go install github.com/summerwind/h2spec/cmd/h2spec@latest"


async def h2spec_binary() -> str:
    """bin/h2spec or one on the PATH; built with Go where that is available."""
    found = shutil.which("h2spec", path=f"{ROOT / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    if found:
        return found
    if not shutil.which("go"):
        pytest.skip(f"neither bin/h2spec nor Go to build it with (GOBIN={ROOT / 'bin'} {INSTALL})")
    environment = dict(os.environ, GOBIN=str(ROOT / "bin"))
    build = await asyncio.create_subprocess_shell(INSTALL, env=environment, stderr=asyncio.subprocess.PIPE)
    _, errors = await build.communicate()
    if build.returncode:
        pytest.skip(f"h2spec could not be built: {errors.decode()[-200:]}")
    return str(ROOT / "bin" / "h2spec")


@pytest.mark.parametrize("section", ["generic", "http2", "hpack"])
async def test_every_case_of_h2spec_passes(section: str) -> None:
    binary = await h2spec_binary()
    server = H2Server(METHODS)
    await server.listen("127.0.0.1:0")
    port = server.addresses[0].rpartition(":")[2]
    try:
        run = await asyncio.create_subprocess_exec(
            *(binary, section, "-h", "127.0.0.1", "-p", port, "-o", "3"), stdout=asyncio.subprocess.PIPE
        )
        report, _ = await asyncio.wait_for(run.communicate(), 60)
    finally:
        await server.stop(0)
    print(report.decode(), file=sys.stderr)
    summary = report.decode().strip().splitlines()[-1]
    assert run.returncode == 0
    assert "0 skipped, 0 failed" in summary
