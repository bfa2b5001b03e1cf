"""Where prompts went: one ring of records per writer, which every other process follows.

A worker that sends a prompt to a pod appends one record to its own ring: the pod and the hashes of all blocks of the
prompt. Everybody else reads on from where they were, usually before each decision, and keeps a view of their own
(`router.prefix_index`). So prefix knowledge is shared with no lock and no service, it is bounded, and a process that
starts rebuilds its view from what the rings still hold. A record carries the whole chain and not only what was new:
it is copied, not parsed, so its length costs next to nothing, and any record repairs the loss of earlier ones.

Why no reader ever applies a record that was not written so:
- A writer announces how far it is going to write (`reserved`), writes, and then publishes (`head`). A reader copies up
  to `head` and afterwards looks at `reserved`: what it copied is intact if the writer has announced no more than one
  ring's length beyond the reader's place.
- Every record has a checksum over its bytes, seeded with its position, so that a record of an earlier lap, half a
  record, or one whose bytes arrive after `head` on a machine with weak memory order does not fit. The reader then
  waits one turn, and if it does not fit then either, gives up what lies before `head`.
- A writer that dies while it writes has not moved `head`; its successor writes over the remains.
A reader that was lapped goes on at the oldest place that is still safe. Records never cross the bounds of a
segment, so the begin of each segment is the begin of a record.

    heads      u64[W]    bytes ever written, per writer
    reserved   u64[W]
    rings      W times `ring_bytes`, in SEGMENTS parts
    record     8 bytes   xxh3_64 of the rest, seeded with its position
               u32       number of hashes
               u8        log2(block bytes)
               u8        kind
               u16       slot
               u64       pod: generation << 32 | incarnation  (low halves)
               f64       monotonic seconds
               u64[n]    hashes

Cost: 1.2 µs to append, 0.2 µs to see that nothing is new with any number of writers, 1 µs to read a record
(`python -m bench.decision_cost`).
"""

import struct
from typing import Final, NamedTuple

from xxhash import xxh3_64_digest

SEGMENTS: Final = 32
ROUTED: Final = 1
"""The prompt was sent to the pod by this replica."""
REMOTE: Final = 2
"""The same, by another replica."""
_SKIP: Final = 0
_BODY: Final = struct.Struct("<IBBHQd")
RECORD_BYTES: Final = 8 + _BODY.size


class Routed(NamedTuple):
    """One record: this prompt went to this pod."""

    slot: int
    pod: int
    """`pod_tag` of the pod it was: the row may belong to another by now."""
    at: float
    """Monotonic seconds."""
    block_bytes: int
    hashes: bytes
    """Eight bytes each, little-endian, from the first block of the prompt on."""
    kind: int = ROUTED


Record = tuple[int, int, float, int, bytes, int]
"""The same without names, which costs less to make."""


def pod_tag(generation: int, incarnation: int) -> int:
    """Tells apart the pods that had a row one after the other, and the incarnations of each."""
    return (generation & 0xFFFFFFFF) << 32 | (incarnation & 0xFFFFFFFF)


class PrefixLog:
    """All rings. Appends to ring `writer`; a process with none only reads."""

    def __init__(self, region: memoryview, writers: int, ring_bytes: int, writer: int | None = None) -> None:
        self.region = region
        self.writers = writers
        self.writer = writer
        self._heads = region[: 8 * writers].cast("Q")
        self._reserved = region[8 * writers : 16 * writers].cast("Q")
        self.segment_bytes = ring_bytes // SEGMENTS // 8 * 8
        self.ring_bytes = self.segment_bytes * SEGMENTS
        start = 16 * writers
        self._rings = [region[start + w * ring_bytes : start + (w + 1) * ring_bytes] for w in range(writers)]
        self.max_hashes = (self.segment_bytes - RECORD_BYTES) // 8
        self._most_bytes = self.max_hashes * 8
        if self.max_hashes < 1:
            raise ValueError(
                f"a prefix ring of {ring_bytes} bytes holds no record: at least {SEGMENTS * 40} are needed"
            )

    @staticmethod
    def size(writers: int, ring_bytes: int) -> int:
        """Bytes of shared memory. Pages that are never written are never taken."""
        return writers * (16 + ring_bytes)

    @property
    def heads(self) -> "memoryview[int]":
        """How far each writer has come."""
        return self._heads

    def append(self, slot: int, pod: int, at: float, block_bytes: int, hashes: bytes, kind: int = ROUTED) -> None:
        """Write one record, see `Routed`, to this process's ring. A chain too long for a segment loses its tail."""
        writer = self.writer
        if writer is None:
            raise ValueError("a process without a writer row cannot append to the prefix log")
        if len(hashes) > self._most_bytes:
            hashes = hashes[: self._most_bytes]
        length = RECORD_BYTES + len(hashes)
        start = self._heads[writer]
        ring = self._rings[writer]
        room = self.segment_bytes - start % self.segment_bytes
        if length > room:
            self._reserved[writer] = start + room + length
            if room >= RECORD_BYTES:
                place = start % self.ring_bytes
                ring[place : place + RECORD_BYTES] = _seal(start, _BODY.pack(0, 0, _SKIP, 0, 0, 0.0))
            start += room
        else:
            self._reserved[writer] = start + length
        place = start % self.ring_bytes
        body = _BODY.pack(len(hashes) >> 3, block_bytes.bit_length() - 1, kind, slot, pod, at) + hashes
        ring[place : place + length] = _seal(start, body)
        self._heads[writer] = start + length


