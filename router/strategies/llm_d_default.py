"""llm-d's scheduler with no configuration, as published: a yardstick."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.prefix_aware import PrefixAware
from state.pods import Floats


class LlmDDefault(PrefixAware):
    """score = -(2 * queue + 2 * (1 - KV share in use) + 3 * matched share of the prompt). [1, each term in 0..1]

    queue = (most waiting - waiting) / (most - fewest), 1 for all if equal, so that one request more can weigh as much
    as a hundred. Queue and KV share are the engine's, as old as the last poll; nothing is added for what was sent
    since. Source: llm-d-router ebab687 (2026-08): queue-scorer 2, kv-cache-utilization-scorer 2,
    prefix-cache-scorer 3, max-score-picker.
    """

    name: ClassVar[str] = "llm-d-default"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Minus the weighted sum."""
        waiting = _or_nothing(candidates.metric("waiting"))
        most, least = np.nanmax(waiting), np.nanmin(waiting)
        queue = (most - waiting) / (most - least) if most > least else waiting * 0.0 + 1.0
        free = 1.0 - np.clip(_or_nothing(candidates.metric("kv_usage")), 0.0, 1.0)
        prompt, uncached = self.prompt_and_uncached(request, candidates, now)
        matched = (prompt - uncached) / max(prompt, 1.0)
        result: Floats = -(2.0 * queue + 2.0 * free + 3.0 * matched)
        return result


def _or_nothing(metric: Floats) -> Floats:
    """A metric that engines do not publish is 0 everywhere. Where just one pod's is missing it stays unknown: as 0 it
    would make that pod the best of all."""
    return np.zeros(len(metric)) if np.isnan(metric).all() else metric
