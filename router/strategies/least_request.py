"""The pod with the fewest requests in flight."""

from typing import ClassVar

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Scoring, fewest
from state.pods import Floats


class LeastRequest(Scoring):
    """score = requests in flight, counted at selection over all workers and replicas. [requests]

    AIBrix counts after selecting and per replica, so simultaneous requests all see the same counts and pile up
    on one pod; here the count goes up in the same step as the choice.
    """

    name: ClassVar[str] = "least-request"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Requests in flight."""
        return candidates.requests().astype(float)

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The same as the lowest score, on integers."""
        return fewest(candidates.requests().tolist(), self.context.random)
