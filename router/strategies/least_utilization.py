"""The pod with the most headroom."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Scoring
from router.strategies.least_kv_cache import gpu_share, sent_share
from state.pods import Floats


class LeastUtilization(Scoring):
    """score = utilization the engine publishes, else KV share while nothing waits and 1 + waiting/running after. [1]

    An engine whose queue is empty is limited by its memory, so the KV share says how full it is; once requests wait
    it is full, and the queue per running request says how far over. Requests sent since the last poll count as
    waiting when others wait already, else by the memory their prompts take. xllm publishes `engine_utilization`, to
    which the latter is added too.
    """

    name: ClassVar[str] = "least-utilization"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Share of the pod's capacity in use; above 1 it queues."""
        metric = candidates.metric
        waiting = np.nan_to_num(metric("waiting"))
        over = 1.0 + (waiting + candidates.requests_since_sample()) / np.maximum(metric("running"), 1.0)
        derived = np.where(waiting > 0, over, gpu_share(candidates))
        published = metric("utilization")
        result: Floats = np.where(np.isnan(published), derived, published + sent_share(candidates))
        return result
