"""Routing text to a chain of block hashes.

The text is cut into blocks of `block_bytes`; the hash of a block is taken with the hash of the block before it as its
seed, so that one 64-bit number stands for the whole text up to there:

    h[0] = xxh3_64(block 0, seed = root)        root = xxh3_64(model, seed = fleet seed ^ block size)
    h[i] = xxh3_64(block i, seed = h[i-1])

Two texts of one model have equal first k hashes exactly if their first k blocks are equal (but for a chance of
2^-64 per pair). The root keeps models and adapters apart. Every worker of a fleet must use one fleet seed, which
clients do not know, so that nobody can search for texts that collide (a collision would only misplace a request). A
trailing part of a block is left out: an engine does not share partial blocks either.

Everything is hashed, although a look-up alone could stop at the first unknown block: whatever the look-up finds, the
chosen pod is remembered with the whole chain. But most prompts begin as an earlier one did: conversations go on, and
system prompts come again. So the hashes are kept by *pieces*, groups of blocks that lie where every text is cut alike:

    known[xxh3_64(piece, seed = hash before it)] = its blocks' hashes        at blocks 0, 8, 16, 32, 64, 96, ...

and a piece that was met before costs one hash instead of one per block. That never changes what comes out. Text that
is new is hashed twice, which costs a tenth more: what costs is calling the hash function, once a block.

Cost: 1.2 µs per KB of new text with blocks of 256 bytes, a sixth of it where the text is known (`python -m
bench.decision_cost`).
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
SMALLEST_PIECE: Final = 8
LARGEST_PIECE: Final = 32
"""Blocks. A piece is as large as all that lies before it, within these bounds: little is lost where texts part."""
_PACKERS: Final[list[Callable[..., bytes]]] = [struct.Struct(f"<{n}Q").pack for n in range(LARGEST_PIECE + 1)]
"""By the number of hashes."""


def pack(hashes: list[int]) -> bytes:
    """Hashes as a chain holds them: 8 bytes each, little-endian."""
    n = len(hashes)
    return _PACKERS[n](*hashes) if n < len(_PACKERS) else struct.pack(f"<{n}Q", *hashes)


class Chain:
    """The hashes of one text, packed."""

    __slots__ = ("block_bytes", "packed")

    def __init__(self, packed: bytes, block_bytes: int) -> None:
        self.packed = packed
        self.block_bytes = block_bytes

    def __len__(self) -> int:
        return len(self.packed) >> 3


EMPTY: Final = Chain(b"", BLOCK_BYTES)


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


class _Piece:
    """The hashes of some blocks that follow each other, packed, and the last of them as a number."""

    __slots__ = ("last", "packed")

    def __init__(self, hashes: list[int]) -> None:
        self.packed = pack(hashes)
        self.last = hashes[-1]


def _hashes(text: bytes, begin: int, end: int, block_bytes: int, before: int) -> list[int]:
    """Of the blocks from byte `begin` to byte `end`; `before` is the hash of the block before them."""
    h = before
    hashes: list[int] = []
    while begin < end:
        h = xxh3_64_intdigest(text[begin : begin + block_bytes], h)
        hashes.append(h)
        begin += block_bytes
    return hashes


@mypyc_attr(allow_interpreted_subclasses=True)
class PrefixHasher:
    """Hashes texts for one fleet. `max_blocks` bounds the work: what follows in a longer text is not looked at.
    `keep_blocks` bounds of how many blocks the hashes are kept."""

    __slots__ = ("_earlier", "_kept", "_known", "keep_blocks", "max_blocks", "seed")

    def __init__(self, seed: int = 0, max_blocks: int = 8192, keep_blocks: int = 1 << 18) -> None:
        self.seed = seed & 0xFFFFFFFFFFFFFFFF
        self.max_blocks = max_blocks
        self.keep_blocks = keep_blocks
        # Two generations: when the later one is half of what may be kept, the earlier one goes, with all pieces that
        # were not met since.
        self._known: dict[int, _Piece] = {}
        self._earlier: dict[int, _Piece] = {}
        self._kept = 0

    @property
    def kept_blocks(self) -> int:
        """Blocks whose hashes are kept."""
        return sum(len(piece.packed) >> 3 for piece in (self._known | self._earlier).values())

    def chain(self, text: bytes, model: str, block_bytes: int = BLOCK_BYTES) -> Chain:
        """The chain of a text, empty when it is shorter than a block. `model` names the model or the adapter."""
        blocks = min(len(text) // block_bytes, self.max_blocks)
        if not blocks:
            return EMPTY
        h = _root(self.seed, model, block_bytes)
        pieces: list[bytes] = []
        place = 0
        size = SMALLEST_PIECE
        while place + size <= blocks:
            text_of_piece = text[place * block_bytes : (place + size) * block_bytes]
            key = xxh3_64_intdigest(text_of_piece, h)
            piece = self._known.get(key)
            if piece is None:
                piece = self._earlier.get(key) or _Piece(_hashes(text_of_piece, 0, len(text_of_piece), block_bytes, h))
                self._keep(key, piece, size)
            pieces.append(piece.packed)
            h = piece.last
            place += size
            if place == 2 * size and size < LARGEST_PIECE:
                size = place
        if place < blocks:
            pieces.append(pack(_hashes(text, place * block_bytes, blocks * block_bytes, block_bytes, h)))
        return Chain(b"".join(pieces) if len(pieces) > 1 else pieces[0], block_bytes)

    def _keep(self, key: int, piece: _Piece, blocks: int) -> None:
        self._kept += blocks
        if 2 * self._kept > self.keep_blocks:
            self._earlier = self._known
            self._known = {}
            self._kept = blocks
        self._known[key] = piece


@lru_cache(maxsize=4096)
def _root(seed: int, model: str, block_bytes: int) -> int:
    root: int = xxh3_64_intdigest(model.encode("utf-8", "surrogatepass"), seed ^ block_bytes)
    return root
