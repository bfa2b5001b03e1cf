"""What strategies that go by prefixes share: the look-up before, the memory after. Not a strategy itself."""

from typing import ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from router.fleet import Candidates
from router.prefixes import LookUp
from router.request import RoutingRequest
from router.strategies.base import Context, Scoring
from state.pods import Floats


@mypyc_attr(allow_interpreted_subclasses=True)
class PrefixAware(Scoring):
    """A formula over the tokens that each candidate holds of the prompt. Without prefix knowledge, nobody holds any."""

    promises: ClassVar[int] = 1

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.prefixes = context.prefixes
        self.rates = context.rates
        self.backlog = context.backlog

    def look_up(self, request: RoutingRequest, candidates: Candidates, now: float) -> LookUp | None:
        """What the candidates hold of the prompt."""
        return self.prefixes.look_up(request, candidates, now) if self.prefixes is not None else None

    def prompt_and_uncached(self, request: RoutingRequest, candidates: Candidates, now: float) -> tuple[float, Floats]:
        """Prompt tokens, and how many of them each candidate would have to compute."""
        found = self.look_up(request, candidates, now)
        if found is None:
            return float(request.prompt_tokens), np.full(len(candidates.pods), float(request.prompt_tokens))
        return found.prompt_tokens, found.uncached()

    def to_prefill(self, candidates: Candidates, now: float) -> Floats:
        """Prompt tokens that each candidate was promised and has not computed yet."""
        speeds = self.rates.speeds(candidates, now)
        return self.backlog.follow(candidates, speeds, now)

    def chosen(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """Remember where the prompt went, and what it has to compute there."""
        if self.prefixes is not None:
            self.prefixes.remember(request, candidates, index, now)
        elif request.uncached_tokens < 0:
            request.uncached_tokens = request.prompt_tokens
        prefill_seconds = float(self.rates.speeds(candidates, now).prefill_seconds[index])
        self.backlog.promise(candidates, index, request.uncached_tokens, prefill_seconds, now)


def overloaded(requests: Floats, factor: float = 1.25, slack: float = 4.0) -> Floats:
    """Which pods have clearly more requests than the others: more than factor * (mean of the others) + slack.

    Compared with the others' mean, not with a multiple of the deviation of all, it works for two pods as for two
    hundred (with n pods no value lies more than (n-1)/sqrt(n) sample deviations above the mean: 2 deviations are
    never exceeded below 6 pods).
    """
    n = len(requests)
    if n == 1:
        return np.zeros(1, bool)
    others = (requests.sum() - requests) / (n - 1)
    result: Floats = requests > factor * others + slack
    return result
