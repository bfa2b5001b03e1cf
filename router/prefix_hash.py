"""Routing text to a chain of block hashes.

The text is cut into blocks of `block_bytes`; the hash of a block is taken with the hash of the block before it as its
seed, so that one 64-bit number stands for the whole text up to there:

    h[0] = xxh3_64(block 0, seed = root)        root = xxh3_64(model, seed = fleet seed ^ block size)
    h[i] = xxh3_64(block i, seed = h[i-1])

Two texts of one model have equal first k hashes exactly if their first k blocks are equal (but for a chance of
2^-64 per pair). The root keeps models and adapters apart. Every worker of a fleet must use one fleet seed, which
clients do not know, so that nobody can search for texts that collide (a collision would only misplace a request). A
trailing part of a block is left out: an engine does not share partial blocks either.

Everything is hashed in one pass, although a look-up alone could stop at the first unknown block: whatever the look-up
finds, the chosen pod is remembered with the whole chain.

Cost: 1 µs per KB of text with blocks of 256 bytes (4 µs for 2 KB, 0.2 ms for 220 KB), packed form included
(`python -m bench.decision_cost`).
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from math import isfinite
from typing import Final

from mypy_extensions import mypyc_attr
from xxhash import xxh3_64_intdigest

BLOCK_BYTES: Final = 256
"""Default: 64 tokens of English text. Finer blocks cost more than their precision is worth (128 bytes: twice the time
and memory to know a prefix 32 tokens better)."""
LARGEST_BLOCK_BYTES: Final = 2048
NOMINAL_BYTES_PER_TOKEN: Final = 4.0


@lru_cache(maxsize=512)
def _packer(hashes: int) -> Callable[..., bytes]:
    return struct.Struct(f"<{hashes}Q").pack


class Chain:
    """The hashes of one text, as numbers and packed (8 bytes little-endian each) for the log and for comparison."""

    __slots__ = ("block_bytes", "hashes", "packed")

    def __init__(self, hashes: list[int], block_bytes: int) -> None:
        self.hashes = hashes
        self.packed = _packer(len(hashes))(*hashes)
        self.block_bytes = block_bytes

    def __len__(self) -> int:
        return len(self.hashes)


EMPTY: Final = Chain([], BLOCK_BYTES)


def block_bytes_for(engine_block_tokens: float, bytes_per_token: float = NOMINAL_BYTES_PER_TOKEN) -> int:
    """The block size for an engine whose KV blocks hold `engine_block_tokens` (NaN: unknown).

    The smallest power of two that holds an engine block, between BLOCK_BYTES and LARGEST_BLOCK_BYTES. All workers must
    arrive at the same number, so it is worked out from what all of them see.
    """
    size = BLOCK_BYTES
    if isfinite(engine_block_tokens):
        while size < min(engine_block_tokens * bytes_per_token, LARGEST_BLOCK_BYTES):
            size *= 2
    return size


@mypyc_attr(allow_interpreted_subclasses=True)
class PrefixHasher:
    """Hashes texts for one fleet. `max_blocks` bounds the work: what follows in a longer text is not looked at."""

    __slots__ = ("max_blocks", "seed")

    def __init__(self, seed: int = 0, max_blocks: int = 8192) -> None:
        self.seed = seed & 0xFFFFFFFFFFFFFFFF
        self.max_blocks = max_blocks

    def chain(self, text: bytes, model: str, block_bytes: int = BLOCK_BYTES) -> Chain:
        """The chain of a text, empty when it is shorter than a block. `model` names the model or the adapter."""
        whole = min(len(text) // block_bytes, self.max_blocks) * block_bytes
        if not whole:
            return EMPTY
        digest = xxh3_64_intdigest
        h = _root(self.seed, model, block_bytes)
        hashes: list[int] = []
        for start in range(0, whole, block_bytes):
            h = digest(text[start : start + block_bytes], h)
            hashes.append(h)
        return Chain(hashes, block_bytes)


@lru_cache(maxsize=4096)
def _root(seed: int, model: str, block_bytes: int) -> int:
    root: int = xxh3_64_intdigest(model.encode("utf-8", "surrogatepass"), seed ^ block_bytes)
    return root
