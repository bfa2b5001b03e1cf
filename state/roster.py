"""Which processes there are and how they do. The supervisor writes, the admin process reads.

rows     int64[rows][len(fields of Process)]
beats    int64[rows]: counted up by each process itself once a second, so that one that hangs is noticed
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Kind(IntEnum):
    """What a process does. 0 is an unused row."""

    WORKER = 1
    SCRAPER = 2
    ADMIN = 3
    REPLICATOR = 4


class Phase(IntEnum):
    """Where a process is in its life."""

    STARTING = 1
    READY = 2
    DRAINING = 3
    DOWN = 4
    HUNG = 5


class Process(NamedTuple):
    """One row."""

    kind: Kind
    number: int
    pid: int
    phase: Phase
    restarts: int


class Roster:
    """The table of processes."""

    def __init__(self, region: memoryview, rows: int) -> None:
        fields = len(Process._fields)
        self._rows: npt.NDArray[np.int64] = np.frombuffer(region, np.int64, rows * fields).reshape(rows, fields)
        self._beats: npt.NDArray[np.int64] = np.frombuffer(region, np.int64, rows, 8 * rows * fields)

    @staticmethod
    def size(rows: int) -> int:
        """Bytes of shared memory."""
        return 8 * rows * (len(Process._fields) + 1)

    def beat(self, row: int) -> None:
        """The process of this row is alive and gets to what it has to do."""
        self._beats[row] += 1

    def beats(self, row: int) -> int:
        """How often it has said so."""
        return int(self._beats[row])

    def put(self, row: int, process: Process) -> None:
        """Write one row."""
        self._rows[row] = list(process)

    def clear(self, row: int) -> None:
        """The process of this row is gone for good."""
        self._rows[row] = 0

    def processes(self) -> list[Process]:
        """All rows in use."""
        return [
            Process(Kind(kind), number, pid, Phase(phase), restarts)
            for kind, number, pid, phase, restarts in self._rows.tolist()
            if kind and phase  # a row that is just being written may have the one without the other
        ]
