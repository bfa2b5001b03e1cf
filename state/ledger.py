"""What was sent where: in-flight load and outcomes, one row per writer and one column per pod.

Python has no cheap atomic addition between processes, so nobody shares a counter: each process adds to its own row
and a reader sums the column. Rows are signed. A request may be charged by one process and released by another (the
one that happens to receive Envoy's access log), which leaves +1 in one row and -1 in the other.

Charges come in two kinds. A *held* charge is released by the process that made it, when its ext_proc stream ends; if
that process dies, its held charges are void and `forfeit` takes them back. A charge *left to the log* outlives its
writer: another process will receive the access log entry that releases it.

What still drifts (an Envoy that died with requests in flight) is settled by the scraper, in its own row, against
the engines' own counts.

What other replicas have in flight is a held charge too: of the process that hears of it, which says how much it is in
all (`hold`). Where only what this replica itself has sent counts, that is left out (`of_this_replica`).

Adding the rows up costs as much as the rest of a simple decision. So `follow` adds requests up at most once in
FRESH_SECONDS; in between every charge and release of this process is entered into the sums too, which are exact in what
this process does and at most that old in what the others do.

    0     8 bytes   writers in use are below this number
    64    one int64[W][P] matrix for each Entry, in order
"""

from collections import deque
from enum import IntEnum
from math import inf
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from state.pods import Floats, Ints

_HEADER: Final = 64


class Entry(IntEnum):
    """The matrices."""

    REQUESTS = 0
    """Requests in flight."""
    TOKENS = 1
    """Their prompt tokens (estimated)."""
    PROMISED = 2
    """Prompt tokens sent to the pod and not expected in its cache: only ever goes up."""
    REQUESTS_HELD = 3
    """The part of REQUESTS that ends with the process."""
    TOKENS_HELD = 4
    CHOSEN = 5
    """Requests sent, total."""
    SUCCEEDED = 6
    """Answers with a status below 500, total."""
    FAILED = 7
    """Connect failures, resets and 5xx answers, total."""
    HOLDER = 8
    """The generation that the two HELD entries count for. Those of an earlier pod in the same row are void: its whole
    load was taken off when the row was given to its successor."""
    BUSY_UNTIL = 9
    """Float64, not summed: when the pod will have done the prefills promised to it, in monotonic seconds, as the writer
    reckoned when it promised the last of them. The latest counts."""


FRESH_SECONDS: Final = 0.001
"""How long `follow` takes the other processes' rows to be as they were."""
MAX_CHARGED: Final = 256
_LOADS: Final = -1
_REQUESTS: Final = int(Entry.REQUESTS)
_BUSY_UNTIL: Final = int(Entry.BUSY_UNTIL)
_MAX_VIEWS: Final = 256
_sum: Final = np.add.reduce


class Charge:
    """One request's load on one pod. Whoever releases it needs no more than this."""

    __slots__ = ("generation", "slot", "tokens")

    def __init__(self, slot: int, generation: int, tokens: int) -> None:
        self.slot = slot
        self.generation = generation
        self.tokens = tokens


