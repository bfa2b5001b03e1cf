"""Finds in-flight counts that no longer have a request behind them.

A charge is released once, by a stream's end or an access log entry. When an Envoy dies with its log unsent, nobody
releases what it had in flight, and the pod would look busy for ever. The engine knows better: whatever we count above
the engine's own running and waiting requests is either on its way (to the pod, or in a response that the client reads
slowly) or lost. What stays above it through every poll of `PATIENCE_SECONDS`, at least `POLLS` of them, is lost; the
smallest excess seen is taken off. A count below zero, which a late release of a lost charge leaves behind, is put
right at once. Tokens are settled by their mean, which the lost requests' were not: what is left of them when nothing is
in flight any more, or is below zero, is taken off, too. Other routers' requests only raise the engine's count, so they
can hide a loss but never feign one.
"""

from dataclasses import dataclass
from math import isfinite

PATIENCE_SECONDS = 15.0
POLLS = 5


@dataclass(slots=True)
class Excess:
    """One pod's account: ours against the engine's."""

    since: float = 0.0
    polls: int = 0
    least: int = 0
    stray: int = 0

    def leftover(self, own: int, tokens: int) -> int:
        """What to add to our count of prompt tokens after a poll: tokens without a request, or fewer than none. They
        are read one after the other while workers write, so only as much as two polls show is believed."""
        before, now = self.stray, tokens if own == 0 or tokens < 0 else 0
        sure = min(before, now) if now > 0 else max(before, now)
        found = sure if before * now > 0 else 0
        self.stray = now - found
        return -found

    def correction(self, own: int, engine: float, now: float) -> int:
        """What to add to our count of requests in flight after a poll; 0 almost always."""
        if own < 0:
            self.polls = 0
            return -own
        excess = own - int(engine) if isfinite(engine) else 0
        if excess <= 0:
            self.polls = 0
            return 0
        if self.polls == 0:
            self.since, self.least = now, excess
        self.polls += 1
        self.least = min(self.least, excess)
        if self.polls >= POLLS and now - self.since >= PATIENCE_SECONDS:
            self.polls = 0
            return -self.least
        return 0
