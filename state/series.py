"""Counters and histograms for `/metrics`: each writer has a region, the admin process adds them up.

A series is a row: a label text and a float64. A writer finds its rows by a dict of its own, so adding one costs a
dict look-up and one store; only a label set seen for the first time writes a new row. A successor reads its
predecessor's rows back, so counters never go down when a worker is replaced.

The number of rows is fixed. A writer that has used all but the last few adds to its metric's row with the overflow
label instead, which the last few are kept for: the totals stay right, whatever is thrown at it. Before it comes to
that the rows of pods that are gone are given back (`reclaim`). Labels that are longer together than a row has room for
are cut, the longest first.

    per writer:  8 bytes rows in use, 56 spare; then rows of LABEL_BYTES + 8
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from typing import Final

LABEL_BYTES: Final = 248
_ROW: Final = LABEL_BYTES + 8
_HEADER: Final = 64
SEPARATOR: Final = "\x1f"
OVERFLOW: Final = "overflow"
LEVELS: Final = frozenset(("transport_level", "mode", "prefix_forgotten", "replicas"))
"""The metrics that are gauges: with the process that set them they are over."""
POD_PLACE: Final[Mapping[str, int]] = {
    "decisions": 2, "finished": 1, "retried": 1, "polls": 1, "ejections": 1, "settled": 1,
}  # fmt: skip
"""Which label of a metric is a pod's name."""
OVERFLOW_ROWS: Final = 16
"""Kept for the overflow rows of as many metrics, or a quarter of all rows where there are few."""

