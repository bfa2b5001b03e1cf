"""Which metric families of each engine are wanted, and which quantity of ours each of them is.

A quantity has sources in order of preference: the first whose samples are on the page is taken and the others are
left alone, so that an engine which exports an old and a new name side by side is not counted twice. Names are
sample names as they stand on the page, so a counter's carries its `_total`.

Samples of one family are combined over all labels (data-parallel ranks, models, reasons) as the quantity's `Combine`
says. Two series that differ only in the labels of `Engine.same_work` describe the same work twice and one counts.

Taken from pages of vLLM 0.32 and the collectors of SGLang and TensorRT-LLM as of 2026, with the older vLLM names
that are still met; xLLM exports TensorRT-LLM's names and two of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

Labels = tuple[tuple[str, str], ...]


class Combine(Enum):
    """How the series of one family become one number."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Source:
    """Where on a page a quantity stands.

    `where`: only samples with these label values. `label`: the number is that label's value and not the sample's
    (information metrics such as `cache_config_info{block_size="16"} 1`).
    """

    name: str
    where: Labels = ()
    label: str = ""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single number. `quantity` is the attribute of `page.Sample` that it fills."""

    quantity: str
    combine: Combine
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram. Without `buckets` only its sum and count are read, which is all that a mean needs."""

    quantity: str
    names: tuple[str, ...]
    buckets: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine's page. `only` names the label values that count."""

    name: str
    path: str
    scalars: tuple[Scalar, ...]
    distributions: tuple[Distribution, ...]
    same_work: frozenset[str] = frozenset()
    only: Mapping[str, str] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)


def _sum(quantity: str, *names: str) -> Scalar:
    return Scalar(quantity, Combine.SUM, tuple(map(Source, names)))


def _mean(quantity: str, *names: str) -> Scalar:
    return Scalar(quantity, Combine.MEAN, tuple(map(Source, names)))


def _max(quantity: str, *names: str) -> Scalar:
    return Scalar(quantity, Combine.MAX, tuple(map(Source, names)))


def _where(quantity: str, name: str, label: str, value: str) -> Scalar:
    return Scalar(quantity, Combine.SUM, (Source(name, ((label, value),)),))


def _label(quantity: str, combine: Combine, name: str, label: str) -> Scalar:
    return Scalar(quantity, combine, (Source(name, (), label),))


def _finished(name: str) -> tuple[Scalar, ...]:
    label = "finished_reason"
    return tuple(_where(f"finished_{reason}", name, label, reason) for reason in ("stop", "length", "abort", "error"))


