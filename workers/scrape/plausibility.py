"""What numbers of an engine are plausible. The others count as not said.

A page may hold anything: +Inf after a division by zero, an uninitialised gauge, a counter that wrapped around. The
router works things out over all pods of a model, such as mean requests or how fast the fleet is, and there one pod's
infinite gauge would be everybody's: all scores NaN, all requests on one pod. So what no engine can truly say is left
out before anybody counts with it. All quantities here are 0 or more, and the bounds are far from what is.
"""

from collections.abc import Iterable, Sequence
from math import nan
from typing import Final

ANYTHING: Final = float(1 << 53)
"""Up to here a float counts by ones. A counter of tokens gets there in 285 years at a million a second."""
REQUESTS: Final = 100_000.0
"""On one pod at a time: 64 data-parallel ranks with vLLM's limit of 1024 come to 65,536."""
SHARE: Final = 2.0
"""Shares are 0 to 1; whoever adds them up may be a little above."""
BLOCK_TOKENS: Final = 65_536.0
"""In a KV block; the largest, of models with linear attention, have some thousands."""
CACHE_TOKENS: Final = 1e12
"""In a pod's KV cache, or its blocks: at 10 kB each they would fill 70,000 GPUs of 141 GB."""
REQUEST_TOKENS: Final = 1e7
"""In one request or step: the longest context there is has ten million."""
PER_SECOND: Final = 1e7
"""Tokens, requests or steps: 64 GPUs with 150,000 prompt tokens each."""
SECONDS: Final = 86_400.0
"""Of a request or a part of it: a day."""

_BOUNDS: Final = {
    **dict.fromkeys(("running", "waiting", "waiting_deferred", "swapped"), REQUESTS),
    **dict.fromkeys(("kv_usage", "utilization", "awake", "prefix_hit_ratio", "hit_ratio", "busy_ratio"), SHARE),
    **dict.fromkeys(("num_gpu_blocks", "kv_cache_tokens"), CACHE_TOKENS),
    **dict.fromkeys(("tokens_per_step", "prompt_tokens_mean", "generation_tokens_mean"), REQUEST_TOKENS),
    **dict.fromkeys(("prompt_throughput", "generation_throughput"), PER_SECOND),
    **dict.fromkeys(("start_time_seconds", "window_seconds", "observed_age_seconds"), ANYTHING),
    "block_size": BLOCK_TOKENS,
}


def bounds(names: Iterable[str]) -> tuple[float, ...]:
    """The most that is plausible of each of these, attributes of `page.Sample` or `window.EngineState`."""
    return tuple(_bound(name) for name in names)


def _bound(name: str) -> float:
    if name in _BOUNDS:
        return _BOUNDS[name]
    if name.endswith("_per_second"):
        return PER_SECOND
    return SECONDS if name.endswith("_seconds") else ANYTHING


def plausible(numbers: Sequence[float], most: Sequence[float]) -> list[float]:
    """The numbers, `math.nan` for each that is NaN, below 0 or above its bound."""
    return [number if 0.0 <= number <= bound else nan for number, bound in zip(numbers, most, strict=True)]
