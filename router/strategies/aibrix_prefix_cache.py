"""AIBrix's prefix-cache, as published: a yardstick."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import fewest
from router.strategies.prefix_aware import PrefixAware
from state.pods import Floats

IMBALANCE = 16
DEVIATIONS = 2.0


class AibrixPrefixCache(PrefixAware):
    """Of the pods with any match, the longest match whose requests <= mean + 2 sample deviations; else the fewest.

    If the most and the fewest requests in flight differ by more than 16, only the pods with the fewest are asked for
    a match. Matches are whole percents of the prompt's blocks, equal ones go by requests. Thresholds are those of
    its Helm chart (its code: 8 and 1). Source: vllm-project/aibrix,
    pkg/plugins/gateway/algorithms/prefix_cache.go, 2026-08. Blocks are this router's, and
    counts are made at selection, where AIBrix counts after it.
    """

    name: ClassVar[str] = "aibrix-prefix-cache"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Minus the match, in whole percent: what it is to other strategies combined with it."""
        prompt, uncached = self.prompt_and_uncached(request, candidates, now)
        result: Floats = -np.floor(100.0 * (prompt - uncached) / max(prompt, 1.0))
        return result

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """As the class says."""
        requests = candidates.requests().tolist()
        percents = self.scores(request, candidates, now).tolist()
        least, n = min(requests), len(requests)
        narrow = max(requests) - least > IMBALANCE
        mean = sum(requests) / n
        variance = sum((x - mean) ** 2 for x in requests) / (n - 1) if n > 1 else 0.0
        bound = mean + DEVIATIONS * variance**0.5
        chance = self.context.random.random
        ranked = sorted(
            (percents[i], requests[i], chance(), i)
            for i in range(n)
            if percents[i] < 0 and (not narrow or requests[i] == least)
        )
        for _, count, _, i in ranked:
            if count <= bound:
                return i
        return fewest(requests, self.context.random)
