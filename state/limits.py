"""How much each limited user (or model) has used in this window, counted exactly by all processes together.

Python has no atomic addition between processes, so nobody shares a counter: each process adds to a cell of its own
and the sum of a row is the count. A sum alone would race (two processes see room for one more, both take it), so
taking is *claim, look, give back*:

    own cell += 1; fence; sum of the row <= limit ? admitted : own cell -= 1, refused

Never more than the limit is admitted: of the requests that were admitted, take the one whose claim was the last to be
written. When it looked, every other admitted claim stood in the row, and an admitted claim is never given back, so it
saw more than the limit if they are more than the limit. The fence between the claim and the look (a store before
loads) is what x86, too, needs. Nothing blocks: no process, stopped or killed, is ever waited for. A process killed
between the two steps leaves one claim that nobody uses, until the window ends: one fewer is admitted, never one more.
Two who race for the last place both see too many and both give back; the one that then sees room again tries again.

Windows are fixed: period number = now // window_seconds. A cell is one int64, period << 32 | count, so that it is
read and written whole; a cell of an earlier period counts as zero and needs no clearing. Each row exists twice, for
even and odd periods, so that a process whose clock reading is late still finds the counts of its window. If one of
them has been overwritten already (two windows later), a newer period stands in the row, and that one is taken instead.

Which row belongs to which key is agreed under a lock (a byte of the segment's file, which the kernel unlocks when its
holder dies), taken once per process and key. When no row is free, those that nobody used in this window or the one
before are given to others: they are marked, and who counts in a row looks after its claim whether the row is still
its own, so that either the marking sees the claim or the claim sees the mark.

    int64[S] keys: 63-bit digests, 0 free, negative marked
    int64[S][2 windows][2 Columns][W writers] cells

Cost: `take` 4 µs with 15 writers, 5 µs with 34, refused 4.5 and 6 µs; `add_tokens`
the same (`pytest tests/state/test_limits.py --benchmark-enable`). Locking and unlocking alone (fcntl, two system
calls) are 4.6 µs on that machine, and could block.
"""

import fcntl
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from state.fence import fence

_COUNT_BITS: Final = 32
_ONE_PERIOD: Final = 1 << _COUNT_BITS
_MOST: Final = _ONE_PERIOD - 1
_WINDOWS: Final = 2
_COLUMNS: Final = 2
_ATTEMPTS: Final = 16
_LOCK_ATTEMPTS: Final = 100
_LOCK_PAUSE_SECONDS: Final = 0.0005


class NoRoom(Exception):
    """There is no row for a key: more keys than rows have been used within two windows."""


class Verdict(IntEnum):
    """What came of a `take`."""

    TAKEN = 0
    OVER_REQUESTS = 1
    OVER_TOKENS = 2


class Taken(NamedTuple):
    """The outcome, and the counts of the window with it."""

    verdict: Verdict
    requests: int
    tokens: int
    period: int