def _seal(position: int, body: bytes) -> bytes:
    return xxh3_64_digest(body, position) + body


class LogReader:
    """One process's place in every ring. Starts at the oldest record that is still there.

    A process that applies what it appends itself at once passes its own row as `own`: of that ring only what a
    predecessor left is read.
    """

    def __init__(self, log: PrefixLog, own: int | None = None) -> None:
        self._log = log
        self._own = own
        self._own_end = log.heads[own] if own is not None else 0
        self._places = [0] * log.writers
        self._doubtful: dict[int, int] = {}
        at = log.writers if own is None else own
        self._before, self._after = log.heads[:at], log.heads[at + 1 :]
        """The heads of everybody else."""
        self._seen: bytes | None = None
        self._latest: bytes | None = None
        """The heads as `news` saw them last."""
        self._first = 0
        """The ring to begin with: another after each time that something was left."""
        self.lost_bytes = 0
        """How much was overwritten, or given up, before it was read."""

    def skip(self) -> None:
        """Pass over everything that is there."""
        self._places = self._log.heads.tolist()

    def news(self) -> bool:
        """Whether somebody else has written since the last complete `read`."""
        self._latest = self._before.tobytes() + self._after.tobytes()
        return self._latest != self._seen

    def read(self, limit: int = 1 << 30) -> list[Routed]:
        """The next records, those of one writer in order. After `limit` records no further segment is begun."""
        return [Routed(*record) for record in self.records(limit)]

    def records(self, limit: int = 1 << 30) -> list[Record]:
        """The same without names."""
        seen, self._latest = self._latest, None
        if seen is None:
            seen = self._before.tobytes() + self._after.tobytes()
        out: list[Record] = []
        done = True
        places = self._places
        heads: list[int] = self._log.heads.tolist()
        first = self._first
        for writer in range(len(heads)) if not first else (*range(first, len(heads)), *range(first)):
            head = heads[writer]
            if writer == self._own:
                head = min(head, self._own_end)
            place = places[writer]
            if head != place and not self._follow(writer, head, out, limit):
                done = False
        self._seen = seen if done else None
        if not done:
            self._first = (first + 1) % len(heads)
        return out

    def _follow(self, writer: int, head: int, out: list[Record], limit: int) -> bool:
        """Read ring `writer` up to `head`. False when something is left."""
        log = self._log
        ring, size, segment = log._rings[writer], log.ring_bytes, log.segment_bytes
        place = self._places[writer]
        if head < place:
            self._places[writer] = head
            return True
        while place < head:
            if len(out) >= limit:
                self._places[writer] = place
                return False
            if log._reserved[writer] - place > size:
                place = self._lapped(writer, place, head)
                continue
            end = min(head, place - place % segment + segment)
            data = ring[place % size : place % size + end - place].tobytes()
            if log._reserved[writer] - place > size:
                place = self._lapped(writer, place, head)
                continue
            read, good = _parse(data, place, out)
            place += read
            if not good:
                if self._doubtful.get(writer) != place:
                    self._doubtful[writer] = place
                    self._places[writer] = place
                    return False
                self.lost_bytes += head - place
                place = head
        self._places[writer] = place
        return True

    def _lapped(self, writer: int, place: int, head: int) -> int:
        segment, size = self._log.segment_bytes, self._log.ring_bytes
        oldest = (self._log._reserved[writer] - size + 2 * segment - 1) // segment * segment
        oldest = min(max(oldest, 0), head)
        self.lost_bytes += oldest - place
        return oldest


def _parse(data: bytes, position: int, out: list[Record]) -> tuple[int, bool]:
    """Append the records in `data`, which lies at `position` of the ring and ends with a record or a segment.
    Returns how many bytes were read and whether that was all of it."""
    place, end = 0, len(data)
    while place < end:
        if end - place < RECORD_BYTES:
            return end, True  # the rest of a segment, too short for a record that says so
        fields: tuple[int, int, int, int, int, float] = _BODY.unpack_from(data, place + 8)
        hashes, block_bits, kind, slot, pod, at = fields
        stop = place + RECORD_BYTES + (hashes << 3)
        if stop > end or xxh3_64_digest(data[place + 8 : stop], position + place) != data[place : place + 8]:
            return place, False
        if kind == _SKIP:
            return end, True
        out.append((slot, pod, at, 1 << block_bits, data[place + RECORD_BYTES : stop], kind))
        place = stop
    return end, True
