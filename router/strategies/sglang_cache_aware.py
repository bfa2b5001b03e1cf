"""SGLang's (and vllm-router's) cache-aware policy, as published: a yardstick."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.prefix_aware import PrefixAware
from state.pods import Floats

CACHE_THRESHOLD = 0.3
BALANCE_ABSOLUTE = 64
BALANCE_RELATIVE = 1.5


class SglangCacheAware(PrefixAware):
    """The longest match if it is more than 0.3 of the prompt, else the fewest requests.

    The fewest requests at once if the load is unbalanced: most - fewest > 64 and most > 1.5 * fewest. Source:
    sglang-router 0.3.2 and vllm-router 0.1.17 with their command lines' defaults (cache 0.3, balance 64 and 1.5). Where
    nothing matches sglang-router takes the worker with the smallest tree, which sends everything to a new worker
    (sgl-project/sglang#14305); vllm-router the least loaded, and so does this.
    """

    name: ClassVar[str] = "sglang-cache-aware"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Minus the share matched, or requests."""
        requests = candidates.requests().astype(float)
        most, least = requests.max(), requests.min()
        if most - least > BALANCE_ABSOLUTE and most > BALANCE_RELATIVE * least:
            return requests
        prompt, uncached = self.prompt_and_uncached(request, candidates, now)
        matched = 1.0 - uncached / max(prompt, 1.0)
        if matched.max() <= CACHE_THRESHOLD:
            return requests
        return np.negative(matched)
