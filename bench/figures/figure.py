"""A measured figure, and the ways to show it: a table for people, JSON, Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from bench.figures.bars import BARS, NO_BAR, Bar

if TYPE_CHECKING:
    from bench.figures.rig import Rig


@dataclass(frozen=True)
class Figure:
    """`key` is stable and finds the bar; `lowest` and `highest` are over the rounds of which `value` is the median."""

    key: str
    what: str
    value: float
    unit: str
    lowest: float | None = None
    highest: float | None = None
    note: str = ""

    @classmethod
    def over(cls, key: str, what: str, values: Sequence[float], unit: str, note: str = "") -> "Figure":
        """The median of what several rounds gave."""
        return cls(key, what, median(values), unit, min(values), max(values), note)

    @property
    def bar(self) -> Bar:
        return BARS.get(self.key, NO_BAR)

    @property
    def met(self) -> bool | None:
        return self.bar.met(self.value)

    def as_json(self) -> dict[str, Any]:
        """With its bar and its peers."""
        bar = self.bar
        return {
            "key": self.key, "what": self.what, "value": self.value, "unit": self.unit,
            "lowest": self.lowest, "highest": self.highest, "note": self.note,
            "bar": bar.limit, "bar_is": "at least" if bar.at_least else "at most", "met": self.met,
            "peers": bar.peers, "peers_source": "measured on another machine of two cores" if bar.peers else "",
        }  # fmt: skip

    def cells(self) -> tuple[str, str, str, str, str]:
        """Figure, value with unit, range, bar, peers."""
        bar = self.bar
        around = ""
        if self.lowest is not None and self.highest is not None and self.lowest != self.highest:
            around = f"{number(self.lowest)} to {number(self.highest)}"
        limit = "" if bar.limit is None else f"{'≥' if bar.at_least else '≤'} {number(bar.limit)}"
        value = f"{number(self.value)} {self.unit}".strip()
        return self.what, value, around, limit, bar.peers


@dataclass(frozen=True)
class Section:
    """A subcommand: what it measures, and its place in the document."""

    name: str
    title: str
    about: str
    """One paragraph: what runs where, and what is charged to whom."""
    run: "Callable[[Rig], list[Figure]]"


@dataclass
class Outcome:
    """What became of a section: figures, or the reason why there are none."""

    section: Section
    figures: list[Figure] = field(default_factory=list)
    missing: str = ""
    """What this machine lacks."""
    failed: str = ""
    """What went wrong: the document keeps what it had."""
    seconds: float = 0.0


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


HEADINGS = ("figure", "ours", "rounds", "bar", "others")


def table(outcome: Outcome) -> Table:
    """For a terminal."""
    shown = Table(title=outcome.section.title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading in ("figure", "others") else "right")
    shown.add_column("")
    for figure in outcome.figures:
        verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[figure.met]
        shown.add_row(*figure.cells(), verdict)
    if outcome.missing or outcome.failed:
        shown.add_row(f"[yellow]not measured: {escape(outcome.missing or outcome.failed)}[/yellow]")
    if any(figure.bar.peers for figure in outcome.figures):
        shown.caption = "others: measured on another machine of two cores, see docs/benchmarks.md"
        shown.caption_justify = "left"
    return shown


def markdown(outcome: Outcome) -> str:
    """The same for the document, with notes below."""
    lines = [outcome.section.about, ""]
    if outcome.missing:
        return "\n".join([*lines, f"Not measured: {outcome.missing}."])
    lines += ["| " + " | ".join((*HEADINGS, "")) + " |", "|---|---:|---:|---:|---|---|"]
    for figure in outcome.figures:
        verdict = {True: "met", False: "**missed**", None: ""}[figure.met]
        lines.append("| " + " | ".join((*figure.cells(), verdict)) + " |")
    notes = [f"{figure.what}: {figure.note}." for figure in outcome.figures if figure.note]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines)