class Ledger:
    """One process's view: reads every row, writes row `writer`."""

    def __init__(
        self, region: memoryview, generations: Ints, writers: int, pods: int, writer: int | None = None
    ) -> None:
        self._header = region[:_HEADER].cast("q")
        self._rows: Ints = np.frombuffer(region, np.int64, len(Entry) * writers * pods, _HEADER).reshape(
            len(Entry), writers, pods
        )
        self._views: dict[tuple[int, int, int], npt.NDArray[Any]] = {}
        self._generations = generations
        self._generation_of: memoryview[int] = generations.data
        self._pods = pods
        self._writers = writers
        self._own_busy_until: memoryview[float] | None = None
        if writer is not None:
            cells = region[_HEADER:].cast("q")
            starts = [(entry * writers + writer) * pods for entry in Entry]
            own = [cells[start : start + pods] for start in starts]
            self._requests, self._tokens, self._promised, self._requests_held, self._tokens_held = own[:5]
            self._chosen, self._succeeded, self._failed, self._holder = own[5:9]
            self._own_busy_until = own[Entry.BUSY_UNTIL].cast("B").cast("d")
        self._busy_until = self._rows[Entry.BUSY_UNTIL].view(np.float64)
        self.requests_now = [0] * pods
        """Requests in flight on each pod as of the last `follow`, and what this process did since."""
        self._read_at = -inf
        self.charged: deque[tuple[int, int, int]] = deque(maxlen=MAX_CHARGED)
        """What this process has charged, the newest last: pod, tokens, tokens not in its cache."""
        self.charges = 0
        """How many charges that ever were."""
        self._followed = 0

    @staticmethod
    def size(writers: int, pods: int) -> int:
        """Bytes of shared memory."""
        return _HEADER + 8 * len(Entry) * writers * pods

    def admit(self, writer: int) -> None:
        """Let readers see row `writer`. Called by the supervisor, before it starts the writer."""
        self._header[0] = max(self._header[0], writer + 1)

    def totals(self, entry: int, high: int) -> Ints:
        """Sum over all writers for pods 0..high-1."""
        total: Ints = _sum(self._view(entry, high), 0)
        return total

    def loads(self, high: int) -> Ints:
        """The totals of REQUESTS, TOKENS and PROMISED at once: int64[3][high]."""
        total: Ints = _sum(self._view(_LOADS, high), 1)
        return total

    def busy_until(self, high: int) -> Floats:
        """When pods 0..high-1 will have done what they were promised, in monotonic seconds."""
        latest: Floats = np.maximum.reduce(self._view(_BUSY_UNTIL, high), 0)
        return latest

    def follow(self, now: float, high: int) -> list[int]:
        """`requests_now`, brought up to date for at least the pods 0..high-1."""
        if not 0.0 <= now - self._read_at < FRESH_SECONDS or high > self._followed:
            self._read_at = now
            self._followed = high = max(high, self._followed)
            self.requests_now[:high] = self.totals(_REQUESTS, high).tolist()
        return self.requests_now

    def _view(self, entry: int, high: int) -> npt.NDArray[Any]:
        """The rows of all writers that there are. Kept, because cutting it out costs half as much as adding it up."""
        key = (entry, self._header[0], high)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            _, writers, _ = key
            if entry == _LOADS:
                view = self._rows[:3, :writers, :high]
            elif entry == _BUSY_UNTIL:
                view = self._busy_until[:writers, :high]
            else:
                view = self._rows[entry, :writers, :high]
            self._views[key] = view
        return view

    def occupy(self, slot: int, until: float) -> None:
        """Say when a pod will be done with its prefills, this one included. A process without a row says nothing."""
        if self._own_busy_until is not None:
            self._own_busy_until[slot] = until

    def total(self, entry: Entry, slot: int) -> int:
        """Sum over all writers for one pod."""
        return int(self._rows[entry, : self._header[0], slot].sum())

    def load(self, slot: int) -> tuple[int, int]:
        """(requests, prompt tokens) in flight on one pod."""
        return self.total(Entry.REQUESTS, slot), self.total(Entry.TOKENS, slot)

    def charge(self, slot: int, tokens: int, uncached_tokens: int, *, held: bool) -> Charge:
        """Add one request to a pod's load. Called in the same step that selected the pod."""
        generation = self._generation_of[slot]
        self._requests[slot] += 1
        self._tokens[slot] += tokens
        self._promised[slot] += uncached_tokens
        self._chosen[slot] += 1
        if held:
            if self._holder[slot] != generation:
                self._requests_held[slot] = self._tokens_held[slot] = 0
                self._holder[slot] = generation
            self._requests_held[slot] += 1
            self._tokens_held[slot] += tokens
        self.requests_now[slot] += 1
        self.charged.append((slot, tokens, uncached_tokens))
        self.charges += 1
        return Charge(slot, generation, tokens)

    def release(self, charge: Charge, *, held: bool) -> None:
        """Take one request off again. Nothing happens when the pod has gone and its row belongs to another."""
        slot = charge.slot
        if self._generation_of[slot] != charge.generation:
            return
        self._requests[slot] -= 1
        self._tokens[slot] -= charge.tokens
        if held:
            self._requests_held[slot] -= 1
            self._tokens_held[slot] -= charge.tokens
        self.requests_now[slot] -= 1

    def take_hold(self, charge: Charge) -> None:
        """A charge that was left to the log is held from now on, until `let_go`."""
        slot, generation = charge.slot, charge.generation
        if self._generation_of[slot] == generation:
            if self._holder[slot] != generation:
                self._requests_held[slot] = self._tokens_held[slot] = 0
                self._holder[slot] = generation
            self._requests_held[slot] += 1
            self._tokens_held[slot] += charge.tokens

    def let_go(self, charge: Charge) -> None:
        """A held charge is left to the log from now on."""
        if self._generation_of[charge.slot] == charge.generation:
            self._requests_held[charge.slot] -= 1
            self._tokens_held[charge.slot] -= charge.tokens

    def outcome(self, charge: Charge, *, ok: bool) -> None:
        """Count how a request ended, for passive health checks."""
        if self._generation_of[charge.slot] == charge.generation:
            if ok:
                self._succeeded[charge.slot] += 1
            else:
                self._failed[charge.slot] += 1

    def forfeit(self, writer: int) -> int:
        """Give back what a dead writer held. Returns how many requests that were."""
        rows = self._rows[:, writer]
        held = np.where(rows[Entry.HOLDER] == self._generations, rows[Entry.REQUESTS_HELD], 0)
        tokens = np.where(rows[Entry.HOLDER] == self._generations, rows[Entry.TOKENS_HELD], 0)
        rows[Entry.REQUESTS] -= held
        rows[Entry.TOKENS] -= tokens
        rows[Entry.REQUESTS_HELD] = rows[Entry.TOKENS_HELD] = rows[Entry.BUSY_UNTIL] = 0
        return int(held.sum())

    def hold(self, slot: int, requests: int, tokens: int) -> None:
        """Say what this process holds on a pod in all, for one that makes and releases no single charges."""
        generation = self._generation_of[slot]
        if self._holder[slot] != generation:
            self._requests_held[slot] = self._tokens_held[slot] = 0
            self._holder[slot] = generation
        self._requests[slot] += requests - self._requests_held[slot]
        self._tokens[slot] += tokens - self._tokens_held[slot]
        self._requests_held[slot] = requests
        self._tokens_held[slot] = tokens

    def promise(self, slot: int, tokens: int) -> None:
        """Prompt tokens that others have sent to a pod and that are not in its cache."""
        self._promised[slot] += tokens

    def held_by(self, writer: int, slot: int) -> tuple[int, int]:
        """(requests, prompt tokens) that one process holds on one pod."""
        rows = self._rows[:, writer, slot]
        if rows[Entry.HOLDER] != self._generations[slot]:
            return 0, 0
        return int(rows[Entry.REQUESTS_HELD]), int(rows[Entry.TOKENS_HELD])

    def of_this_replica(self, high: int, mirror: int) -> Ints:
        """REQUESTS, TOKENS and PROMISED of pods 0..high-1, without what `mirror`, the process that mirrors other
        replicas, has entered for them: int64[3][high]."""
        total: Ints = self.loads(high)
        rows = self._rows[:, mirror, :high]
        current = rows[Entry.HOLDER] == self._generations[:high]
        total[0] -= np.where(current, rows[Entry.REQUESTS_HELD], 0)
        total[1] -= np.where(current, rows[Entry.TOKENS_HELD], 0)
        total[2] -= rows[Entry.PROMISED]
        return total

    def settle(self, slot: int, requests: int, tokens: int) -> None:
        """Correct a pod's totals by the given amounts, in this process's own row."""
        self._requests[slot] += requests
        self._tokens[slot] += tokens
        self.requests_now[slot] += requests
