"""The simulated pod's metrics page beside pages that a real vLLM 0.32 served."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from bench.engine import Engine, EngineParams, EngineRequest
from bench.pod_metrics import AdapterCounts, HttpStats, MetricsPage

CAPTURES = Path(__file__).parents[1] / "fixtures" / "vllm-0.32"
PAGES = [("metrics-after-4-requests.txt", 2048), ("metrics-after-evictions.txt", 1024)]

Shape = tuple[str, tuple[tuple[str, str], ...]]


def engine(max_model_len: int = 1024) -> Engine:
    return Engine(
        EngineParams(
            step_seconds=0.01,
            prefill_token_seconds=0.001,
            decode_request_seconds=0.0,
            kv_token_seconds=0.0,
            num_blocks=64,
            block_tokens=32,
            max_model_len=max_model_len,
        )
    )


def page(model: Engine, adapters: AdapterCounts | None = None) -> str:
    http = HttpStats()
    http.count("/v1/models", "GET", 200, 0, 442, 0.001)
    http.count("/v1/completions", "POST", 200, 300, 600, 0.3)
    return MetricsPage(model, "tiny", http, adapters=adapters).render().decode()


def families(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def shapes(metrics: Iterable[Metric]) -> Iterator[Shape]:
    """Every sample by name and labels; where label values are the engine's own affair, by label names."""
    for metric in metrics:
        fixed = metric.name.startswith("vllm:") and metric.name != "vllm:cache_config_info"
        for sample in metric.samples:
            yield (
                sample.name,
                tuple(sorted((k, v if fixed or k == "le" else "") for k, v in sample.labels.items())),
            )


@pytest.mark.parametrize(("name", "max_model_len"), PAGES)
def test_same_families_types_help_and_samples_as_vllm(name: str, max_model_len: int) -> None:
    theirs = families((CAPTURES / name).read_text())
    ours = families(page(engine(max_model_len)))
    assert [(m.name, m.type, m.documentation) for m in ours] == [(m.name, m.type, m.documentation) for m in theirs]
    assert set(shapes(ours)) == set(shapes(theirs))


@pytest.mark.parametrize(("name", "max_model_len"), PAGES)
def test_same_lines_in_the_same_order(name: str, max_model_len: int) -> None:
    """What the parser does not show: raw HELP and TYPE lines, order of samples and of labels."""

    def lines(text: str) -> list[str]:
        kept = []
        for line in text.splitlines():
            if line.startswith("#"):
                kept.append(line)
            elif line.startswith("vllm:") and not line.startswith("vllm:cache_config_info"):
                kept.append(line.rsplit(" ", 1)[0])
        return kept

    assert lines(page(engine(max_model_len))) == lines((CAPTURES / name).read_text())


def value(text: str, sample_name: str, **labels: str) -> float:
    found = [
        sample.value
        for metric in families(text)
        for sample in metric.samples
        if sample.name == sample_name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (sample_name, labels, found)
    return float(found[0])


def test_values_are_the_engines() -> None:
    model = engine()
    for k in range(3):
        model.submit(EngineRequest(100, 11, [1, 2, 3], max_tokens=20 if k == 2 else 11), k * 10.0)
        model.advance((k + 1) * 10.0)
    model.submit(EngineRequest(100, 50, [1, 2, 3]), 30.0)
    model.advance(30.05)
    text = page(model)
    assert value(text, "vllm:num_requests_running") == 1
    assert value(text, "vllm:num_requests_waiting") == 0
    assert value(text, "vllm:kv_cache_usage_perc") == pytest.approx(4 / 64)
    assert value(text, "vllm:prefix_cache_queries_total") == 400
    assert value(text, "vllm:prefix_cache_hits_total") == 3 * 96
    assert value(text, "vllm:prompt_tokens_by_source_total", source="local_compute") == 400 - 3 * 96
    assert value(text, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 3 * 96
    assert value(text, "vllm:request_success_total", finished_reason="length") == 2
    assert value(text, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(text, "vllm:time_to_first_token_seconds_count") == 4
    assert value(text, "vllm:time_to_first_token_seconds_sum") == pytest.approx(0.11 + 3 * 0.014)
    assert value(text, "vllm:time_to_first_token_seconds_bucket", le="0.01") == 0
    assert value(text, "vllm:time_to_first_token_seconds_bucket", le="0.02") == 3
    assert value(text, "vllm:time_to_first_token_seconds_bucket", le="+Inf") == 4
    assert value(text, "vllm:request_decode_time_seconds_sum") == pytest.approx(3 * 10 * 0.01)
    assert value(text, "vllm:request_params_n_bucket", le="1.0") == 3
    assert value(text, "vllm:request_prefill_kv_computed_tokens_sum") == 100 + 4 + 4


def test_page_follows_the_engine() -> None:
    model = engine()
    rendered = MetricsPage(model, "tiny", HttpStats())
    before = rendered.render().decode()
    model.submit(EngineRequest(10, 1), 0.0)
    model.advance(1.0)
    after = rendered.render().decode()
    assert value(before, "vllm:generation_tokens_total") == 0
    assert value(after, "vllm:generation_tokens_total") == 1


def test_model_names_are_escaped() -> None:
    name = 'odd "name" \\ 100%'
    text = MetricsPage(engine(), name, HttpStats()).render().decode()
    metric = next(m for m in families(text) if m.name == "vllm:num_requests_running")
    assert metric.samples[0].labels["model_name"] == name


def test_large_numbers_are_written_as_prometheus_writes_them() -> None:
    model = engine()
    model.stats.prompt_tokens = 12_345_678
    assert 'vllm:prompt_tokens_total{engine="0",model_name="tiny"} 1.2345678e+07\n' in page(model)


def test_adapters_are_told_only_where_there_are_any() -> None:
    assert "lora_requests_info" not in page(engine())
    adapters = AdapterCounts(2)
    adapters.add("french", 1)
    adapters.add("german 100%", 2)
    adapters.add("french", -1)
    text = page(engine(), adapters)
    metric = next(m for m in families(text) if m.name == "vllm:lora_requests_info")
    assert metric.samples[0].labels == {
        "max_lora": "2",
        "running_lora_adapters": "german 100%",
        "waiting_lora_adapters": "",
    }
