"""The pod with the emptiest KV cache, under AIBrix's two names for it."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Scoring
from state.pods import Floats

ASSUMED_ROOM_TOKENS = 250_000.0
"""What a KV cache is taken to hold where the engine does not say: a 70B model's on two 80 GB GPUs, say."""


def sent_share(candidates: Candidates) -> Floats:
    """The prompts sent since the last poll, as a share of what the GPU's KV cache holds."""
    room = candidates.metric("num_gpu_blocks") * candidates.metric("block_size")
    result: Floats = candidates.tokens_since_sample() / np.where(room > 0, room, ASSUMED_ROOM_TOKENS)
    return result


def gpu_share(candidates: Candidates) -> Floats:
    """Share of the GPU's KV blocks in use, 0..1: as last published, plus the prompts sent since then."""
    result: Floats = candidates.metric("kv_usage") + sent_share(candidates)
    return result


class LeastGpuCache(Scoring):
    """score = share of GPU KV blocks in use + tokens sent since the last poll / tokens the cache holds. [0..1]

    vLLM publishes the share as `kv_cache_usage_perc` (before 0.10 `gpu_cache_usage_perc`), SGLang as `token_usage`,
    TensorRT-LLM as `kv_cache_utilization`.
    """

    name: ClassVar[str] = "least-gpu-cache"

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """GPU cache share."""
        return gpu_share(candidates)


class LeastKvCache(LeastGpuCache):
    """score = the same as least-gpu-cache. [0..1]

    AIBrix adds the share of host KV blocks in use, and falls back to random where an engine does not publish it, which
    is on all current ones; here the GPU's share alone decides.
    """

    name: ClassVar[str] = "least-kv-cache"
