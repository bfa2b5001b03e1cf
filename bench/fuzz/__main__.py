"""`python -m bench.fuzz [--runs N] [--corpus FOLDER]`: every fuzz target in turn, so many executions each."""

import argparse
import subprocess
import sys
from pathlib import Path

TARGETS = ("h2_engine", "exchange")


def main() -> int:
    """The command. Returns the code of the first target that found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--corpus", type=Path, default=Path("results/fuzz"))
    chosen = parser.parse_args()
    for target in TARGETS:
        folder = chosen.corpus / target
        folder.mkdir(parents=True, exist_ok=True)
        # Interpreted, since atheris sees no coverage of compiled code.
        module = f"bench.fuzz.{target}"
        command = [sys.executable, "-m", "bench.interpreted", module, f"-runs={chosen.runs}", str(folder)]
        print(" ".join(command), flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
