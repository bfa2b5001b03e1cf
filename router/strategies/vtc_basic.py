"""Users who use much apart from users who use little."""

from collections import OrderedDict
from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Context, Scoring
from state.pods import Floats
from state.user_tokens import UserTokens

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
LEAST_TOKENS = 1000.0
FULL_POD = 100.0
USERS_KNOWN = 1024


class VtcBasic(Scoring):
    """score = |i - min(tokens of the user / share, n - 1)| + min(requests / 100, 1) + U(0, 0.1). [1]

    i is the pod's place among the n candidates by row, tokens = input + 2 * output of the last five minutes, share =
    max(1000, (least + most tokens of the users seen) / 2). So the heavier a user, the higher the pods its requests
    go to, and light users are not behind it. Without a user, requests alone decide. Formula, weights and bounds are
    AIBrix's (the tokens' are those of VTC, arXiv 2401.00588). AIBrix numbers the pods anew in random order for each
    request, which makes the first term noise, and counts estimates; here places are stable, and tokens are what
    engines reported, by all workers (`used`).
    """

    name: ClassVar[str] = "vtc-basic"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._tokens: UserTokens | None = context.parts.get("user_tokens")
        self._users: OrderedDict[str, float] = OrderedDict()

    def used(self, user: str, input_tokens: int, output_tokens: int, now: float) -> None:
        """A request of this user has ended; `now` in monotonic seconds."""
        if user and self._tokens is not None:
            self._tokens.add(user, INPUT_WEIGHT * input_tokens + OUTPUT_WEIGHT * output_tokens, now)

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Distance from the user's pod, plus load, plus chance."""
        n = len(candidates.pods)
        chance = self.context.random.random
        result: Floats = np.minimum(candidates.requests() / FULL_POD, 1.0)
        result += np.array([0.1 * chance() for _ in range(n)])
        if request.user and self._tokens is not None:
            used = self._tokens.of(request.user, now)
            users = self._users
            users[request.user] = used
            users.move_to_end(request.user)
            if len(users) > USERS_KNOWN:
                users.popitem(last=False)
            share = max(LEAST_TOKENS, (min(users.values()) + max(users.values())) / 2)
            result += np.abs(np.arange(n) - min(used / share, n - 1.0))
        return result
