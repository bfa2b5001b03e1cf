"""Compiled modules are what their sources say, or somebody is told."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from bench.interpreted import ROOT
from workers import compiled


def ask(*command: str) -> str:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True, text=True).stdout


def test_a_source_that_changed_after_it_was_compiled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_ROOT", tmp_path)
    assert compiled.outdated() == []  # nothing was compiled here
    (tmp_path / "build").mkdir()
    sources = {name: f"# {name}\n".encode() for name in ("one.py", "two.py")}
    for name, content in sources.items():
        (tmp_path / name).write_bytes(content)
    digests = {name: sha256(content).hexdigest() for name, content in sources.items()}
    (tmp_path / "build" / "compiled.json").write_text(json.dumps(digests))
    (tmp_path / "one.py").touch()
    assert compiled.outdated() == []
    (tmp_path / "two.py").write_text("# something else\n")
    assert compiled.outdated() == ["two.py"]
    (tmp_path / "one.py").unlink()
    assert compiled.outdated() == ["one.py", "two.py"]


def test_everything_can_be_run_from_source() -> None:
    """Also the modules that other modules of the project import."""
    show = "import router.wire, state.ledger, workers.h2.connection as c; print(router.wire.__file__, c.__file__)"
    program = f"from bench.interpreted import interpret; interpret(); {show}"
    assert ask("-c", program).split() == [str(ROOT / "router/wire.py"), str(ROOT / "workers/h2/connection.py")]


def test_a_module_that_is_run_from_source_gets_its_arguments() -> None:
    assert ask("-m", "bench.interpreted", "json.tool", "--help").startswith("usage: ")
    with pytest.raises(subprocess.CalledProcessError):
        ask("-m", "bench.interpreted")
