"""Reading one metrics page: exposition text in, a `Sample` out.

Theory of operation. Between two polls of a pod nothing on its page changes but the numbers: the same lines stand in
the same order. So the first page is read in full (`_learn`), and what was learnt is kept as a `_Layout`: for each
line what it must begin with, and which lines' numbers make up which quantity. Later pages are split into lines, every
line is checked against the layout, and the numbers are cut out and converted in bulk, in loops that run in C. If any
line differs (a new label set, a restarted engine, a cut page) the page is read in full again and a new layout kept.
The check covers every line, so both ways give the same result on any input whatsoever.

A full reading looks at names only, until it meets a wanted one. `KnownLines` remembers what the text before a number
means; the readers of one engine's pods share it, and share equal layouts through it.

The grammar is Prometheus text format 0.0.4, and OpenMetrics 1.0 as far as the samples go. HELP and TYPE are not
needed: `engines` says what each name is. Lines that are not valid are skipped, and so are numbers that cannot be true
(`plausibility`). The text after the last newline is never used, for it may be half a line.

Cost of a 51 KB page of vLLM 0.32 by `python -m bench.page_cost`: 0.11 ms (0.17 beside busy neighbours); with a new
layout 0.4 to 0.8 ms; the first page of an engine 2 to 4 ms; prometheus_client's parser 8 to 14 ms.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from math import nan
from operator import getitem, itemgetter
from typing import NamedTuple
from weakref import WeakValueDictionary

from workers.scrape.engines import Combine, Engine, Labels
from workers.scrape.plausibility import bounds, plausible

NAN = nan

KNOWN_LINES_MAX = 20_000
"""Line beginnings that one `KnownLines` remembers before it starts anew; a page has about 430."""

KNOWN_LINE_CHARACTERS_MAX = 2_048
"""A longer beginning is not remembered; the longest on a page of vLLM 0.32 has 1,160 characters."""


@dataclass(slots=True, eq=False)
class Histogram:
    """A histogram of the engine since its start. `counts[i]` observations were <= `bounds[i]`, in the unit of `sum`.

    The bounds are ascending and end with +Inf if the page is whole. Both are empty where only the mean is wanted.
    Absent: sum and count are NaN.
    """

    bounds: tuple[float, ...]
    counts: list[float]
    sum: float
    count: float


ABSENT = Histogram((), [], NAN, NAN)


@dataclass(slots=True, eq=False)
class Sample:
    """What one page says. NaN = not on the page. Counters run since the engine's start."""

    running: float = NAN
    """Requests in execution batches."""
    waiting: float = NAN
    """Requests in the engine's queue, deferred ones included."""
    waiting_deferred: float = NAN
    """Of these, held back by an adapter budget, a KV transfer or the like rather than by capacity."""
    swapped: float = NAN
    """Requests swapped out (old vLLM), retracted (SGLang) or paused (TensorRT-LLM)."""
    kv_usage: float = NAN
    """Share of the KV cache in use, 0 to 1, mean over data-parallel ranks."""
    prompt_tokens: float = NAN
    computed_prompt_tokens: float = NAN
    """Prompt tokens that were really computed: neither cached nor fetched."""
    generation_tokens: float = NAN
    prefix_queries: float = NAN
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: float = NAN
    """Of these, found."""
    prefix_hit_ratio: float = NAN
    """The engine's own ratio, where it keeps no counters."""
    preemptions: float = NAN
    rejections: float = NAN
    finished: float = NAN
    """Requests finished for whatever reason."""
    finished_stop: float = NAN
    finished_length: float = NAN
    finished_abort: float = NAN
    finished_error: float = NAN
    awake: float = NAN
    """1 awake, 0 asleep, mean over data-parallel ranks."""
    block_size: float = NAN
    """Tokens in a KV block."""
    num_gpu_blocks: float = NAN
    kv_cache_tokens: float = NAN
    start_time_seconds: float = NAN
    """When the engine's process started, seconds since 1970."""
    prompt_throughput: float = NAN
    """The engine's own gauge, tokens per second."""
    generation_throughput: float = NAN
    utilization: float = NAN
    """The engine's own gauge of how busy it is, 0 to 1 (xLLM)."""

    ttft: Histogram = ABSENT
    itl: Histogram = ABSENT
    e2e: Histogram = ABSENT
    queue: Histogram = ABSENT
    tpot: Histogram = ABSENT
    prefill: Histogram = ABSENT
    decode: Histogram = ABSENT
    inference: Histogram = ABSENT
    prompt_length: Histogram = ABSENT
    generation_length: Histogram = ABSENT
    step_tokens: Histogram = ABSENT

    found: int = 0
    """Samples of wanted families. 0: this is not a page of that engine."""
    truncated: bool = False
    """The page does not end with a newline, so something may be missing. Not fit to be compared with others."""
    implausible: tuple[str, ...] = ()
    """What is on the page with numbers that cannot be true, and so is NaN above."""


