"""The document: what stands between its markers is replaced, all else is its author's.

<!-- bench:NAME -->
...
<!-- /bench:NAME -->
"""

import datetime
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bench.figures.figure import Outcome, markdown


class NoMarkers(Exception):
    """The document has no place for a section."""


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    packages = ("uvloop", "grpcio", "protobuf", "numpy")
    return {
        "processor": names[0].strip() if names else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in packages),
        "pointsman": version("pointsman"),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def write(path: Path, outcomes: Sequence[Outcome], about: dict[str, str], seconds: float, rounds: int) -> None:
    """Put the sections in their places. Raises NoMarkers."""
    text = path.read_text()
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    facts = "\n".join(f"| {name} | {value} |" for name, value in about.items())
    text = _replaced(text, "machine", f"| | |\n|---|---|\n{facts}", path)
    for outcome in outcomes:
        name = outcome.section.name
        command = f"`pointsman bench {name} --seconds {seconds:g} --rounds {rounds}`, {today}, {outcome.seconds:.0f} s."
        text = _replaced(text, name, f"{command}\n\n{markdown(outcome)}", path)
    path.write_text(text)


def _replaced(text: str, name: str, content: str, path: Path) -> str:
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise NoMarkers(f"{path} has no place for it: put {start} and {end} on lines of their own")
    return f"{before}{start}\n\n{content}\n\n{end}{after}"
