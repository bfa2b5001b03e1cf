"""Compiles the hot path with mypyc, where there is a C compiler; everything else of the package is in pyproject.toml.

What is compiled is the very source that is read, typed, tested and debugged: a compiled module lies beside its source
and is imported in its stead. Where nothing can be compiled, or `POINTSMAN_COMPILE=0` forbids it, all works the same at
more CPU per request; `python -m bench.interpreted` runs anything that way.

mypyc: https://mypyc.readthedocs.io
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

GROUPS = {
    "state._tables": """
        state/ledger state/pods state/prefix_log state/series
    """,
    "router._decision": """
        router/attention router/backlog router/cache_turnover router/fleet router/prefix_hash router/prefix_index
        router/prefix_match router/prefixes router/rates router/scheduler router/strategies/base
        router/strategies/delays router/strategies/least_request router/strategies/marginal_delay
        router/strategies/prefix_aware router/strategies/random_choice router/strategies/weighted
    """,
    "router._exchange": """
        router/access_log router/bodies/base router/bodies/by_path router/bodies/chat router/bodies/completions
        router/bodies/text router/exchange router/log_wire router/modes router/policy router/replies router/request
        router/request_ids router/request_phase router/response router/usage router/wire
    """,
    "workers.h2._engine": """
        workers/calls workers/h2/call_handler workers/h2/connection workers/h2/control workers/h2/faults
        workers/h2/frames workers/h2/hpack_decoder workers/h2/inbound workers/h2/limits workers/h2/messages
        workers/h2/outbound workers/h2/protocol workers/h2/requests workers/h2/responses workers/h2/stream
    """,
}
"""What is compiled, by the library it goes into: within a library calls are cheapest, and libraries compile side by
side."""
MYPY = ("--config-file=", "--ignore-missing-imports", "--python-version=3.11", "--hide-error-context")


def can_compile() -> bool:
    """Whether there are a C compiler and Python's headers."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n")
        command = [*compiler, "-fPIC", f"-I{sysconfig.get_path('include')}", "-c", source.name]
        try:
            return subprocess.run(command, cwd=folder, capture_output=True, timeout=60).returncode == 0
        except OSError:
            return False


def extensions() -> list[Extension]:
    if os.environ.get("POINTSMAN_COMPILE", "1") == "0":
        return []
    if not can_compile():
        sys.stderr.write("pointsman: no C compiler or no Python.h, so the hot path stays interpreted\n")
        return []
    from mypyc.build import mypycify

    groups = [([f"{module}.py" for module in modules.split()], name) for name, modules in GROUPS.items()]
    paths = [path for group, _ in groups for path in group]
    return mypycify([*MYPY, *paths], opt_level="1", debug_level="0", separate=groups)


modules = extensions()
names = [f"{name}.py" for group in GROUPS.values() for name in group.split()] if modules else []
digests = {name: sha256(Path(name).read_bytes()).hexdigest() for name in names}
setup(ext_modules=modules, options={"build_ext": {"parallel": os.cpu_count()}})
if digests and "--inplace" in sys.argv:
    made = {name.removesuffix(".py") for name in names} | {f"{group.replace('.', '/')}__mypyc" for group in GROUPS}
    for package in ("router", "state", "workers"):
        for library in Path(package).rglob("*.so"):
            if str(library).split(".")[0] not in made:
                library.unlink()  # of a module that used to be compiled: it would be imported in its source's stead
    # What was compiled, so that `workers.compiled` can tell when a source was changed since.
    Path("build/compiled.json").write_text(json.dumps(digests, indent=1))
