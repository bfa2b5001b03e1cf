"""The presets against what their file says of them."""

import pytest

from bench.engine import Engine, EngineParams, EngineRequest
from bench.engine_presets import PRESETS


def between_tokens(params: EngineParams, requests: int) -> float:
    """With 300 tokens of context on average."""
    engine = Engine(params)
    batch = [EngineRequest(100, 400) for _ in range(requests)]
    for request in batch:
        engine.submit(request, 0.0)
    while (at := engine.next_event()) is not None:
        engine.advance(at)
    return batch[-1].mean_itl_seconds


def test_time_between_tokens_is_near_what_nvidia_publishes() -> None:
    params = PRESETS["h100-llama-3.1-8b"]
    alone, crowded = between_tokens(params, 1), between_tokens(params, 250)
    assert alone == pytest.approx(0.0070, rel=0.01)
    assert crowded == pytest.approx(0.0174, rel=0.01)
    assert 0.6 < 0.0046 / alone < 1.1
    assert 0.6 < 0.0161 / crowded < 1.1


def test_cache_sizes_are_those_of_an_80_gb_gpu() -> None:
    tokens = {name: p.num_blocks * p.block_tokens for name, p in PRESETS.items()}
    assert tokens["h100-llama-3.1-8b"] == pytest.approx(396_000, rel=0.01)
    assert tokens["a100-qwen-2.5-14b"] == pytest.approx(196_000, rel=0.01)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_longest_request_fits(name: str) -> None:
    params = PRESETS[name]
    engine = Engine(params)
    request = EngineRequest(params.max_model_len - 10, 10)
    engine.submit(request, 0.0)
    engine.advance(1000.0)
    assert request.finished > 0
