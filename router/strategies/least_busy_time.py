"""The pod that was idle the most."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Scoring
from state.pods import Floats


class LeastBusyTime(Scoring):
    """score = share of recent time in which the engine had work + requests sent since then. [0..1 + requests]

    The busy share is measured from the engine's own running count and inference times. A request that was sent after
    the last poll keeps its pod busy from now on, which weighs more than any past share.
    """

    name: ClassVar[str] = "least-busy-time"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Busy share, plus what is under way since the poll."""
        result: Floats = np.add(candidates.metric("busy_ratio"), candidates.requests_since_sample())
        return result
