"""Prefix knowledge as strategies use it: a request and candidates in, cached tokens per candidate out."""

from collections.abc import Sequence
from math import sqrt
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from router.fleet import Candidates
from router.prefix_hash import BLOCK_BYTES, NOMINAL_BYTES_PER_TOKEN, Chain, PrefixHasher, block_bytes_for
from router.prefix_index import PrefixIndex
from router.prefix_match import Match, SlotIndex, faded
from router.request import RoutingRequest
from state.pods import Floats
from state.tables import Tables

SPARE: Final = 2.0
"""Copies for each pod's worth of demand: with one, the pods that hold a run could not be chosen among."""
PAID_OFF: Final = 3.0
"""A copy is paid for by those who will use it within so many times DEMAND_SECONDS."""

_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
_HALF: Final = np.uint64(32)

Shares = Sequence[tuple[list[int], float, float]]
"""Candidates, by their indices, with the prompt's uncached and scarce tokens on them."""


class LookUp:
    """What the candidates hold of one prompt."""

    __slots__ = ("answer_tokens", "block_tokens", "chain", "match", "prompt_tokens", "slots")

    def __init__(self, chain: Chain, match: Match, slots: SlotIndex, prompt_tokens: float, text_bytes: int) -> None:
        self.chain = chain
        self.match = match
        self.slots = slots
        self.prompt_tokens = prompt_tokens
        self.answer_tokens = 0.0
        """How long answers were taken to be."""
        self.block_tokens = chain.block_bytes * prompt_tokens / text_bytes if text_bytes else 0.0
        """This prompt's tokens in one block of its text."""

    def uncached(self) -> Floats:
        """Prompt tokens that each candidate would have to compute."""
        prompt, slots = self.prompt_tokens, self.slots
        common, others = self.match.split(slots)
        out: Floats = np.empty(slots.count)
        out.fill(prompt - self._tokens(common))
        for blocks, bitmap in others:
            out[slots.indices(bitmap)] = prompt - self._tokens(blocks)
        return out

    def uncached_and_scarce(
        self, index: PrefixIndex, now: float, full: int = 0, busy: int = 0, worth: float = 1.0
    ) -> tuple[float, float, Shares]:
        """(uncached, scarce) of most candidates, and the candidates for which they are others. `full` are those that
        have no room for it and `busy` those where it would wait for other prefills, as bitmaps of their rows; `worth`
        is what a copy made now is good for, from 0 to 1.

        Scarce are uncached tokens, but those of which there are too few copies for their demand count less: a run that
        a share f of all prompts has wants to be on a share SPARE * f of the candidates. While it is on fewer, k, to
        compute it once more is no waste but an investment, and it counts (k / wanted)^2. All prompts are those since
        its first use, or what is new and in demand would wait for its copies until it is no longer new. For f its uses
        of late count less their square root, by which they may be many by chance, and the prompts one more for each
        candidate: of the first few any two are a large share.
        A run of which busy pods have all copies keeps those waiting that ask for it. Of k pods the least busy is the
        sooner done the more they are, as 1 / k: so one copy more saves each of them 1 / (k * (k + 1)) of a wait, and
        those that come while it is kept share its price. With b that went on from the run of late with what nobody
        held, s = PAID_OFF * worth * (b - sqrt(b)) / (k * (k + 1)) do, and it counts 1 / (1 + s). Of a new run b is what
        it will be if it keeps its share of all prompts. The turns of one conversation are no such demand: each goes on
        from where the one before it ended. Without slack a copy would keep others waiting; and while little is found,
        as when all prefixes are new, those that wait do so for prompts computed once, and the wait passes by itself.
        A run of which full pods have all copies is as good as gone until they have room: those that ask for it, `uses`
        of late, share the price of a copy on another pod, the more so the more pods have room.
        """
        prompt, groups, answers = self.prompt_tokens, self.match.groups, self.match.answers
        if not groups:
            return prompt, prompt, ()
        slots, block_tokens = self.slots, self.block_tokens
        prefix_value = self._prefix_value(index, now, full, busy, worth)
        most = prompt - 1.0  # an engine computes at least the last token again
        left = slots.mask
        common = pods = 0
        of_most = (0, prompt, prompt)
        shares: list[tuple[list[int], float, float]] = []
        for blocks, bitmap in groups:
            left ^= bitmap
            tokens = blocks * block_tokens
            uncached = prompt - (tokens if tokens < most else most)
            if prefix_value is None:
                scarce = uncached
            else:
                # What an answer saves is worth as much as the rest of the prompt, block for block.
                begin = answers.get(bitmap, blocks)
                scarce = prefix_value[-1] - prefix_value[begin]
                if begin < blocks:
                    scarce *= uncached / (prompt - begin * block_tokens)
            count = bitmap.bit_count()
            if count <= pods:
                shares.append((slots.indices(bitmap), uncached, scarce))
                continue
            if common:
                shares.append((slots.indices(of_most[0]), of_most[1], of_most[2]))
            common, pods, of_most = blocks, count, (bitmap, uncached, scarce)
        if not left:
            return of_most[1], of_most[2], shares
        scarce = prompt if prefix_value is None else prefix_value[-1]
        if left.bit_count() < pods:
            shares.append((slots.indices(left), prompt, scarce))
            return of_most[1], of_most[2], shares
        shares.append((slots.indices(of_most[0]), of_most[1], of_most[2]))
        return prompt, scarce, shares

    def _prefix_value(
        self, index: PrefixIndex, now: float, full: int, busy: int, worth: float
    ) -> dict[int, float] | None:
        """What the first so many blocks count, in tokens, and -1 for the whole prompt. None where nothing is scarce."""
        block_tokens, n, mask = self.block_tokens, self.slots.count, self.slots.mask
        prefix_value: dict[int, float] | None = None
        prompts = 0.0
        before = 0
        for place, run in self.match.runs:
            holders = run.holders & mask
            less = 0.0
            if full and not holders & ~full:
                uses = faded(run.uses, run.used_at, now)
                less = uses / (1.0 + uses) * (1.0 - full.bit_count() / n)
            elif holders != mask:
                if not prompts:
                    prompts = index.recent_prompts(now) + n
                since = prompts - faded(run.before, run.born, now)
                per_copy = since / (SPARE * n)
                wanted = run.uses / per_copy  # at most, since it fades
                copies = holders.bit_count()
                if copies < wanted:
                    wanted = min(_sure(run.uses, run.used_at, now) / per_copy, n)
                    if copies < wanted:
                        less = 1.0 - (copies / wanted) ** 2
                if run.branched > 1.0 and not holders & ~busy:
                    sharing = PAID_OFF * worth * _sure(run.branched, run.used_at, now) / (copies * (copies + 1))
                    sharing *= prompts / since
                    less = max(less, sharing / (1.0 + sharing))
            if less > 0.0:
                if prefix_value is None:
                    prefix_value = {at: at * block_tokens for at, _ in self.match.runs}
                    prefix_value[-1] = float(self.prompt_tokens)
                tokens = less * (place - before) * block_tokens
                for at in prefix_value:
                    if at >= place or at < 0:
                        prefix_value[at] -= tokens
            before = place
        return prefix_value

    def at_home(
        self,
        uncached: float,
        scarce: float,
        others: Shares,
        index: PrefixIndex,
        keys: npt.NDArray[np.uint64],
        unseen: float,
    ) -> tuple[list[int], float, float] | None:
        """The candidate that every replica would choose for what nobody is known to hold, and the uncached and scarce
        tokens to be expected there; None where no more is to be expected than is known. `uncached`, `scarce` and
        `others` as `uncached_and_scarce` gave them; `keys`: a number for each candidate, the same in all replicas;
        `unseen`: the share of requests that others route, or of what is held that the index forgot.

        It is the candidate with the highest random weight (rendezvous hashing) by the first block that nobody holds:
        of all, or where the prompt goes on after one that was answered, of those that answered it.

        If the share s is unseen and of others h is found, h / (1 - s) would be found if all were seen; so of those not
        found h * s / ((1 - s) * (1 - h)) are held nonetheless, at most s. What stands before is held by as many of
        those pods that are not known to.
        """
        runs, packed = self.match.runs, self.chain.packed
        place, last = runs[-1] if runs else (0, None)
        if place << 3 >= len(packed) or (last is not None and last.start + last.blocks != place):
            return None
        found = index.found_beyond(last)
        held = min(unseen, found * unseen / max((1.0 - unseen) * (1.0 - found), 1e-3))
        if held <= 0.0:
            return None
        weights = keys ^ np.uint64(int.from_bytes(packed[place << 3 : (place + 1) << 3], "little"))
        weights *= _MIX
        weights ^= weights >> _HALF
        weights *= _MIX
        answered = last.answered & self.slots.mask if last is not None else 0
        if answered:
            indices = self.slots.indices(answered)
            home = indices[int(weights[indices].argmax())]
        else:
            home = int(weights.argmax())
        least, counted = uncached, scarce
        for indices, tokens, value in others:
            if tokens < least:
                least, counted = tokens, value
            if home in indices:
                uncached, scarce = tokens, value
        left = 1.0 - held
        return [home], left * (least + left * (uncached - least)), left * (counted + left * (scarce - counted))

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


