"""Prefix knowledge as strategies use it: a request and candidates in, cached tokens per candidate out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from router.fleet import Candidates
from router.prefix_hash import BLOCK_BYTES, NOMINAL_BYTES_PER_TOKEN, Chain, PrefixHasher, block_bytes_for
from router.prefix_index import Match, PrefixIndex, SlotIndex
from router.request import RoutingRequest
from state.pods import Floats, Ints
from state.tables import Tables

SPARE = 2.0
"""Copies for each pod's worth of demand: with one, the pods that hold a run could not be chosen among."""


Shares = Sequence[tuple[int | Ints, float, float]]
"""Candidates, by their places, with the prompt's uncached and scarce tokens on them."""


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

    def shares(self, index: PrefixIndex, now: float) -> tuple[float, float, Shares]:
        """(uncached, scarce) of most candidates, and the candidates for which they are others.

        Scarce are uncached tokens, but those of which there are too few copies for their demand count less: a run that
        a share f of all prompts has wants to be on a share SPARE * f of the candidates. While it is on fewer, k, to
        compute it once more is no waste but an investment, and it counts (k / wanted)^2.
        """
        slots, block_tokens, prompt = self.slots, self.block_tokens, self.prompt_tokens
        match = self.match
        if not match.groups:
            return prompt, prompt, ()
        common, others = match.split(slots)
        n, mask = slots.count, slots.mask
        most = prompt - 1.0  # an engine computes at least the last token again
        scarce: dict[int, float] | None = None
        before = 0
        total = 0.0
        for place, run in match.runs:
            tokens = (place - before) * block_tokens
            holders = run.holders & mask
            if holders != mask:
                copies = holders.bit_count()
                # Without the fading a bound from above, which mostly does.
                if copies * index.uses < SPARE * n * run.uses:
                    wanted = min(SPARE * index.demand(run, now), 1.0) * n
                    if copies < wanted:
                        if scarce is None:
                            scarce = self._plain(before)
                        tokens *= (copies / wanted) ** 2
            total += tokens
            if scarce is not None:
                scarce[place] = total
            before = place
        uncached = prompt - min(common * block_tokens, most)
        if scarce is None:
            if len(others) == 1:
                blocks, bitmap = others[0]
                rest = prompt - min(blocks * block_tokens, most)
                return uncached, uncached, ((slots.places(bitmap), rest, rest),)
            shares = []
            for blocks, bitmap in others:
                rest = prompt - min(blocks * block_tokens, most)
                shares.append((slots.places(bitmap), rest, rest))
            return uncached, uncached, shares
        total += max(prompt - before * block_tokens, 0.0)
        shares = []
        for blocks, bitmap in others:
            rest = prompt - min(blocks * block_tokens, most)
            shares.append((slots.places(bitmap), rest, max(total - scarce[blocks], 0.0)))
        return uncached, max(total - scarce[common], 0.0), shares

    def _plain(self, blocks: int) -> dict[int, float]:
        """Tokens up to each run's end, of those that end within so many blocks."""
        worth = {0: 0.0}
        for place, _ in self.match.runs:
            if place <= blocks:
                worth[place] = place * self.block_tokens
        return worth

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

    def look_up(self, request: RoutingRequest, candidates: Candidates, now: float) -> LookUp:
        """What the candidates hold of this prompt. Done once per request, however many strategies ask."""
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
        found = LookUp(chain, index.match(chain, slots.mask), slots, tokens, len(text))
        request.prefix = found
        return found

    def remember(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """The request goes to candidate `index`: note what it will have to compute, and tell all processes."""
        found: LookUp = request.prefix or self.look_up(request, candidates, now)
        slot = candidates.pods[index].slot
        request.uncached_tokens = round(found.prompt_tokens - found.tokens_on(slot))
        self.index.remember(found.chain, slot, now)


def _engine_block_bytes(candidates: Candidates) -> int:
    sizes = candidates.metric("block_size")
    known = sizes[sizes > 0]
    return block_bytes_for(float(known.max())) if len(known) else BLOCK_BYTES
