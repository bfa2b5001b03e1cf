"""The pod that holds most of the prompt, unless it is overloaded."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.prefix_aware import PrefixAware, overloaded
from state.pods import Floats

USEFUL_TOKENS = 128.0
USEFUL_SHARE = 0.2


class PrefixCache(PrefixAware):
    """score = requests / (1 + most requests) - matched tokens in whole units of 128, if useful. [units]

    The longest match wins, and requests in flight decide between matches that differ by less than 128 tokens: too
    little to queue for (10 ms of prefill). So a system prompt that every pod holds decides nothing. A match of less
    than a fifth of the prompt is not useful, else a pod that has never seen the common head of all prompts never would;
    nor is that of an overloaded pod, one with more than 1.25 times the others' mean of requests, plus 4.

    AIBrix takes any match over load up to its guards (one block of a system prompt is enough), and its guard of mean
    plus 2 sample deviations cannot fire with fewer than 6 pods. Its own behaviour is `aibrix-prefix-cache`.
    """

    name: ClassVar[str] = "prefix-cache"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Load within a match length, match length before load."""
        prompt, uncached = self.prompt_and_uncached(request, candidates, now)
        requests = np.maximum(candidates.requests(), 0.0)  # for a moment it can be less: workers.scrape.settle
        matched = prompt - uncached
        units = np.floor(matched / USEFUL_TOKENS)
        units[overloaded(requests)] = 0.0
        units[matched < USEFUL_SHARE * prompt] = 0.0
        result: Floats = requests / (1.0 + requests.max()) - units
        return result
