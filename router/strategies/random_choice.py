"""Any pod, each as likely as the others."""

from typing import ClassVar

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Strategy


class Random(Strategy):
    """Uniform over the candidates. Knows nothing, so nothing can mislead it: the yardstick for all others."""

    name: ClassVar[str] = "random"

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """A uniform choice."""
        return int(self.context.random.random() * len(candidates))
