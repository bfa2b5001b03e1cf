"""Prefix knowledge as strategies use it: a request and candidates in, cached tokens per candidate out."""

from typing import Any

import numpy as np

from router.fleet import Candidates
from router.prefix_hash import BLOCK_BYTES, NOMINAL_BYTES_PER_TOKEN, Chain, PrefixHasher, block_bytes_for
from router.prefix_index import Match, PrefixIndex, SlotIndex
from router.request import RoutingRequest
from state.pods import Floats
from state.tables import Tables

SPARE = 2.0
"""Copies for each pod's worth of demand: with one, the pods that hold a run could not be chosen among."""


class LookUp:
    """What the candidates hold of one prompt."""

    __slots__ = ("block_tokens", "chain", "match", "prompt_tokens", "slots")

    def __init__(self, chain: Chain, match: Match, slots: SlotIndex, prompt_tokens: float, text_bytes: int) -> None:
        self.chain = chain
        self.match = match
        self.slots = slots
        self.prompt_tokens = prompt_tokens
        self.block_tokens = chain.block_bytes * prompt_tokens / text_bytes if text_bytes else 0.0
        """This prompt's tokens in one block of its text."""

    def uncached(self) -> Floats:
        """Prompt tokens that each candidate would have to compute."""
        prompt, slots = self.prompt_tokens, self.slots
        common, others = self.match.split(slots)
        out: Floats = np.empty(slots.count)
        out.fill(prompt - self._tokens(common))
        for blocks, bitmap in others:
            out[slots.places(bitmap)] = prompt - self._tokens(blocks)
        return out

    def scarce(self, index: PrefixIndex, now: float, uncached: Floats) -> Floats:
        """The same, but tokens of which there are too few copies for their demand count less. Returns `uncached`
        itself where there are none of these.

        A run that a share f of all prompts has wants to be on a share SPARE * f of the candidates. While it is on
        fewer, k, to compute it once more is no waste but an investment, and it counts (k / wanted)^2.
        """
        slots, block_tokens = self.slots, self.block_tokens
        worth = {0: 0.0}
        before, total = 0, 0.0
        any_scarce = False
        for place, run in self.match.runs:
            copies = (run.holders & slots.mask).bit_count()
            wanted = min(SPARE * index.demand(run, now), 1.0) * slots.count
            tokens = (place - before) * block_tokens
            if copies < wanted:
                any_scarce = True
                tokens *= (copies / wanted) ** 2
            total += tokens
            worth[place] = total
            before = place
        if not any_scarce:
            return uncached
        total += max(self.prompt_tokens - before * block_tokens, 0.0)
        for blocks, place in self.match.ends.items():
            worth[blocks] = worth[place] + (blocks - place) * block_tokens
        common, others = self.match.split(slots)
        out: Floats = np.empty(slots.count)
        out.fill(max(total - worth[common], 0.0))
        for blocks, bitmap in others:
            out[slots.places(bitmap)] = max(total - worth[blocks], 0.0)
        return out

    def tokens(self) -> list[float]:
        """Cached prompt tokens for each candidate, in their order."""
        known = {0: 0.0}
        for blocks, _ in self.match.groups:
            known[blocks] = self._tokens(blocks)
        return [known[blocks] for blocks in self.match.blocks(self.slots)]

    def tokens_on(self, slot: int) -> float:
        """Cached prompt tokens on one pod."""
        for blocks, bitmap in self.match.groups:
            if bitmap >> slot & 1:
                return self._tokens(blocks)
        return 0.0

    def _tokens(self, blocks: int) -> float:
        # An engine computes at least the last token again.
        return max(min(blocks * self.block_tokens, self.prompt_tokens - 1.0), 0.0)


class Prefixes:
    """Hashing and index of one process. `block_bytes` 0 follows the engines' KV blocks."""

    @classmethod
    def of(cls, tables: Tables, *, seed: int = 0, block_bytes: int = 0, **options: Any) -> "Prefixes":
        """The knowledge that this process shares through `tables`. `seed` must be the same in every process that does,
        and in every replica; `options` are `PrefixIndex`'s."""
        return cls(PrefixIndex(tables.prefix_log, tables.pods, **options), PrefixHasher(seed), block_bytes)

    def __init__(self, index: PrefixIndex, hasher: PrefixHasher, block_bytes: int = 0) -> None:
        self.index = index
        self.hasher = hasher
        self._block_bytes = block_bytes

    def look_up(
        self, request: RoutingRequest, candidates: Candidates, now: float, answer_tokens: float = 0.0
    ) -> LookUp:
        """What the candidates hold of this prompt. Done once per request, however many strategies ask. With
        `answer_tokens`, a prompt that goes on where an answered one ended is taken to begin with that answer."""
        found: LookUp | None = request.prefix
        if found is not None and found.slots is candidates.derived.get(SlotIndex):
            return found
        slots: SlotIndex | None = candidates.derived.get(SlotIndex)
        if slots is None:
            slots = candidates.derived[SlotIndex] = SlotIndex(candidates.slots.tolist())
            candidates.derived["block_bytes"] = self._block_bytes or _engine_block_bytes(candidates)
        index = self.index
        index.follow(now)
        text = request.text
        if found is not None:
            chain = found.chain
        else:
            chain = self.hasher.chain(text, request.model, candidates.derived["block_bytes"])
        tokens = request.prompt_tokens or len(text) / NOMINAL_BYTES_PER_TOKEN
        answer = int(answer_tokens * len(text) / (tokens * chain.block_bytes)) if answer_tokens and tokens else 0
        found = LookUp(chain, index.match(chain, slots.mask, answer), slots, tokens, len(text))
        request.prefix = found
        return found

    def remember(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """The request goes to candidate `index`: note what it will have to compute, and tell all processes."""
        found = self.look_up(request, candidates, now)
        slot = candidates.pods[index].slot
        request.uncached_tokens = max(round(found.prompt_tokens - found.tokens_on(slot)), 0)
        self.index.remember(found.chain, slot, now)


def _engine_block_bytes(candidates: Candidates) -> int:
    sizes = candidates.metric("block_size")
    known = sizes[sizes > 0]
    return block_bytes_for(float(known.max())) if len(known) else BLOCK_BYTES