PREFILL_BUCKETS: Final[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds of the histogram of prefill requests."""
DECISION_BUCKETS: Final[tuple[float, ...]] = (
    0.000005, 0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0,
)  # fmt: skip
"""Upper bounds in seconds of the decision latency histogram."""


class Series:
    """One writer's counters. `add` and `put` are for the owner; `items` for anybody."""

    def __init__(self, region: memoryview) -> None:
        self._region = region
        self._used = region[:8].cast("q")
        self._capacity = (len(region) - _HEADER) // _ROW
        self._open = self._capacity - min(OVERFLOW_ROWS, self._capacity // 4)
        self._values: memoryview[float] = region[_HEADER : _HEADER + self._capacity * _ROW].cast("d")
        self._index: dict[tuple[str, ...], int] = {}
        self._free: list[int] = []
        """Rows that were given back: their first byte is 0."""
        for row in range(self._used[0]):
            if self._is_free(row):
                self._free.append(row)
            else:
                self._index[self._labels(row)] = self._cell(row)

    @staticmethod
    def size(rows: int) -> int:
        """Bytes of shared memory for one writer with `rows` series."""
        return -(-(_HEADER + rows * _ROW) // 64) * 64

    @staticmethod
    def _cell(row: int) -> int:
        return (row * _ROW + LABEL_BYTES) // 8

    def _is_free(self, row: int) -> bool:
        return self._region[_HEADER + row * _ROW] == 0

    def _labels(self, row: int) -> tuple[str, ...]:
        start = _HEADER + row * _ROW
        raw = bytes(self._region[start : start + LABEL_BYTES]).rstrip(b"\0")
        return tuple(raw.decode("utf-8", "replace").split(SEPARATOR))

    def cell(self, *labels: str) -> int:
        """The place of a series in `values`, made when it is new. `labels` begin with the metric's name."""
        found = self._index.get(labels)
        if found is not None:
            return found
        row = self._free_row()
        if row >= self._open and labels != (labels[0], OVERFLOW):
            return self.cell(labels[0], OVERFLOW)
        if row >= self._capacity:
            return self._cell(self._capacity - 1)
        encoded = _fitted(labels).ljust(LABEL_BYTES, b"\0")
        start = _HEADER + row * _ROW
        self._values[self._cell(row)] = 0.0
        # A reader passes over what begins with 0, so the first byte comes last.
        self._region[start + 1 : start + LABEL_BYTES] = encoded[1:]
        self._region[start : start + 1] = encoded[:1]
        self._used[0] = max(self._used[0], row + 1)
        self._index[labels] = self._cell(row)
        return self._index[labels]

    def _free_row(self) -> int:
        while self._free:
            row = self._free.pop()
            if self._is_free(row):  # else another object for the same region was faster
                return row
        return self._used[0]

    def reclaim(self, pods: Set[str]) -> int:
        """Where more than half of the rows are in use, give back those of pods that are not among these. Returns how
        many that were; nobody may use their cells any more."""
        if (self._used[0] - len(self._free)) * 2 <= self._open:
            return 0
        gone = [labels for labels in self._index if (pod := pod_of(labels)) and pod not in pods]
        for labels in gone:
            row = (self._index.pop(labels) * 8 - LABEL_BYTES) // _ROW
            self._region[_HEADER + row * _ROW : _HEADER + row * _ROW + 1] = b"\0"
            self._free.append(row)
        return len(gone)

    @property
    def values(self) -> "memoryview[float]":
        """All cells; `values[cell] += 1` is the cheapest way to count."""
        return self._values

    def add(self, amount: float, *labels: str) -> None:
        """Add to a series."""
        cell = self._index.get(labels)
        self._values[self.cell(*labels) if cell is None else cell] += amount

    def put(self, value: float, *labels: str) -> None:
        """Set a series, for gauges."""
        self._values[self.cell(*labels)] = value

    def clear_levels(self) -> None:
        """The process is no more: what it counted stays, its gauges do not."""
        for labels, cell in self._index.items():
            if labels[0] in LEVELS:
                self._values[cell] = 0.0

    def items(self) -> Iterator[tuple[tuple[str, ...], float]]:
        """(labels, value) of every series."""
        for row in range(self._used[0]):
            if not self._is_free(row):
                yield self._labels(row), self._values[self._cell(row)]


def pod_of(labels: tuple[str, ...]) -> str:
    """The pod that a series is about; empty where it is about none, about many, or its name may have been cut."""
    place = POD_PLACE.get(labels[0], 0)
    if not 0 < place < len(labels) or labels[1:] == (OVERFLOW,) or len(_fitted(labels)) == LABEL_BYTES:
        return ""
    return labels[place]


def _fitted(labels: tuple[str, ...]) -> bytes:
    """The text of a row: labels cut, the longest first, until all of them have room."""
    parts = [label.encode("utf-8", "replace") for label in labels]
    for _ in range(sum(map(len, parts)) + len(parts) - 1 - LABEL_BYTES):
        longest = max(range(len(parts)), key=lambda index: len(parts[index]))
        parts[longest] = parts[longest][:-1]
    return SEPARATOR.encode().join([part.decode("utf-8", "ignore").encode() for part in parts])


class Histogram:
    """A histogram in a writer's region: one series per bucket and one for the sum."""

    def __init__(self, series: Series, *labels: str, buckets: tuple[float, ...] = DECISION_BUCKETS) -> None:
        self._values = series.values
        self._bounds = list(buckets)
        self._cells = [series.cell(*labels, "le", repr(bound)) for bound in (*buckets, float("inf"))]
        self._sum = series.cell(*labels, "sum")

    def observe(self, value: float) -> None:
        """Count one value. Buckets are not cumulative here; the admin process adds them up."""
        values = self._values
        values[self._sum] += value
        place = 0
        for bound in self._bounds:  # most values are small, and the first ones few
            if value <= bound:
                break
            place += 1
        values[self._cells[place]] += 1.0


def merge(regions: list[Series]) -> dict[tuple[str, ...], float]:
    """The sum of every series over all writers."""
    total: dict[tuple[str, ...], float] = defaultdict(float)
    for series in regions:
        for labels, value in series.items():
            total[labels] += value
    return dict(total)
