"""The pod that moves the fewest tokens."""

from typing import ClassVar

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Scoring
from state.pods import Floats


class Throughput(Scoring):
    """score = 2 * prompt tokens/s + generation tokens/s, over the recent window. [tokens/s]

    The weight of 2 on prompt tokens is AIBrix's. To the measured rates comes the work sent since the pod was last
    polled, spread over the poll's age, so that the requests of one poll interval do not all follow the same number.
    AIBrix reads two averages that are always zero on current engines and so picks at random.
    """

    name: ClassVar[str] = "throughput"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Weighted token rate."""
        metric = candidates.metric
        window = now - metric("sampled_at")
        window[window < 1.0] = 1.0
        rates = 2.0 * metric("prompt_tokens_per_second") + metric("generation_tokens_per_second")
        result: Floats = rates + 2.0 * candidates.tokens_since_sample() / window
        return result
