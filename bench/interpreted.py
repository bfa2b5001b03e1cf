"""Run a module with nothing of this project compiled: `python -m bench.interpreted MODULE [ARGUMENTS]`.

For what has to see the source at work: counting instructions, fuzzing by coverage, tests of what runs where there is no
C compiler. Processes that the module starts are not affected.
"""

import runpy
import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("router", "state", "workers")


def interpret() -> None:
    """From now on modules of this project are imported from their source. Those imported before stay as they are."""

    def finder(path: str) -> FileFinder:
        folder = Path(path)
        if not folder.is_relative_to(ROOT) or folder.relative_to(ROOT).parts[:1] not in [(name,) for name in PACKAGES]:
            raise ImportError(f"not ours: {path}")
        return FileFinder(path, (SourceFileLoader, SOURCE_SUFFIXES))

    sys.path_hooks.insert(0, finder)
    sys.path_importer_cache.clear()


def main() -> None:
    """The command."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m bench.interpreted MODULE [ARGUMENTS]")
    interpret()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
