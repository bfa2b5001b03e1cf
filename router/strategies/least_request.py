"""The pod with the fewest requests in flight."""

from typing import ClassVar

from mypy_extensions import mypyc_attr

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Context, Scoring
from state.pods import Floats


@mypyc_attr(allow_interpreted_subclasses=True)
class LeastRequest(Scoring):
    """score = requests in flight, counted at selection over all workers of this replica. [requests]

    AIBrix counts after selecting, so simultaneous requests all see the same counts and pile up on one pod; here
    the count goes up in the same step as the choice. With Redis, other replicas' requests are counted, too, as of the
    last exchange. Equals take turns.
    """

    name: ClassVar[str] = "least-request"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._next = int(context.random.random() * 1024)

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Requests in flight."""
        return candidates.requests().astype(float)

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The same as the lowest score; of several the next after the one chosen last."""
        counts = candidates.requests_now(now)
        start = self._next
        if start >= len(counts):
            start %= len(counts)
        fewest, first, later = counts[0], 0, -1
        for index, count in enumerate(counts):
            if count < fewest:
                fewest, first, later = count, index, -1
            if later < 0 and index >= start and count == fewest:
                later = index
        index = later if later >= 0 else first
        self._next = index + 1
        return index