VLLM = Engine(
    name="vllm",
    path="/metrics",
    scalars=(
        _sum("running", "vllm:num_requests_running"),
        _sum("waiting", "vllm:num_requests_waiting"),
        _where("waiting_deferred", "vllm:num_requests_waiting_by_reason", "reason", "deferred"),
        _sum("swapped", "vllm:num_requests_swapped"),
        # 0.8 to 0.10 export both names; before them there is only the second.
        _mean("kv_usage", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        _sum("prompt_tokens", "vllm:prompt_tokens_total"),
        Scalar(
            "computed_prompt_tokens",
            Combine.SUM,
            (
                Source("vllm:prompt_tokens_by_source_total", (("source", "local_compute"),)),
                Source("vllm:request_prefill_kv_computed_tokens_sum"),
            ),
        ),
        _sum("generation_tokens", "vllm:generation_tokens_total"),
        _sum("prefix_queries", "vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
        _sum("prefix_hits", "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
        _mean("prefix_hit_ratio", "vllm:gpu_prefix_cache_hit_rate"),
        _sum("preemptions", "vllm:num_preemptions_total"),
        _sum("rejections", "vllm:admission_rejections_total"),
        _sum("finished", "vllm:request_success_total", "vllm:num_requests_success_total"),
        *_finished("vllm:request_success_total"),
        Scalar("awake", Combine.MEAN, (Source("vllm:engine_sleep_state", (("sleep_state", "awake"),)),)),
        _label("block_size", Combine.MAX, "vllm:cache_config_info", "block_size"),
        _label("num_gpu_blocks", Combine.SUM, "vllm:cache_config_info", "num_gpu_blocks"),
        _label("kv_cache_tokens", Combine.SUM, "vllm:cache_config_info", "kv_cache_size_tokens"),
        # Absent when several API servers share one page; the counters' own birth then tells a restart.
        _max("start_time_seconds", "process_start_time_seconds", "vllm:prompt_tokens_created"),
        _sum("prompt_throughput", "vllm:avg_prompt_throughput_toks_per_s"),
        _sum("generation_throughput", "vllm:avg_generation_throughput_toks_per_s"),
    ),
    distributions=(
        Distribution("ttft", ("vllm:time_to_first_token_seconds",), buckets=True),
        Distribution("itl", ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"), buckets=True),
        Distribution("e2e", ("vllm:e2e_request_latency_seconds",), buckets=True),
        Distribution("queue", ("vllm:request_queue_time_seconds",), buckets=True),
        Distribution("tpot", ("vllm:request_time_per_output_token_seconds",)),
        Distribution("prefill", ("vllm:request_prefill_time_seconds",)),
        Distribution("decode", ("vllm:request_decode_time_seconds",)),
        Distribution("inference", ("vllm:request_inference_time_seconds",)),
        Distribution("prompt_length", ("vllm:request_prompt_tokens",)),
        Distribution("generation_length", ("vllm:request_generation_tokens",)),
        Distribution("step_tokens", ("vllm:iteration_tokens_total",)),
    ),
)

SGLANG = Engine(
    name="sglang",
    path="/metrics",
    scalars=(
        _sum("running", "sglang:num_running_reqs"),
        _sum("waiting", "sglang:num_queue_reqs"),
        _sum("swapped", "sglang:num_retracted_reqs"),
        _mean("kv_usage", "sglang:token_usage"),
        # These counters move when a request finishes, not step by step.
        _sum("prompt_tokens", "sglang:prompt_tokens_total"),
        Scalar(
            "computed_prompt_tokens",
            Combine.SUM,
            (
                Source("sglang:realtime_tokens_total", (("mode", "prefill_compute"),)),
                Source("sglang:uncached_prompt_tokens_histogram_sum"),
            ),
        ),
        Scalar(
            "generation_tokens",
            Combine.SUM,
            (
                Source("sglang:realtime_tokens_total", (("mode", "decode"),)),
                Source("sglang:generation_tokens_total"),
            ),
        ),
        _sum("prefix_queries", "sglang:prompt_tokens_total"),
        _sum("prefix_hits", "sglang:cached_tokens_total"),
        _mean("prefix_hit_ratio", "sglang:cache_hit_rate"),
        _sum("preemptions", "sglang:num_retracted_requests_total"),
        _sum("finished", "sglang:num_requests_total"),
        _sum("finished_abort", "sglang:num_aborted_requests_total"),
        Scalar(
            "block_size",
            Combine.MAX,
            (Source("sglang:page_size"), Source("sglang:cache_config_info", (), "page_size")),
        ),
        Scalar(
            "num_gpu_blocks",
            Combine.SUM,
            (Source("sglang:num_pages"), Source("sglang:cache_config_info", (), "num_pages")),
        ),
        _sum("kv_cache_tokens", "sglang:max_total_num_tokens"),
        _max("start_time_seconds", "process_start_time_seconds"),
        _sum("generation_throughput", "sglang:gen_throughput"),
    ),
    distributions=(
        Distribution("ttft", ("sglang:time_to_first_token_seconds",), buckets=True),
        Distribution(
            "itl",
            ("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
            buckets=True,
        ),
        Distribution("e2e", ("sglang:e2e_request_latency_seconds",), buckets=True),
        Distribution("queue", ("sglang:queue_time_seconds",), buckets=True),
        Distribution("prompt_length", ("sglang:prompt_tokens_histogram",)),
        Distribution("generation_length", ("sglang:generation_tokens_histogram",)),
    ),
    # With --enable-metrics-for-all-schedulers every tensor-parallel rank reports the same requests; the ranks of
    # data-parallel attention differ in dp_rank as well.
    same_work=frozenset(("tp_rank", "pp_rank", "moe_ep_rank")),
    # With priority scheduling the total stands under priority="" beside its parts.
    only={"priority": ""},
)

TRTLLM = Engine(
    name="trtllm",
    path="/prometheus/metrics",
    scalars=(
        _sum("running", "trtllm_num_requests_running"),
        _sum("waiting", "trtllm_num_requests_waiting"),
        _sum("swapped", "trtllm_num_paused_requests"),
        _mean("kv_usage", "trtllm_kv_cache_utilization"),
        _sum("prompt_tokens", "trtllm_prompt_tokens_total"),
        _sum("generation_tokens", "trtllm_generation_tokens_total"),
        _sum("prefix_queries", "trtllm_prompt_tokens_total"),
        _sum("prefix_hits", "trtllm_prompt_cached_tokens_total"),
        _mean("prefix_hit_ratio", "trtllm_kv_cache_hit_rate"),
        _sum("finished", "trtllm_request_success_total"),
        *_finished("trtllm_request_success_total"),
        _max("block_size", "trtllm_kv_cache_tokens_per_block"),
        _sum("num_gpu_blocks", "trtllm_kv_cache_max_blocks"),
        _max("start_time_seconds", "process_start_time_seconds"),
    ),
    distributions=(
        Distribution("ttft", ("trtllm_time_to_first_token_seconds",), buckets=True),
        Distribution("itl", ("trtllm_time_per_output_token_seconds",), buckets=True),
        Distribution("e2e", ("trtllm_e2e_request_latency_seconds",), buckets=True),
        Distribution("queue", ("trtllm_request_queue_time_seconds",), buckets=True),
        Distribution("prefill", ("trtllm_request_prefill_time_seconds",)),
        Distribution("decode", ("trtllm_request_decode_time_seconds",)),
        Distribution("inference", ("trtllm_request_inference_time_seconds",)),
    ),
)

_XLLM_NAMES = {
    "kv_usage": ("kv_cache_utilization", "trtllm_kv_cache_utilization"),
    "utilization": ("engine_utilization",),
}

XLLM = Engine(
    name="xllm",
    path="/metrics",
    scalars=(
        *(scalar for scalar in TRTLLM.scalars if scalar.quantity not in _XLLM_NAMES),
        *(_mean(quantity, *names) for quantity, names in _XLLM_NAMES.items()),
    ),
    distributions=TRTLLM.distributions,
)

ENGINES: Mapping[str, Engine] = {
    "vllm": VLLM,
    "sglang": SGLANG,
    "trtllm": TRTLLM,
    "trtllm-serve": TRTLLM,
    "trt-llm": TRTLLM,
    "tensorrt-llm": TRTLLM,
    "xllm": XLLM,
    "xdit": VLLM,  # publishes little; what it does has vLLM's names
}
"""Engines by the name that a pod's label or a configuration file gives."""


def engine_named(name: str) -> Engine:
    """The engine of that name, in any case; an empty name is vLLM. Raises ValueError that lists the known names."""
    engine = ENGINES.get(name.strip().lower() or "vllm")
    if engine is None:
        raise ValueError(f"engine {name!r} is not known: use one of {', '.join(sorted(ENGINES))}")
    return engine
