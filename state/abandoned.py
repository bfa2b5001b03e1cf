"""Requests whose charge was given back because nobody seemed to take the decision: the last few, by a hash of their id.

Envoy ends its half of a stream before it has read the end of ours if the client has left, and then nothing is logged.
It does so too if it took the decision and in the same breath answered by itself, no pod being to be had for it: that is
logged, with no address of a pod. Whoever receives such an entry looks here whether the charge was given back already.

One ring per writer, in shared memory, since the entry comes to any worker: u64[W][KEPT].
"""

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

KEPT = 256
"""For each writer. Entries come within the 20 ms for which Envoy collects them, and a round trip."""


class Abandoned:
    """One process's view: adds to its own ring, looks into all."""

    def __init__(self, region: memoryview, writers: int, writer: int | None = None) -> None:
        self._rings: npt.NDArray[np.uint64] = np.frombuffer(region, np.uint64, writers * KEPT).reshape(writers, KEPT)
        self._own = self._rings[writer] if writer is not None else None
        self._next = 0

    @staticmethod
    def size(writers: int) -> int:
        """Bytes of shared memory."""
        return 8 * writers * KEPT

    def add(self, request_id: bytes) -> None:
        """Its charge has been given back."""
        if self._own is not None:
            self._own[self._next] = xxh3_64_intdigest(request_id)
            self._next = (self._next + 1) % KEPT

    def __contains__(self, request_id: bytes) -> bool:
        return bool((self._rings == xxh3_64_intdigest(request_id)).any())
