"""The pod that answered soonest of late."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Scoring
from state.pods import Floats


class LeastLatency(Scoring):
    """score = (queue + prefill * prompt/mean prompt + decode) * (1 + new/(running + waiting + 1)). [seconds]

    queue, prefill, decode: means over the recent window; prompt: this request's tokens; new: requests sent since the
    last poll, which the means cannot show yet. AIBrix takes means since the engine's start, reads the queue as zero,
    and its token averages cancel.

    A pod without a finished request in the window has no mean. It is scored as the quickest known one: whatever it
    does with a request, there will be a mean afterwards.
    """

    name: ClassVar[str] = "least-latency"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Expected end-to-end seconds."""
        metric = candidates.metric
        longer = request.prompt_tokens / np.maximum(metric("prompt_tokens_mean"), 1.0)
        seconds = (
            np.nan_to_num(metric("queue_mean_seconds"))
            + metric("prefill_mean_seconds") * np.where(np.isnan(longer), 1.0, longer)
            + metric("decode_mean_seconds")
        )
        if np.isnan(seconds).all():
            seconds = metric("e2e_mean_seconds")
        unknown = np.isnan(seconds)
        if unknown.any() and not unknown.all():
            seconds[unknown] = seconds[~unknown].min()
        engine_load = np.nan_to_num(metric("running")) + np.nan_to_num(metric("waiting"))
        result: Floats = seconds * (1.0 + candidates.requests_since_sample() / (engine_load + 1.0))
        return result
