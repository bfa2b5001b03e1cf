"""Users who use much apart from users who use little."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Context, Scoring
from state.pods import Floats
from state.user_tokens import CELLS, cells_of

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
LEAST_TOKENS = 1000.0
FULL_POD = 100.0
KEPT_SECONDS = 0.25
"""How old the use of other requests may be."""


class VtcBasic(Scoring):
    """score = max(|i + 1/2 - c| - max(w, 1) / 2, 0) + min(requests / 100, 1) + U(0, 0.1). [1]

    i is the pod's place among the n candidates by row. The users of the last five minutes lie side by side on these
    places, those who used little first: each is w = n * (1 / users + its tokens / all tokens) / 2 places wide, around
    c. So users who use alike are spread evenly; one who uses much has more pods, but not as many more as it uses, and
    light users are not behind it. Tokens are input + 2 * output. Users are ordered by use in steps of a factor of
    four, one of them being half to twice the mean (1000 at least), and within a step by a hash, so that they keep their
    pods while use goes up and down. A user not seen before is taken by the length of its prompt; without a user,
    requests alone decide.

    Weights and bounds are AIBrix's (the tokens' are those of VTC, arXiv 2401.00588). Its first term is
    |i - min(tokens / share, n - 1)| with share = (least + most tokens of the users) / 2, and pods numbered anew in
    random order for each request, which makes it noise; with places that last it would never use more than three pods.
    AIBrix counts estimates, each replica its own. Here all workers count together, and with Redis all replicas: the
    prompt when it is sent, and what the engine reports when the answer's usage is seen (users with limits, or
    `usage_metrics`).
    """

    name: ClassVar[str] = "vtc-basic"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._tokens = context.user_tokens
        self._parts: _Parts | None = None
        self._parts_at = 0.0

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Distance from the user's pods, plus load, plus chance."""
        n = len(candidates.pods)
        chance = self.context.random.random
        result: Floats = np.minimum(candidates.requests() / FULL_POD, 1.0)
        result += np.array([0.1 * chance() for _ in range(n)])
        if request.user and self._tokens is not None:
            parts = self._parts
            if parts is None or not 0.0 <= now - self._parts_at < KEPT_SECONDS:
                parts = self._parts = _Parts(self._tokens.totals(now))
                self._parts_at = now
            begin, end = parts.of(request.user, INPUT_WEIGHT * request.prompt_tokens)
            centre, reach = n * (begin + end) / 2.0, max(n * (end - begin), 1.0) / 2.0
            result += np.maximum(np.abs(np.arange(n) + 0.5 - centre) - reach, 0.0)
        return result

    def chosen(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """Count the prompt, as long as it is taken to be."""
        if request.user and self._tokens is not None:
            self._tokens.add(request.user, INPUT_WEIGHT * request.prompt_tokens, now)

    def used(self, user: str, counted: int, input_tokens: int, output_tokens: int, now: float) -> None:
        """Put the count right, and add the answer."""
        if self._tokens is not None:
            self._tokens.add(user, INPUT_WEIGHT * (input_tokens - counted) + OUTPUT_WEIGHT * output_tokens, now)


class _Parts:
    """Which part of the fleet is whose, by the use of each cell in the first row of `state.user_tokens`: users who
    share one count as one there."""

    def __init__(self, totals: Floats) -> None:
        self._totals = totals
        cells = np.flatnonzero(totals[0])
        tokens = totals[0][cells]
        self._mean = max(float(tokens.mean()), LEAST_TOKENS) if len(cells) else LEAST_TOKENS
        keys = _step(np.maximum(tokens, LEAST_TOKENS) / self._mean) * CELLS + cells
        order = keys.argsort()
        self._keys = keys[order]
        weights = (1.0 / max(len(cells), 1) + tokens / max(float(tokens.sum()), 1e-9)) / 2.0
        self._bounds = np.concatenate([[0.0], np.cumsum(weights[order])])

    def of(self, user: str, prompt: float) -> tuple[float, float]:
        """Where a user's part begins and ends, 0..1. One not seen before has a point among those who use alike."""
        first, second = cells_of(user)
        tokens = min(float(self._totals[0, first]), float(self._totals[1, second])) or prompt
        key = float(_step(max(tokens, LEAST_TOKENS) / self._mean)) * CELLS + first
        keys, bounds = self._keys, self._bounds
        i = int(keys.searchsorted(key))
        if i < len(keys) and keys[i] == key:
            return float(bounds[i]), float(bounds[i + 1])
        share = (first + 0.5) / CELLS
        if not len(keys):
            return share, share
        begin, end = bounds[keys.searchsorted((key - first, key - first + CELLS))].tolist()
        place = begin + share * (end - begin)
        return place, place


def _step(uses: Floats | float) -> Floats:
    """Of a use in means: 0 from half to twice the mean, 1 up to eight times."""
    steps: Floats = np.floor(np.log2(uses) / 2.0 + 0.5)
    return steps
