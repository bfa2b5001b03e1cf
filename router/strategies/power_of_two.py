"""The better of two pods drawn at random."""

from typing import ClassVar

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Strategy


class PowerOfTwo(Strategy):
    """Two distinct candidates are drawn uniformly; the one with fewer requests in flight wins, the first on a tie.

    Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001. AIBrix keeps the counts in
    Redis, at one to three round trips per request; here they are the shared ledger's.
    """

    name: ClassVar[str] = "power-of-two"

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The less loaded of two."""
        n = len(candidates)
        if n == 1:
            return 0
        chance = self.context.random.random
        first = int(chance() * n)
        second = int(chance() * (n - 1))
        if second >= first:
            second += 1
        counts = candidates.requests()
        return first if counts[first] <= counts[second] else second
