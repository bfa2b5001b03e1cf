"""Requests whose charge was given back because nobody seemed to take the decision: the last few, by a hash of their id.

Envoy ends its half of a stream before it has read the end of ours if the client has left, and then nothing is logged.
It does so too if it took the decision and in the same breath answered by itself, no pod being to be had for it: that is
logged, with no address of a pod. Whoever receives such an entry looks here whether the charge was given back already.

A stream whose response is watched may be reset before any response, too, by a client that left early or late. Then
either may come first, the reset or the entry; each is put down for the other, and for nothing else: a client that tries
again may send the same request with the same id.

One ring per writer, in shared memory, since the entry comes to any worker, and the time of the last addition by
anybody: f64, u64[W][KEPT].
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from state.ledger import Charge

KEPT: Final = 256
"""For each writer. Entries come within the 20 ms for which Envoy collects them, and a round trip."""
LATELY_SECONDS: Final = 10.0
"""An entry that is this much later is about a request that was not abandoned."""


class Abandoned:
    """One process's view: adds to its own ring, looks into all."""

    def __init__(self, region: memoryview, writers: int, writer: int | None = None) -> None:
        self._latest = region[:8].cast("d")
        self._rings: npt.NDArray[np.uint64] = np.frombuffer(region[8:], np.uint64, writers * KEPT).reshape(
            writers, KEPT
        )
        self._own = self._rings[writer] if writer is not None else None
        self._next = 0

    @staticmethod
    def size(writers: int) -> int:
        """Bytes of shared memory."""
        return 8 + 8 * writers * KEPT

    def add(self, request_id: bytes, charge: Charge, now: float, *, logged: bool) -> None:
        """It has been given back, by its log entry or because of its stream. The id alone will not do: requests of one
        trace have the same."""
        if self._own is not None:
            self._own[self._next] = _digest(request_id, charge, logged)
            self._next = (self._next + 1) % KEPT
            self._latest[0] = now

    def lately(self, now: float) -> bool:
        """Whether any were added whose entries may still come. For those who have no time to look for each."""
        return now - self._latest[0] < LATELY_SECONDS

    def has(self, request_id: bytes, charge: Charge, *, logged: bool) -> bool:
        """Whether it was given back, and by what."""
        return bool((self._rings == _digest(request_id, charge, logged)).any())


def _digest(request_id: bytes, charge: Charge, logged: bool) -> int:
    text = b"%b.%d.%d.%d.%d" % (request_id, charge.slot, charge.generation, charge.tokens, logged)
    return xxh3_64_intdigest(text)
