"""What a look-up in the prefix index finds: how much of a prompt each pod holds, by whole groups of pods.

A set of pods is a bitmap of their rows, as an integer. Pods that hold equally much of the prompt are one group, so what
is found takes a few numbers, however many pods there are. `SlotIndex` turns bitmaps into indices among the candidates.
"""

from collections.abc import Sequence
from math import exp
from typing import Final

from router.prefix_hash import Chain

DEMAND_SECONDS: Final = 10.0
"""Uses of a run count for this long, on average, as demand for it."""
INDICES_KEPT: Final = 1024


def faded(count: float, counted_at: float, now: float) -> float:
    """What a count of uses still counts, so long after it was taken: it fades over DEMAND_SECONDS."""
    return count * exp((counted_at - now) / DEMAND_SECONDS)


class Run:
    """Consecutive blocks held by the same pods."""

    __slots__ = (
        "answered",
        "before",
        "block_bytes",
        "blocks",
        "born",
        "branched",
        "hashes",
        "holders",
        "key",
        "parent",
        "passed",
        "shared",
        "start",
        "used_at",
        "uses",
    )

    def __init__(self, key: bytes, parent: "Run | None", start: int, hashes: bytes, block_bytes: int) -> None:
        self.key = key
        self.parent = parent
        self.start = start
        self.hashes = hashes
        self.blocks = len(hashes) >> 3
        self.block_bytes = block_bytes
        self.holders = 0
        self.answered = 0
        """The pods whose last prompt along here ended with this run: they have its answer too."""
        self.uses = 0.0
        """How often it was routed of late, as of `used_at`: fading over DEMAND_SECONDS."""
        self.used_at = 0.0
        self.passed = 0.0
        """How many of these uses went on beyond it: fading alike."""
        self.branched = 0.0
        """How many of those with something that nobody held."""
        self.shared = False
        """Whether it was branched off from again since it was last spared: a beginning that many prompts have, not one
        turn of a conversation."""
        self.before = 0.0
        """How many prompts had been routed when it was first seen, at `born`: fading alike."""
        self.born = 0.0


class Match:
    """What a look-up found. `groups` holds (blocks matched, bitmap of slots) with the bitmaps disjoint; pods in none
    of them have no block. `runs` are those that some pod holds, with the blocks matched up to the end of each.
    `answers` says of a group whose length includes an answer, by its bitmap, where the answer begins."""

    __slots__ = ("answers", "chain", "groups", "runs")

    def __init__(
        self, chain: Chain, groups: list[tuple[int, int]], runs: list[tuple[int, Run]], answers: dict[int, int]
    ) -> None:
        self.answers = answers
        self.chain = chain
        self.groups = groups
        self.runs = runs

    def split(self, slots: "SlotIndex") -> tuple[int, list[tuple[int, int]]]:
        """The length that most candidates have, and the groups that have another one."""
        groups = self.groups
        left = slots.mask
        common = most = 0
        for length, bitmap in groups:
            left ^= bitmap
            count = bitmap.bit_count()
            if count > most:
                common, most = length, count
        if not common or left.bit_count() >= most:
            return 0, groups
        others = [group for group in groups if group[0] != common]
        if left:
            others.append((0, left))
        return common, others

    def blocks(self, slots: "SlotIndex") -> list[int]:
        """Matched blocks for each candidate, in their order."""
        common, others = self.split(slots)
        out = [common] * slots.count
        for length, bitmap in others:
            for index in slots.indices(bitmap):
                out[index] = length
        return out


class SlotIndex:
    """Which index among the candidates a pod has, by its row."""

    __slots__ = ("_indices", "count", "mask", "positions")

    def __init__(self, slots: Sequence[int]) -> None:
        self.count = len(slots)
        self.positions = {1 << slot: position for position, slot in enumerate(slots)}
        self.mask = sum(self.positions)
        self._indices: dict[int, list[int]] = {}

    def indices(self, bitmap: int) -> list[int]:
        """The indices of the pods of a bitmap. They are kept, since the same sets of pods come again and again."""
        found = self._indices.get(bitmap)
        if found is None:
            if len(self._indices) >= INDICES_KEPT:
                self._indices.clear()
            found, rest = [], bitmap
            while rest:
                low = rest & -rest
                found.append(self.positions[low])
                rest ^= low
            self._indices[bitmap] = found
        return found


def close_group(
    groups: list[tuple[int, int]], answers: dict[int, int], blocks: int, pods: int, answered: int, answer: int
) -> None:
    """The match of these pods ends after so many blocks; `answered` of them hold `answer` blocks more."""
    more = pods & answered if answer > 0 else 0
    if more:
        answers[more] = blocks
        groups.append((blocks + answer, more))
        pods ^= more
    if pods:
        groups.append((blocks, pods))


def common_blocks(run: bytes, packed: bytes, place: int) -> int:
    """How many blocks of a run a prompt has from block `place` on, by bisection: a chain of hashes that is equal at
    one block is equal at all blocks before it. The first block is known to be equal."""
    low, high = 1, min(len(run) >> 3, (len(packed) >> 3) - place)
    start = place << 3
    while low < high:
        middle = (low + high + 1) // 2
        if run[middle * 8 - 8 : middle * 8] == packed[start + middle * 8 - 8 : start + middle * 8]:
            low = middle
        else:
            high = middle - 1
    return low
