"""NVIDIA Dynamo's KV router, as published: a yardstick."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.prefix_aware import PrefixAware
from state.pods import Floats

BLOCK_TOKENS = 64.0


class DynamoKv(PrefixAware):
    """cost = prefill blocks under way + this prompt's uncached blocks + decode blocks. [blocks of 64 tokens]

    In its own terms: 1.0 * max(active prefill + prompt - overlap, 0) + (active blocks + prompt blocks), with overlap
    credit 1.0 for blocks on the device and temperature 0. Active prefill is held until the first token; here it is the
    shared backlog. Source: ai-dynamo 1.6.1, docs and lib/llm/src/kv_router (2026-08).
    """

    name: ClassVar[str] = "dynamo-kv"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Blocks of work."""
        prompt, uncached = self.prompt_and_uncached(request, candidates, now)
        prefill = self.to_prefill(candidates, now) + uncached
        result: Floats = (prefill + (candidates.tokens() + prompt)) / BLOCK_TOKENS
        return np.maximum(result, 0.0)