_sample: Callable[..., Sample] = Sample  # by position, from sequences whose lengths no type states

_SCALARS = tuple(f.name for f in fields(Sample) if f.default is NAN)
_HISTOGRAMS = tuple(f.name for f in fields(Sample) if f.default is ABSENT)

# Quantities are numbered: scalars, then sum and count of each histogram, then the buckets of each.
_FIRST_HISTOGRAM = len(_SCALARS)
_FIRST_BUCKETS = _FIRST_HISTOGRAM + 2 * len(_HISTOGRAMS)
_FLAT = (*_SCALARS, *(f"{name}.{part}" for name in _HISTOGRAMS for part in ("sum", "count")))
_MOST = bounds(_FLAT)

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"[ \t]*(,|(?=\}))')
_LABELS_END = re.compile(r"[ \t]*\}[ \t]*")
_SPACE = re.compile(r"[ \t]+")
_ESCAPE = re.compile(r"\\(.)")


class _Want(NamedTuple):
    """One use of a sample name."""

    quantity: int
    rank: int
    """Place in the order of preference among the quantity's sources."""
    where: Labels = ()
    label: str = ""


class _Use(NamedTuple):
    """What one line's number, or one of its labels, is used for."""

    quantity: int
    rank: int
    constant: float | None = None
    """The number, where a label holds it."""
    bound: float = NAN
    """The upper bound of a bucket."""


class _Known(NamedTuple):
    """What a line beginning means. `head` is as much of the line as tells it from all others in meaning."""

    head: str
    uses: tuple[_Use, ...]
    identity: tuple[str, Labels] | None
    """The series without the labels of `Engine.same_work`; None if the line is not wanted."""


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda match: "\n" if match[1] == "n" else match[1], text)


def _parse_series(line: str, at: int) -> tuple[dict[str, str], int] | None:
    """The labels of the sample on `line`, whose name ends at `at`, and where its number begins. None: not valid."""
    labels: dict[str, str] = {}
    space = _SPACE.match(line, at)
    if space is not None:
        at = space.end()
    if not line.startswith("{", at):
        return (labels, at) if space is not None else None
    at += 1
    end = _LABELS_END.match(line, at)
    while end is None:
        label = _LABEL.match(line, at)
        if label is None:
            return None
        labels[label[1]] = _unescape(label[2])
        at = label.end()
        end = _LABELS_END.match(line, at)
    return labels, end.end()


def _number(text: str) -> float:
    """The number at the start of `text`, behind which a timestamp or an exemplar may stand. ValueError if none."""
    try:
        return float(text)
    except ValueError:
        parts = text.split(None, 1)
        if not parts:
            raise
        return float(parts[0])


def _wants(engine: Engine) -> dict[str, tuple[_Want, ...]]:
    """Sample name -> what it is wanted for."""
    wants: dict[str, list[_Want]] = {}
    for scalar in engine.scalars:
        for rank, source in enumerate(scalar.sources):
            want = _Want(_SCALARS.index(scalar.quantity), rank, source.where, source.label)
            wants.setdefault(source.name, []).append(want)
    for distribution in engine.distributions:
        index = _HISTOGRAMS.index(distribution.quantity)
        for rank, name in enumerate(distribution.names):
            wants.setdefault(name + "_sum", []).append(_Want(_FIRST_HISTOGRAM + 2 * index, rank))
            wants.setdefault(name + "_count", []).append(_Want(_FIRST_HISTOGRAM + 2 * index + 1, rank))
            if distribution.buckets:
                wants.setdefault(name + "_bucket", []).append(_Want(_FIRST_BUCKETS + index, rank))
    return {name: tuple(uses) for name, uses in wants.items()}


