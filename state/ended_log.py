"""Ends of requests that another replica routed, as Envoy's access log told workers here; the replicator takes them on.

Any worker appends an entry, and the one process that brings it to the replica whose request it was reads them, each
once. It lies in rings like those of the prefix log, with one byte a block: `pod` is the replica, and `hashes` are the
length of the entry, 4 bytes, the entry, and zeros up to a whole number of hashes.
"""

import re
from typing import Final

from state.prefix_log import LogReader, PrefixLog

RING_BYTES: Final = 1 << 18
_REPLICA: Final = re.compile("[0-9a-f]{8}")
_LENGTH_BYTES: Final = 4


class EndedLog:
    """The rings of all workers, and this process's place in them."""

    def __init__(self, region: memoryview, writers: int, writer: int | None = None) -> None:
        self._log = PrefixLog(region, writers, RING_BYTES, writer)
        self._reader = LogReader(self._log)

    @staticmethod
    def size(writers: int) -> int:
        """Bytes of shared memory."""
        return PrefixLog.size(writers, RING_BYTES)

    def append(self, replica: str, entry: bytes, now: float) -> None:
        """Put an entry down for the replica that routed the request. Passed over is what no replica can be called, and
        an entry longer than a segment of the ring."""
        if not _REPLICA.fullmatch(replica) or _LENGTH_BYTES + len(entry) > 8 * self._log.max_hashes:
            return
        padding = bytes(-(_LENGTH_BYTES + len(entry)) % 8)
        packed = len(entry).to_bytes(_LENGTH_BYTES, "little") + entry + padding
        self._log.append(0, int(replica, 16), now, 1, packed)

    def skip(self) -> None:
        """Pass over everything that is there."""
        self._reader.skip()

    def read(self, limit: int) -> list[tuple[str, bytes]]:
        """The next entries, each with its replica, those of one worker in order. After `limit` of them no further
        segment is begun."""
        found = []
        for record in self._reader.read(limit):
            length = int.from_bytes(record.hashes[:_LENGTH_BYTES], "little")
            found.append((f"{record.pod:08x}", record.hashes[_LENGTH_BYTES : _LENGTH_BYTES + length]))
        return found
