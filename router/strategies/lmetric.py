"""LMetric: new prefill tokens times batch size. A yardstick."""

from typing import ClassVar

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.prefix_aware import PrefixAware
from state.pods import Floats


class LMetric(PrefixAware):
    """score = (prefill tokens under way + this prompt's uncached tokens) * (requests in flight + 1). [tokens]

    No weights to tune: the product orders by cache where load is equal and by load where the cache is. Source:
    "LMetric", arXiv 2603.15202 (2026), in production at Alibaba; Dynamo has it as policy `lmetric`.
    """

    name: ClassVar[str] = "lmetric"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Tokens times requests."""
        _, uncached = self.prompt_and_uncached(request, candidates, now)
        result: Floats = (self.to_prefill(candidates, now) + uncached) * (candidates.requests() + 1.0)
        return result