def _sure(count: float, counted_at: float, now: float) -> float:
    """Of uses of late, those by which they are more than they may be by chance."""
    uses = faded(count, counted_at, now)
    return uses - sqrt(uses) if uses > 1.0 else 0.0


class Prefixes:
    """Hashing and index of one process. `block_bytes` 0 follows the engines' KV blocks."""

    @classmethod
    def of(
        cls, tables: Tables, *, seed: int = 0, block_bytes: int = 0, homes: bool = True, **options: Any
    ) -> "Prefixes":
        """The knowledge that this process shares through `tables`. `seed` must be the same in every process that does,
        and in every replica; `options` are `PrefixIndex`'s."""
        return cls(PrefixIndex(tables.prefix_log, tables.pods, **options), PrefixHasher(seed), block_bytes, homes=homes)

    def __init__(self, index: PrefixIndex, hasher: PrefixHasher, block_bytes: int = 0, *, homes: bool = True) -> None:
        self.index = index
        self.homes = homes
        """Whether there may be other replicas that do not tell where they send prompts (`LookUp.at_home`)."""
        self.hasher = hasher
        self._block_bytes = block_bytes

    def look_up(
        self, request: RoutingRequest, candidates: Candidates, now: float, answer_tokens: float = 0.0
    ) -> LookUp:
        """What the candidates hold of this prompt. Done once per request, however many strategies ask. With
        `answer_tokens`, a prompt that goes on where an answered one ended is taken to begin with that answer."""
        found: LookUp | None = request.prefix
        if (
            found is not None
            and found.slots is candidates.derived.get(SlotIndex)
            and found.answer_tokens == answer_tokens
        ):
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
        tokens = float(request.prompt_tokens)
        if not tokens:
            tokens = len(text) / NOMINAL_BYTES_PER_TOKEN
        answer = int(answer_tokens * len(text) / (tokens * chain.block_bytes)) if answer_tokens and tokens else 0
        found = LookUp(chain, index.match(chain, slots.mask, answer), slots, tokens, len(text))
        found.answer_tokens = answer_tokens
        request.prefix = found
        return found

    def remember(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """The request goes to candidate `index`: note what it will have to compute, and tell all processes."""
        found: LookUp = request.prefix or self.look_up(request, candidates, now)
        slot = candidates.pods[index].slot
        request.uncached_tokens = int(found.prompt_tokens - found.tokens_on(slot) + 0.5)
        self.index.remember(found.chain, slot, now)


def _engine_block_bytes(candidates: Candidates) -> int:
    sizes = candidates.metric("block_size")
    known = sizes[sizes > 0]
    return block_bytes_for(float(known.max())) if len(known) else BLOCK_BYTES
