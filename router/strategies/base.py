"""What a strategy is: a view of the fleet and a request in, the index of a pod out.

Most strategies are a formula: one number per candidate, lower is better, and the lowest wins with ties broken at
random. They derive from `Scoring` and write `scores`; the class docstring is the formula with its units and source,
and `pointsman strategies` prints it. The few that are no formula (`random`, `round-robin`, `power-of-two`) derive
from `Strategy` and write `pick`.

NaN is "not known". A pod whose score is not known is taken to score as one of the others, drawn anew for each request,
so that it is neither shunned (as an average one would be: the lowest is never average) nor flooded. If nobody's score
is known the strategy cannot do what its name says; it then takes the pod with the fewest requests in flight and the
decision is counted as a fallback.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from heapq import nsmallest
from math import inf, isfinite, isnan
from random import Random
from typing import ClassVar, Final

from mypy_extensions import mypyc_attr

from router.backlog import Backlog
from router.fleet import Candidates
from router.prefixes import Prefixes
from router.rates import Rates
from router.request import RoutingRequest
from state.pods import Floats
from state.user_tokens import UserTokens

NEAR: Final = 1e-9
"""Scores closer than this share of the best are equal."""


@dataclass(eq=False)
class Context:
    """What strategies share within one process."""

    random: Random = field(default_factory=Random)
    prefixes: Prefixes | None = None
    """Prefix knowledge, where the process keeps any."""
    rates: Rates = field(default_factory=Rates)
    """Learnt speeds of the pods."""
    backlog: Backlog = field(init=False)
    """Promised prefills not done yet."""
    user_tokens: UserTokens | None = None
    """What users used of late, where that is counted."""
    session_secret: bytes = b""
    """What session ids are made with, the same in every worker and replica; empty for one of this process's own."""

    def __post_init__(self) -> None:
        self.backlog = Backlog(self.rates)


@mypyc_attr(allow_interpreted_subclasses=True)
class Strategy(ABC):
    """Picks a pod. One instance per process; state that must be shared between processes lives in `state`."""

    name: ClassVar[str]
    told_as: ClassVar[str] = ""
    """What responses say instead of the name that was asked for."""
    promises: ClassVar[int] = 0
    """How well `chosen` says what a pod will have to compute, 0 for not at all. It is to be said once per request."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.fallbacks = 0

    @abstractmethod
    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The index of the chosen pod. `candidates` is never empty; `now` is in monotonic seconds."""

    def prepare(self, candidates: Candidates, now: float) -> None:  # noqa: B027 (most work nothing out beforehand)
        """The pods' figures have changed: work out what the next decision needs of them. Called between requests, if
        at all."""

    def next_best(
        self, request: RoutingRequest, candidates: Candidates, first: int, count: int, now: float
    ) -> list[int]:
        """The indices of the pods to try after `first`, at most `count`. Called right after `pick`."""
        return smallest([*map(float, candidates.requests_now(now))], first, count)

    def chosen(  # noqa: B027 (most strategies remember nothing)
        self, request: RoutingRequest, candidates: Candidates, index: int, now: float
    ) -> None:
        """Called right after `pick` (or another strategy's pick) settled on a pod, before anything else happens:
        the place to remember where a prefix went, and to set `request.uncached_tokens`."""

    def used(  # noqa: B027
        self, user: str, counted: int, input_tokens: int, output_tokens: int, now: float
    ) -> None:
        """The answer to a user's request says what it took. `counted` prompt tokens were expected when it was sent. Not
        called for each request: few answers are read."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Scoring(Strategy):
    """A strategy that is a formula."""

    @abstractmethod
    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """One number per candidate, lower is better, NaN for unknown."""

    def terms(self, request: RoutingRequest, candidates: Candidates, now: float) -> dict[str, Floats]:
        """What the scores add up from, by name, where the strategy can tell. Only asked for receipts."""
        return {}

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The candidate with the lowest score."""
        index = lowest(self.scores(request, candidates, now).tolist(), self.context.random)
        if index < 0:
            self.fallbacks += 1
            index = fewest(candidates.requests().tolist(), self.context.random)
        return index

    def next_best(
        self, request: RoutingRequest, candidates: Candidates, first: int, count: int, now: float
    ) -> list[int]:
        """The next lowest scores, of equal ones the less loaded; what is not known comes after all others."""
        scores: list[float] = self.scores(request, candidates, now).tolist()
        loads = candidates.requests_now(now)

        def worth(index: int) -> tuple[bool, float, int]:
            score = scores[index]
            return (False, score, loads[index]) if isfinite(score) else (True, 0.0, loads[index])

        return nsmallest(count, [index for index in range(len(scores)) if index != first], key=worth)


def smallest(values: list[float], first: int, count: int) -> list[int]:
    """The indices of the smallest values but the one at `first`. They must be finite; writes over them."""
    found = []
    values[first] = inf
    for _ in range(min(count, len(values) - 1)):
        index = values.index(min(values))
        values[index] = inf
        found.append(index)
    return found


def fewest(counts: list[int], rng: Random) -> int:
    """Index of the smallest count, at random among equals."""
    best = min(counts)
    ties = counts.count(best)
    if ties == 1:
        return counts.index(best)
    if ties == len(counts):
        return int(rng.random() * ties)
    return [index for index, count in enumerate(counts) if count == best][int(rng.random() * ties)]


def lowest(scores: list[float], rng: Random) -> int:
    """Index of the lowest score, at random among equals; NaN counts as one of the others; -1 if all are NaN."""
    if isnan(sum(scores)):
        known = [score for score in scores if not isnan(score)]
        if not known:
            return -1
        scores = [known[int(rng.random() * len(known))] if isnan(score) else score for score in scores]
    best = min(scores)
    bound = best + abs(best) * NEAR if isfinite(best) else best
    ties = [index for index, score in enumerate(scores) if score <= bound]
    return ties[0] if len(ties) == 1 else ties[int(rng.random() * len(ties))]
