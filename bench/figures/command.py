"""`pointsman bench`: measures what the project promises, on this machine, and says so with numbers.

    pointsman bench                                    what there is
    pointsman bench streams --seconds 6                one section
    pointsman bench all --write docs/benchmarks.md     every figure, into the document, with its picture

Each section starts what it needs and ends it. Figures stand beside our bar and beside what other routers need.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.figures import document, plot
from bench.figures.figure import Outcome, Section, table
from bench.figures.rig import BenchError, Missing, Rig
from bench.figures.sections import SECTIONS
from bench.lab import LabError

_FAILED, _MISSED = 1, 3
_DOCUMENT = click.Path(dir_okay=False, path_type=Path)


def measure(section: Section, seconds: float, rounds: int, console: Console) -> Outcome:
    """Run one section. What is missing on this machine, and what failed, is part of the outcome."""
    outcome, began = Outcome(section), time.monotonic()
    with console.status(section.title) as status:

        def progress(what: str) -> None:
            status.update(f"{section.title}: {what}")

        try:
            with Rig(seconds, rounds, progress) as rig:
                outcome.figures = section.run(rig)
        except Missing as error:
            outcome.missing = str(error)
        except (BenchError, LabError) as error:
            outcome.failed = str(error)
    outcome.seconds = time.monotonic() - began
    return outcome


def _run(
    sections: Sequence[Section], seconds: float, rounds: int, as_json: bool, path: Path | None, check: bool
) -> None:
    console = Console(stderr=True)
    about = document.machine()
    outcomes = []
    for section in sections:
        outcome = measure(section, seconds, rounds, console)
        outcomes.append(outcome)
        if not as_json:
            Console(width=max(100, console.width)).print(table(outcome), "")
    if as_json:
        print(json.dumps(_document(outcomes, about, seconds, rounds), indent=2, ensure_ascii=False))
    if path is not None:
        _write(path, [outcome for outcome in outcomes if not outcome.failed], about, seconds, rounds)
    failed = [outcome for outcome in outcomes if outcome.failed]
    for outcome in failed:
        click.echo(f"pointsman bench {outcome.section.name}: {outcome.failed}", err=True)
    if failed:
        sys.exit(_FAILED)
    if check and any(figure.met is False for outcome in outcomes for figure in outcome.figures):
        sys.exit(_MISSED)


def _write(path: Path, outcomes: Sequence[Outcome], about: dict[str, str], seconds: float, rounds: int) -> None:
    """The document, and the picture beside it."""
    try:
        document.write(path, outcomes, about, seconds, rounds)
    except (document.NoMarkers, OSError) as error:
        raise click.ClickException(str(error)) from None
    for outcome in outcomes:
        if outcome.section.name == "streams" and outcome.figures:
            plot.draw(plot.bars(outcome.figures), path.with_suffix(".svg"))


def _document(outcomes: Sequence[Outcome], about: dict[str, str], seconds: float, rounds: int) -> dict[str, Any]:
    return {
        "machine": about,
        "seconds": seconds,
        "rounds": rounds,
        "sections": {
            outcome.section.name: {
                "title": outcome.section.title,
                "took_seconds": round(outcome.seconds, 1),
                "missing": outcome.missing,
                "failed": outcome.failed,
                "figures": [figure.as_json() for figure in outcome.figures],
            }
            for outcome in outcomes
        },
    }


@click.group(short_help="Measure what the project promises.")
def bench() -> None:
    """Measure what the project promises, beside our bar and beside other routers."""


def _command(name: str, sections: Sequence[Section], about: str) -> click.Command:
    @click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0.1, 600), help="For each cell.")
    @click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 20), help="Turns of each cell.")
    @click.option("--json", "as_json", is_flag=True, help="JSON on standard output instead of tables.")
    @click.option("--write", "path", type=_DOCUMENT, help="Document to bring up to date.")
    @click.option("--check", is_flag=True, help=f"Exit with {_MISSED} when a bar is missed.")
    def run(seconds: float, rounds: int, as_json: bool, path: Path | None, check: bool) -> None:
        _run(sections, seconds, rounds, as_json, path, check)

    return click.command(name, help=about, short_help=sections[0].title if len(sections) == 1 else about)(run)


for _section in SECTIONS.values():
    bench.add_command(_command(_section.name, [_section], f"{_section.title}.\n\n{_section.about}"))
bench.add_command(_command("all", list(SECTIONS.values()), "Every section."))