class Windows:
    """Counts of requests and tokens per key in fixed windows. `writer` is the column that this process may write.

    `fd` is the segment's file and `lock_byte` a byte of it that nobody else locks.
    """

    def __init__(
        self,
        region: memoryview,
        slots: int,
        writers: int,
        window_seconds: float,
        *,
        fd: int,
        lock_byte: int,
        writer: int | None = None,
    ) -> None:
        self.window_seconds = window_seconds
        self._fd = fd
        self._lock_byte = lock_byte
        self._writer = writer
        self._slots = slots
        self._keys = region[: 8 * slots].cast("q")
        self._key_array: npt.NDArray[np.int64] = np.frombuffer(region, np.int64, slots)
        self._cells = region[8 * slots : self.size(slots, writers)].cast("q")
        self._rows: npt.NDArray[np.int64] = np.frombuffer(
            region, np.int64, slots * _WINDOWS * _COLUMNS * writers, 8 * slots
        ).reshape(slots, _WINDOWS * _COLUMNS * writers)
        self._writers = writers
        self._per_window = _COLUMNS * writers
        self._read_row = struct.Struct(f"@{self._per_window}q").unpack_from  # native, so every cell is one load
        self._known: dict[str, tuple[int, int]] = {}

    @staticmethod
    def size(slots: int, writers: int) -> int:
        """Bytes of shared memory."""
        return 8 * slots * (1 + _WINDOWS * _COLUMNS * writers)

    def take(self, key: str, now: float, limit: int, token_limit: int | None = None) -> Taken:
        """Count one request of a key if its window has room: fewer than `limit` requests so far, and fewer than
        `token_limit` tokens. Raises NoRoom."""
        period = int(now // self.window_seconds)
        writers, cells = self._writers, self._cells
        taken = Taken(Verdict.OVER_REQUESTS, 0, 0, period)
        for _ in range(_ATTEMPTS):
            slot, digest = self._place(key, period)
            start = (slot * _WINDOWS + (period & 1)) * self._per_window
            own = start + self._own()
            base = period << _COUNT_BITS
            before = cells[own]
            if before < base:
                before = base
            elif before >= base + _ONE_PERIOD:  # the clock reading is two windows old
                period = before >> _COUNT_BITS
                continue
            cells[own] = before + 1
            fence()
            row = self._read_row(cells, 8 * start)
            newest = max(row)
            if self._keys[slot] != digest or newest >= base + _ONE_PERIOD:
                cells[own] = before
                period = max(period, newest >> _COUNT_BITS)
                continue
            requests = sum([cell - base for cell in row[:writers] if cell > base])
            tokens = sum([cell - base for cell in row[writers:] if cell > base])
            if requests <= limit:
                if token_limit is None or tokens < token_limit:
                    return Taken(Verdict.TAKEN, requests, tokens, period)
                cells[own] = before
                return Taken(Verdict.OVER_TOKENS, requests - 1, tokens, period)
            cells[own] = before
            row = self._read_row(cells, 8 * start)
            requests = sum([cell - base for cell in row[:writers] if cell > base])
            taken = Taken(Verdict.OVER_REQUESTS, requests, tokens, period)
            if requests >= limit:
                break
        return taken

    def give_back(self, key: str, period: int) -> None:
        """Take back one request that this process counted in a period. Nothing happens when that has gone by."""
        place = self._known.get(key)
        if place is None or self._keys[place[0]] != place[1]:
            return
        own = (place[0] * _WINDOWS + (period & 1)) * self._per_window + self._own()
        if self._cells[own] > period << _COUNT_BITS and self._cells[own] >> _COUNT_BITS == period:
            self._cells[own] -= 1

    def add_tokens(self, key: str, now: float, tokens: int) -> tuple[int, int]:
        """Count tokens of a key. Returns the window's (requests, tokens) with them. Raises NoRoom."""
        period = int(now // self.window_seconds)
        writers, cells = self._writers, self._cells
        tokens = max(0, tokens)
        for _ in range(_ATTEMPTS):
            slot, digest = self._place(key, period)
            start = (slot * _WINDOWS + (period & 1)) * self._per_window
            own = start + writers + self._own()
            base = period << _COUNT_BITS
            before = max(cells[own], base)
            if before >= base + _ONE_PERIOD:
                period = before >> _COUNT_BITS
                continue
            cells[own] = min(before + tokens, base + _MOST)
            fence()
            row = self._read_row(cells, 8 * start)
            newest = max(row)
            if self._keys[slot] != digest or newest >= base + _ONE_PERIOD:
                cells[own] = before
                period = max(period, newest >> _COUNT_BITS)
                continue
            return (
                sum([cell - base for cell in row[:writers] if cell > base]),
                sum([cell - base for cell in row[writers:] if cell > base]),
            )
        raise NoRoom

    # -- which row belongs to whom

    def _own(self) -> int:
        if self._writer is None:
            raise ValueError("a process without a writer row cannot count")
        return self._writer

    def _place(self, key: str, period: int) -> tuple[int, int]:
        """(row, digest) of a key. Two keys with one digest would share a row: never, as names go."""
        place = self._known.get(key)
        if place is not None and self._keys[place[0]] == place[1]:
            return place
        digest = (xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")) >> 1) or 1
        found = np.flatnonzero(self._key_array == digest)
        slot = int(found[0]) if found.size else self._claim(digest, period)
        if len(self._known) > 2 * self._slots:
            self._known.clear()
        self._known[key] = slot, digest
        return slot, digest

    def _claim(self, digest: int, period: int) -> int:
        with self._locked():
            keys = self._key_array
            if (keys < 0).any():  # a predecessor died over it
                self._free_marked(period)
            found = np.flatnonzero(keys == digest)
            if found.size:
                return int(found[0])
            free = np.flatnonzero(keys == 0)
            if not free.size:
                unused = np.flatnonzero(self._unused(period))
                for slot in unused.tolist():
                    self._keys[slot] = -self._keys[slot]
                fence()
                self._free_marked(period)
                free = np.flatnonzero(keys == 0)
                if not free.size:
                    raise NoRoom
            slot = int(free[0])
            self._keys[slot] = digest
            return slot

    def _unused(self, period: int) -> npt.NDArray[np.bool_]:
        """Rows in which nobody counted in this window or the one before."""
        unused: npt.NDArray[np.bool_] = self._rows.max(axis=1) < (period - 1) << _COUNT_BITS
        return unused

    def _free_marked(self, period: int) -> None:
        """Free the marked rows, but leave to their keys those that have been counted in meanwhile."""
        unused = self._unused(period)
        for slot in np.flatnonzero(self._key_array < 0).tolist():
            self._keys[slot] = 0 if unused[slot] else -self._keys[slot]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._lock_byte)
                break
            except OSError:
                if attempt == _LOCK_ATTEMPTS - 1:  # the holder was stopped (SIGSTOP) in these few microseconds
                    raise NoRoom from None
                time.sleep(_LOCK_PAUSE_SECONDS)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self._lock_byte)
