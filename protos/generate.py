"""Generates the Python modules from the .proto files, or with --check says whether they are what it would generate."""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def generate(out: Path) -> None:
    """Write the modules below `out`/protos. Raises SystemExit with the compiler's code."""
    import grpc_tools
    from grpc_tools import protoc

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(f"protos/{path.name}" for path in HERE.glob("*.proto"))
    code = protoc.main(
        ["protoc", f"-I{HERE.parent}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}", *sources]
    )
    if code:
        raise SystemExit(code)


def main() -> int:
    """The command."""
    if "--check" not in sys.argv[1:]:
        generate(HERE.parent)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        made = sorted((Path(folder) / "protos").iterdir())
        stale = [path.name for path in made if (HERE / path.name).read_bytes() != path.read_bytes()]
    if stale:
        sys.stderr.write(f"protos/{', '.join(stale)}: stale, run `make protos`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