class KnownLines:
    """What the readers of one engine's pods have learnt together. Not for use by several threads at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.combine = {_SCALARS.index(scalar.quantity): scalar.combine for scalar in engine.scalars}
        self.layouts: WeakValueDictionary[tuple[object, ...], _Layout] = WeakValueDictionary()
        self._wants = _wants(engine)
        self._known: dict[str, _Known] = {}

    def look_up(self, line: str) -> _Known | None:
        """What a line means that is no comment, not blank and does not begin with a space. None: it is not valid,
        or not enough of it is there to tell."""
        beginning = line[: line.rfind(" ") + 1]
        known = self._known.get(beginning)
        if known is None:
            known = self._parse(line)
            # A beginning that holds more than the series (a timestamp follows the number) would never come again.
            if known is not None and len(beginning) <= KNOWN_LINE_CHARACTERS_MAX and beginning.startswith(known.head):
                if known.identity is not None and len(known.head) != len(beginning):
                    return known
                if len(self._known) >= KNOWN_LINES_MAX:
                    self._known.clear()
                self._known[beginning] = known
        return known

    def _parse(self, line: str) -> _Known | None:
        match = _NAME.match(line)
        if match is None:
            return _Known(line[0], (), None)
        name = match[0]
        wants = self._wants.get(name)
        if wants is None:
            return _Known(line[: len(name) + 1], (), None) if len(line) > len(name) else None
        series = _parse_series(line, match.end())
        if series is None:
            return None
        labels, number_at = series
        engine = self.engine
        uses: list[_Use] = []
        if all(labels.get(label, value) == value for label, value in engine.only.items()):
            for want in wants:
                if any(labels.get(label) != value for label, value in want.where):
                    continue
                use = _use(want, labels)
                if use is None:
                    return None
                uses.append(use)
        identity = tuple(sorted(pair for pair in labels.items() if pair[0] not in engine.same_work))
        return _Known(line[:number_at], tuple(uses), (name, identity))


def _use(want: _Want, labels: dict[str, str]) -> _Use | None:
    """None: a bucket without a bound."""
    if want.quantity >= _FIRST_BUCKETS:
        try:
            return _Use(want.quantity, want.rank, bound=float(labels.get("le", "")))
        except ValueError:
            return None
    if want.label:
        try:
            return _Use(want.quantity, want.rank, constant=float(labels.get(want.label, "")))
        except ValueError:
            return _Use(want.quantity, want.rank, constant=NAN)  # "None": the engine has not decided
    return _Use(want.quantity, want.rank)


def _picker(indexes: Sequence[int]) -> Callable[[Sequence[str]], tuple[str, ...]]:
    """`itemgetter` that gives a tuple whatever the number of indexes."""
    if len(indexes) > 1:
        return itemgetter(*indexes)
    if indexes:
        index = indexes[0]
        return lambda lines: (lines[index],)
    return lambda lines: ()


def _combined(numbers: Sequence[float], combine: Combine) -> float:
    if combine is Combine.SUM:
        return sum(numbers)
    if combine is Combine.MEAN:
        return sum(numbers) / len(numbers)
    return max((number for number in numbers if number == number), default=NAN)


class _Layout:
    """Where the wanted numbers stand on a page whose lines are known. See the head of this file."""

    def __init__(
        self,
        lines: Sequence[str],
        known: Sequence[_Known | None],
        timestamps: bool,
        combine: dict[int, Combine],
    ) -> None:
        """`known[i]` says what line i means, None that it is a comment, blank, or to be passed over."""
        self._line_count = len(lines)
        samples = [i for i, line in enumerate(known) if line is not None]
        others = [i for i, line in enumerate(known) if line is None]
        self._pick_samples = _picker(samples)
        self._heads = tuple(line.head for line in known if line is not None)
        self._pick_others = _picker(others)
        self._others = self._pick_others(lines)
        self._number: Callable[[str], float] = _number if timestamps else float
        self._place(known, combine)

    def _place(self, known: Sequence[_Known | None], combine: dict[int, Combine]) -> None:
        """Give each wanted number a place in the list of values, those that belong together side by side."""
        uses: dict[int, dict[int, list[tuple[int, _Use]]]] = {}
        seen: set[tuple[str, Labels]] = set()
        for i, line in enumerate(known):
            if line is None or line.identity is None or line.identity in seen:
                continue
            seen.add(line.identity)
            for use in line.uses:
                uses.setdefault(use.quantity, {}).setdefault(use.rank, []).append((i, use))
        self.found = len(seen)

        indexes: list[int] = []
        constants: list[float] = [NAN]
        # Of each flat quantity the place of its value; negative numbers count from the end, where constants stand.
        places: list[int] = [-1] * _FIRST_BUCKETS
        self._combined: list[tuple[int, int, int, Combine]] = []
        self._buckets: list[tuple[tuple[float, ...], int, int, list[tuple[int, int]] | None] | None] = []

        for index in range(len(_HISTOGRAMS)):
            count_at = _FIRST_HISTOGRAM + 2 * index + 1
            rank = min(uses.get(count_at, ()), default=None)
            for quantity in (count_at - 1, count_at, _FIRST_BUCKETS + index):
                if quantity in uses:
                    ranks = uses[quantity]
                    uses[quantity] = {rank: ranks[rank]} if rank is not None and rank in ranks else {}
            if rank is None:
                self._buckets.append(None)
                continue
            by_bound: dict[float, list[int]] = {}
            for i, use in uses.get(_FIRST_BUCKETS + index, {}).get(rank, ()):
                by_bound.setdefault(use.bound, []).append(i)
            bounds = tuple(sorted(by_bound))
            start = len(indexes)
            ranges: list[tuple[int, int]] = []
            for bound in bounds:
                ranges.append((len(indexes), len(indexes) + len(by_bound[bound])))
                indexes += by_bound[bound]
            single = len(indexes) - start == len(bounds)
            self._buckets.append((bounds, start, len(indexes), None if single else ranges))

        for quantity in range(_FIRST_BUCKETS):
            if not uses.get(quantity):
                continue
            ranks = uses[quantity]
            chosen = ranks[min(ranks)]
            how = combine.get(quantity, Combine.SUM)
            given = [use.constant for _, use in chosen if use.constant is not None]
            if given:
                constants.append(_combined(given, how))
                places[quantity] = -len(constants)
                continue
            places[quantity] = len(indexes)
            indexes += [i for i, _ in chosen]
            if len(chosen) > 1:
                self._combined.append((quantity, places[quantity], len(indexes), how))

        self._pick_numbers = _picker(indexes)
        self._tails = [slice(len(line.head), None) for line in map(known.__getitem__, indexes) if line is not None]
        self._constants = constants[::-1]
        self._flat = itemgetter(*places)

    def fits(self, lines: list[str]) -> bool:
        """True if each of the lines means what it meant when this layout was learnt."""
        return (
            len(lines) == self._line_count
            and self._pick_others(lines) == self._others
            and all(map(str.startswith, self._pick_samples(lines), self._heads))
        )

    def read(self, lines: list[str], truncated: bool) -> Sample:
        """The numbers of a page that fits. Raises ValueError if one is not a number."""
        texts: Iterable[str] = map(getitem, self._pick_numbers(lines), self._tails)
        values = list(map(self._number, texts))
        values += self._constants
        flat = list(self._flat(values))
        for quantity, start, stop, combine in self._combined:
            flat[quantity] = _combined(values[start:stop], combine)
        said, flat = flat, plausible(flat, _MOST)
        implausible: tuple[str, ...] = ()
        if flat != said:  # what is absent is the same object in both
            implausible = tuple([name for name, a, b in zip(_FLAT, said, flat, strict=True) if a == a and b != b])
        histograms = []
        at = _FIRST_HISTOGRAM
        for buckets in self._buckets:
            if buckets is None:
                histograms.append(ABSENT)
            else:
                bounds, start, stop, ranges = buckets
                counts = values[start:stop] if ranges is None else [sum(values[a:b]) for a, b in ranges]
                histograms.append(Histogram(bounds, counts, flat[at], flat[at + 1]))
            at += 2
        return _sample(*flat[:_FIRST_HISTOGRAM], *histograms, self.found, truncated, implausible)


class PageReader:
    """Reads the pages of one pod. `known` may be shared by the readers of all pods of one engine."""

    def __init__(self, known: KnownLines) -> None:
        self._known = known
        self._layout: _Layout | None = None

    def read(self, page: bytes) -> Sample:
        """Never raises: what cannot be read is absent from the sample."""
        # Latin-1 keeps one character per byte and never fails; names of metrics are ASCII.
        lines = page.decode("latin-1").split("\n")
        rest = lines.pop()
        truncated = bool(rest) and rest.strip() != "# EOF"
        layout = self._layout
        if layout is not None and layout.fits(lines):
            try:
                return layout.read(lines, truncated)
            except ValueError:
                pass  # something that is not a number: find out which
        return self._learn(lines, truncated)

    def _learn(self, lines: list[str], truncated: bool) -> Sample:
        """Read a page of which nothing is known, and keep its layout if it may serve for another page."""
        look_up = self._known.look_up
        lasting = True
        timestamps = False
        known: list[_Known | None] = []
        prefixes: list[object] = []
        for raw in lines:
            meaning: _Known | None = None
            line = raw
            if raw and raw[0] in " \t" and not raw.isspace():
                line = raw.lstrip(" \t")
                lasting = lasting and line[0] == "#"
            if line and line[0] != "#" and not line.isspace():
                meaning = look_up(line)
                if meaning is None:
                    lasting = False
                elif meaning.uses:
                    tail = line[len(meaning.head) :]
                    try:
                        float(tail)
                    except ValueError:
                        try:
                            _number(tail)
                            timestamps = True
                        except ValueError:
                            meaning = None
                            lasting = False
            known.append(meaning)
            prefixes.append(raw if meaning is None else meaning)
        if not lasting:
            stripped_lines = [line.lstrip(" \t") for line in lines]
            return _Layout(stripped_lines, known, timestamps, self._known.combine).read(stripped_lines, truncated)
        key = (timestamps, *prefixes)
        layout = self._known.layouts.get(key)
        if layout is None:
            layout = _Layout(lines, known, timestamps, self._known.combine)
            self._known.layouts[key] = layout
        self._layout = layout
        return layout.read(lines, truncated)
