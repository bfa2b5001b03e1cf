"""Preble's E2 (exploit or explore), as published, and AIBrix's name for it with its faults mended."""

from collections import deque
from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Context
from router.strategies.prefix_aware import PrefixAware, overloaded
from state.pods import Floats

WINDOW_SECONDS = 180.0
SLICES = 12


class _Window:
    """Work sent to each pod in the last WINDOW_SECONDS, from the ledger's totals, of which a sample is kept every
    WINDOW_SECONDS / SLICES."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[int, tuple[int, int]]]] = deque()

    def sent(self, candidates: Candidates, now: float) -> tuple[Floats, Floats]:
        """(prompt tokens to compute, requests) for each candidate."""
        promised, sent = candidates.promised(), candidates.sent()
        generations = [pod.generation for pod in candidates.pods]
        totals = dict(zip(generations, zip(promised.tolist(), sent.tolist(), strict=True), strict=True))
        samples = self._samples
        if not samples or now - samples[-1][0] >= WINDOW_SECONDS / SLICES:
            samples.append((now, {**samples[-1][1], **totals} if samples else totals))
            while now - samples[0][0] > WINDOW_SECONDS:
                samples.popleft()
        base = samples[0][1]
        # What a row counted before its pod was first seen was another pod's.
        before = np.array([base.setdefault(generation, totals[generation]) for generation in generations], float)
        return promised - before[:, 0], sent - before[:, 1]


class Preble(PrefixAware):
    """Exploit: if more than half of the prompt is cached somewhere, of the pods with the longest match the lightest.
    Explore: else the lowest cost = load + eviction + prefill. [seconds]

    load      prefill and decode seconds of the requests sent in the last 3 minutes: uncached tokens at the pod's
              prefill speed, and per request the mean output at the per-request decode cost
    eviction  seconds to recompute what this prompt would push out: its uncached tokens beyond the pod's free room
    prefill   this prompt's uncached tokens at the pod's prefill speed
    Rebalancing: no exploiting of a pod whose load is more than twice the lightest pod's.
    Source: Preble, arXiv 2407.00023 (ICLR 2025), section 4. Its autoscaling of hot prefixes is left out.
    """

    name: ClassVar[str] = "preble"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._window = _Window()

    def load(self, candidates: Candidates, now: float) -> Floats:
        """Seconds of work sent in the window."""
        speeds = self.rates.speeds(candidates, now)
        tokens, requests = self._window.sent(candidates, now)
        decode = speeds.output_tokens * self.rates.prior.decode_request_seconds * speeds.decode
        result: Floats = tokens * speeds.prefill_seconds + requests * decode
        return result

    def exploitable(self, load: Floats, candidates: Candidates) -> Floats:
        """Which pods may be chosen for their cache."""
        result: Floats = load <= 2.0 * load.min() + 1.0
        return result

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Seconds; infinite for what an exploiting decision leaves out."""
        prompt, uncached = self.prompt_and_uncached(request, candidates, now)
        load = self.load(candidates, now)
        matched = np.where(self.exploitable(load, candidates), prompt - uncached, 0.0)
        longest = matched.max()
        if longest > prompt / 2:
            return np.where(matched >= longest, load, np.inf)
        speeds = self.rates.speeds(candidates, now)
        prefill = uncached * speeds.prefill_seconds
        result: Floats = load + self._eviction(candidates, uncached) * speeds.prefill_seconds + prefill
        return result

    def _eviction(self, candidates: Candidates, uncached: Floats) -> Floats:
        """Tokens pushed out, were the prompt prefilled: by the index, not by the engine's count of blocks in use,
        which leaves out what is cached and free."""
        if self.prefixes is None:
            return np.zeros(len(uncached))
        index = self.prefixes.index
        free = [index.room_tokens(pod.slot) - index.held_tokens(pod.slot) for pod in candidates.pods]
        pushed: Floats = np.maximum(uncached - np.array(free), 0.0)
        return pushed


class PrefixCachePreble(Preble):
    """As `preble`, but load is what is still to do, and an overloaded pod is never exploited. [seconds]

    load = prefill seconds promised and not yet done + requests in flight * mean output * per-request decode cost;
    overloaded as in `prefix-cache`: more than 1.25 times the others' mean of requests, plus 4. AIBrix counts every
    request of 3 minutes as if it still ran, with times of a Mistral 7B on a V100 for any model and GPU.
    """

    name: ClassVar[str] = "prefix-cache-preble"

    def load(self, candidates: Candidates, now: float) -> Floats:
        """Seconds of work still to do."""
        speeds = self.rates.speeds(candidates, now)
        decode = speeds.output_tokens * self.rates.prior.decode_request_seconds * speeds.decode
        result: Floats = self.to_prefill(candidates, now) * speeds.prefill_seconds + candidates.requests() * decode
        return result

    def exploitable(self, load: Floats, candidates: Candidates) -> Floats:
        """All but the overloaded."""
        return np.logical_not(overloaded(candidates.requests().astype(float)))
