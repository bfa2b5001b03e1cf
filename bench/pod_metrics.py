"""The `/metrics` page of a simulated pod: vLLM 0.32's families, labels, HELP and TYPE lines, in its order.

Everything but the values is put into one format string when the pod starts. Families that vLLM has and the
model knows nothing of (FLOPs, multi-modal cache, ...) stand at 0, as they do in a vLLM that does not use them.

Cost: 0.3 ms for a page of 50 KB; over HTTP see `python -m bench.pod_cost`.
"""

import gc
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from prometheus_client.utils import floatToGoString

from bench.engine import Engine, EngineParams
from bench.engine_stats import PICOSECONDS, Histogram

Labels = Mapping[str, str]
Values = Callable[[], Iterable[float]]

HTTP_DURATION_EDGES = (0.1, 0.5, 1.0)
# fmt: off
HTTP_DURATION_HIGHR_EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5,
                             5.0, 7.5, 10.0, 30.0, 60.0)
# fmt: on
_PARAMS_N_EDGES = (1, 2, 5, 10, 20)
_go_string: Callable[[float], str] = floatToGoString


def _number(value: float) -> str:
    return repr(float(value)) if value < 1_000_000 else _go_string(value)


def _sample(name: str, labels: Labels, value: str = "%s") -> str:
    if not labels:
        return f"{name} {value}"
    pairs = ",".join(f'{k}="{_escape(labels[k])}"' for k in sorted(labels))
    return f"{name}{{{pairs}}} {value}"


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"").replace("%", "%%")


class MetricsPage:
    """Reads the engine, `http` and `adapters` when it is rendered; bring the engine up to date first."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        http: "HttpStats",
        *,
        adapters: "AdapterCounts | None" = None,
        created: float | None = None,
    ) -> None:
        self._engine = engine
        self._http = http
        self._created = time.time() if created is None else created
        self._base = {"engine": "0", "model_name": model}
        self._lines: list[str] = []
        self._values: list[Values] = []
        self._write_process()
        self._write_engine(engine.params)
        if adapters is not None:
            self._family("vllm:lora_requests_info", "gauge", "Running stats on lora requests.")
            self._lines.append("%s")  # its labels are its values
        self._adapters = adapters
        self._format = "\n".join(self._lines) + "\n"

    def render(self) -> bytes:
        values = [_number(v) for v in chain.from_iterable(values() for values in self._values)]
        if self._adapters is not None:
            values.append(self._adapters.sample())
        return (self._format % tuple(values) + self._http.render()).encode()

    def _family(self, name: str, kind: str, text: str) -> None:
        text = text.replace("%", "%%")
        self._lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}")

    def _one(self, name: str, kind: str, text: str, value: Callable[[], float], labels: Labels | None = None) -> None:
        self._several(name, kind, text, [self._base if labels is None else labels], lambda: (value(),))

    def _several(self, name: str, kind: str, text: str, labels: Sequence[Labels], values: Values) -> None:
        """`values` gives one number per label set. A counter of vLLM has a `_created` gauge beside it."""
        self._family(name, kind, text)
        self._lines += (_sample(name, each) for each in labels)
        self._values.append(values)
        if kind == "counter" and name.startswith("vllm:"):
            self._write_created(name.removesuffix("_total"), text, labels)

    def _write_created(self, name: str, text: str, labels: Sequence[Labels]) -> None:
        self._family(f"{name}_created", "gauge", text)
        at = _go_string(self._created)
        self._lines += (_sample(f"{name}_created", each, at) for each in labels)

    def _histogram(self, name: str, text: str, histogram: Histogram, unit: int = 1) -> None:
        def values() -> Iterator[float]:
            cumulative = histogram.cumulative()
            yield from cumulative
            yield cumulative[-1]
            yield histogram.total / unit

        self._write_histogram(name, text, [edge / unit for edge in histogram.edges], values)

    def _write_histogram(self, name: str, text: str, edges: Sequence[float], values: Values) -> None:
        self._family(name, "histogram", text)
        for edge in (*map(_number, edges), "+Inf"):
            self._lines.append(_sample(f"{name}_bucket", {**self._base, "le": edge}))
        self._lines += (_sample(f"{name}_count", self._base), _sample(f"{name}_sum", self._base))
        self._values.append(values)
        self._write_created(name, text, [self._base])

    def _write_process(self) -> None:
        generations = [{"generation": str(g)} for g in range(3)]
        for name, text, key in (
            ("python_gc_objects_collected_total", "Objects collected during gc", "collected"),
            ("python_gc_objects_uncollectable_total", "Uncollectable objects found during GC", "uncollectable"),
            ("python_gc_collections_total", "Number of times this generation was collected", "collections"),
        ):
            self._several(name, "counter", text, generations, lambda key=key: [g[key] for g in gc.get_stats()])  # type: ignore[misc]
        version = platform.python_version_tuple()
        info = {
            "implementation": platform.python_implementation(),
            "major": version[0],
            "minor": version[1],
            "patchlevel": version[2],
            "version": platform.python_version(),
        }
        self._one("python_info", "gauge", "Python platform information", lambda: 1, info)
        process = _Process()
        for name, kind, text in (
            ("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes."),
            ("process_resident_memory_bytes", "gauge", "Resident memory size in bytes."),
            ("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds."),
            ("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds."),
            ("process_open_fds", "gauge", "Number of open file descriptors."),
            ("process_max_fds", "gauge", "Maximum number of open file descriptors."),
        ):
            self._family(name, kind, text)
            self._lines.append(_sample(name, {}))
        self._values.append(process.read)

    def _write_engine(self, params: EngineParams) -> None:
        engine, s, one, base = self._engine, self._engine.stats, self._one, self._base

        def none() -> int:
            return 0

        def split(label: str, *values: str) -> list[dict[str, str]]:
            return [{**base, label: value} for value in values]

        for name, what in (
            ("flops", "floating point operations per GPU"),
            ("read_bytes", "bytes read from memory per GPU"),
            ("write_bytes", "bytes written to memory per GPU"),
        ):
            text = f"Estimated number of {what} (for Model Flops Utilization calculations)."
            one(f"vllm:estimated_{name}_per_gpu_total", "counter", text, none)
        one(
            "vllm:num_requests_running",
            "gauge",
            "Number of requests in model execution batches.",
            lambda: engine.running,
        )
        one("vllm:num_requests_waiting", "gauge", "Number of requests waiting to be processed.", lambda: engine.waiting)
        self._several(
            "vllm:num_requests_waiting_by_reason",
            "gauge",
            "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; "
            "'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of all "
            "reasons equals vllm:num_requests_waiting.",
            split("reason", "capacity", "deferred"),
            lambda: (engine.waiting, 0),
        )
        self._several(
            "vllm:engine_sleep_state",
            "gauge",
            "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; "
            "weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
            split("sleep_state", "awake", "weights_offloaded", "discard_all"),
            lambda: (1, 0, 0),
        )
        one("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", lambda: engine.kv_usage)
        queries, hits = "of queried tokens.", "of cached tokens."
        external = "from KV connector cross-instance cache sharing, in terms of number"
        for name, text, value in (
            (
                "prefix_cache_queries",
                f"Prefix cache queries, in terms of number {queries}",
                lambda: s.prefix_queries_tokens,
            ),
            ("prefix_cache_hits", f"Prefix cache hits, in terms of number {hits}", lambda: s.prefix_hits_tokens),
            ("external_prefix_cache_queries", f"External prefix cache queries {external} {queries}", none),
            ("external_prefix_cache_hits", f"External prefix cache hits {external} {hits}", none),
            ("mm_cache_queries", "Multi-modal cache queries, in terms of number of queried items.", none),
            ("mm_cache_hits", "Multi-modal cache hits, in terms of number of cached items.", none),
            ("num_preemptions", "Cumulative number of preemption from the engine.", lambda: s.preemptions),
            ("prompt_tokens", "Number of prefill tokens processed.", lambda: s.prompt_tokens),
        ):
            one(f"vllm:{name}_total", "counter", text, value)
        self._several(
            "vllm:prompt_tokens_by_source_total",
            "counter",
            "Number of prompt tokens by source.",
            split("source", "local_compute", "local_cache_hit", "external_kv_transfer"),
            lambda: (s.prompt_tokens - s.prompt_tokens_cached, s.prompt_tokens_cached, 0),
        )
        one(
            "vllm:prompt_tokens_cached_total",
            "counter",
            "Number of cached prompt tokens (local + external).",
            lambda: s.prompt_tokens_cached,
        )
        self._several(
            "vllm:prompt_tokens_cached_by_source_total",
            "counter",
            "Prefix-cache hit tokens by the cache tier that supplied them: device (local HBM), host (offloaded to "
            "DRAM), disk, p2p (transferred from another vLLM instance) or external_unspecified. Counted at admission; "
            "sums to vllm:prefix_cache_hits + vllm:external_prefix_cache_hits.",
            split("source", "device", "host", "p2p", "disk", "external_unspecified"),
            lambda: (s.prefix_hits_tokens, 0, 0, 0, 0),
        )
        one(
            "vllm:generation_tokens_total",
            "counter",
            "Number of generation tokens processed.",
            lambda: s.generation_tokens,
        )
        self._several(
            "vllm:request_success_total",
            "counter",
            "Count of successfully processed requests.",
            split("finished_reason", "stop", "length", "abort", "error", "repetition"),
            lambda: (s.finished_stop, s.finished_length, s.aborted, 0, 0),
        )
        self._several(
            "vllm:admission_rejections_total",
            "counter",
            "Number of admission attempts rejected by a queue limit, by reason.",
            [
                {"model_name": base["model_name"], "reason": reason}
                for reason in ("max_num_queued_reqs", "max_num_queued_tokens")
            ],
            lambda: (0, 0),
        )
        self._histogram("vllm:request_prompt_tokens", "Number of prefill tokens processed.", s.request_prompt_tokens)
        self._histogram(
            "vllm:request_generation_tokens", "Number of generation tokens processed.", s.request_generation_tokens
        )
        self._histogram(
            "vllm:iteration_tokens_total", "Histogram of number of tokens per engine_step.", s.iteration_tokens
        )
        self._histogram(
            "vllm:request_max_num_generation_tokens",
            "Histogram of maximum number of requested generation tokens.",
            s.request_generation_tokens,
        )

        def params_n() -> list[int]:  # each choice is a request of its own here
            return [s.finished_stop + s.finished_length] * (len(_PARAMS_N_EDGES) + 3)

        self._write_histogram(
            "vllm:request_params_n", "Histogram of the n request parameter.", _PARAMS_N_EDGES, params_n
        )
        self._histogram(
            "vllm:request_params_max_tokens",
            "Histogram of the max_tokens request parameter.",
            s.request_max_tokens,
        )
        for name, text, histogram in (
            ("time_to_first_token_seconds", "time to first token in seconds", s.time_to_first_token),
            ("inter_token_latency_seconds", "inter-token latency in seconds", s.inter_token_latency),
            (
                "request_time_per_output_token_seconds",
                "time_per_output_token_seconds per request",
                s.time_per_output_token,
            ),
            ("e2e_request_latency_seconds", "e2e request latency in seconds", s.e2e_latency),
            ("request_queue_time_seconds", "time spent in WAITING phase for request", s.queue_time),
            ("request_inference_time_seconds", "time spent in RUNNING phase for request", s.inference_time),
            ("request_prefill_time_seconds", "time spent in PREFILL phase for request", s.prefill_time),
            ("request_decode_time_seconds", "time spent in DECODE phase for request", s.decode_time),
        ):
            self._histogram(f"vllm:{name}", f"Histogram of {text}.", histogram, PICOSECONDS)
        self._histogram(
            "vllm:request_num_preemptions",
            "Histogram of the number of times a request was preempted.",
            s.request_preemptions,
        )
        self._histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
            s.request_computed_tokens,
        )
        info = _cache_config(params)
        one("vllm:cache_config_info", "gauge", "Information of the LLMEngine CacheConfig", lambda: 1, info)


def _cache_config(params: EngineParams) -> dict[str, str]:
    tokens = params.num_blocks * params.block_tokens
    block = str(params.block_tokens)
    return {
        "_block_size_resolved": "True",
        "block_size": block,
        "cache_dtype": "auto",
        "cache_hit_alignment_tokens": "None",
        "effective_attention_block_size": block,
        "enable_mamba_shared_prefix_checkpoint": "False",
        "enable_prefix_caching": "True",
        "engine": "0",
        "gpu_memory_utilization": "0.9",
        "hash_block_size": "None",
        "is_attention_free": "False",
        "kv_cache_dtype_skip_layers": "[]",
        "kv_cache_layout": "None",
        "kv_cache_max_concurrency": str(round(tokens / params.max_model_len, 2)),
        "kv_cache_memory_bytes": "None",
        "kv_cache_size_tokens": str(tokens),
        "kv_offloading_backend": "native",
        "kv_offloading_size": "None",
        "kv_sharing_fast_prefill": "False",
        "mamba_block_size": "None",
        "mamba_cache_dtype": "auto",
        "mamba_cache_mode": "none",
        "mamba_page_size_padded": "None",
        "mamba_ssm_cache_dtype": "auto",
        "num_cpu_blocks": "None",
        "num_gpu_blocks": str(params.num_blocks),
        "num_gpu_blocks_override": "None",
        "prefix_cache_retention_interval": "0",
        "prefix_caching_hash_algo": "xxhash",
        "prefix_match_unit": "None",
        "replayssm_buffer_len": "16",
        "skip_page_size_padded": "None",
        "sliding_window": "None",
        "swa_bounded_replay": "True",
        "use_kda_recoverssm": "False",
        "use_replayssm": "False",
        "user_specified_block_size": "True",
    }


class _Process:
    def __init__(self) -> None:
        self._started = time.time()
        self._page = os.sysconf("SC_PAGE_SIZE")

    def read(self) -> tuple[float, ...]:
        virtual, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
        fds = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        limit = os.sysconf("SC_OPEN_MAX")
        return virtual * self._page, resident * self._page, self._started, time.process_time(), fds, limit


class AdapterCounts:
    """Which LoRA adapters have requests in the engine, as `vllm:lora_requests_info` tells it."""

    def __init__(self, max_lora: int) -> None:
        self._max_lora = str(max_lora)
        self.open: dict[str, int] = {}

    def add(self, adapter: str, requests: int) -> None:
        count = self.open.get(adapter, 0) + requests
        if count:
            self.open[adapter] = count
        else:
            del self.open[adapter]

    def sample(self) -> str:
        labels = {
            "max_lora": self._max_lora,
            "running_lora_adapters": ",".join(self.open),
            "waiting_lora_adapters": "",
        }
        return _sample("vllm:lora_requests_info", labels, _go_string(time.time())).replace("%%", "%")


class HttpStats:
    """What vLLM's web server counts of its own accord: requests by handler, method and status, sizes, durations."""

    def __init__(self) -> None:
        self._started = _go_string(time.time())
        self._requests: dict[tuple[str, str, str], int] = {}
        self._sizes: dict[str, list[int]] = {}  # handler: requests, bytes in, bytes out
        self._durations: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        self._highr = [0] * (len(HTTP_DURATION_HIGHR_EDGES) + 1)
        self._highr_sum = 0.0

    def count(self, handler: str, method: str, status: int, received: int, sent: int, seconds: float) -> None:
        key = (handler, method, f"{status // 100}xx")
        self._requests[key] = self._requests.get(key, 0) + 1
        sizes = self._sizes.setdefault(handler, [0, 0, 0])
        sizes[0] += 1
        sizes[1] += received
        sizes[2] += sent
        buckets, total = self._durations.setdefault((handler, method), ([0] * (len(HTTP_DURATION_EDGES) + 1), [0.0]))
        buckets[bisect_left(HTTP_DURATION_EDGES, seconds)] += 1
        total[0] += seconds
        self._highr[bisect_left(HTTP_DURATION_HIGHR_EDGES, seconds)] += 1
        self._highr_sum += seconds

    def render(self) -> str:
        lines: list[str] = []

        def family(name: str, kind: str, text: str) -> None:
            lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))

        def sample(name: str, labels: Labels, value: float) -> None:
            lines.append(_sample(name, labels, _number(value)))

        def created(name: str, text: str, labels: Iterable[Labels]) -> None:
            family(f"{name}_created", "gauge", text)
            lines.extend(_sample(f"{name}_created", each, self._started) for each in labels)

        def buckets(name: str, labels: Labels, edges: Sequence[float], counts: Sequence[int], total: float) -> None:
            seen = 0
            for edge, count in zip((*map(_number, edges), "+Inf"), counts, strict=True):
                seen += count
                sample(f"{name}_bucket", {**labels, "le": edge}, seen)
            sample(f"{name}_count", labels, seen)
            sample(f"{name}_sum", labels, total)

        text = "Total number of requests by method, status and handler."
        requests = [({"handler": h, "method": m, "status": s}, n) for (h, m, s), n in self._requests.items()]
        family("http_requests_total", "counter", text)
        for labels, n in requests:
            sample("http_requests_total", labels, n)
        created("http_requests", text, (labels for labels, _ in requests))
        for place, (name, direction) in enumerate(
            (("request", "incoming requests"), ("response", "outgoing responses"))
        ):
            name = f"http_{name}_size_bytes"
            text = (
                f"Content length of {direction} by handler. Only value of header is respected. Otherwise ignored."
                " No percentile calculated. "
            )
            family(name, "summary", text)
            for handler, sizes in self._sizes.items():
                sample(f"{name}_count", {"handler": handler}, sizes[0])
                sample(f"{name}_sum", {"handler": handler}, sizes[1 + place])
            created(name, text, ({"handler": handler} for handler in self._sizes))
        name = "http_request_duration_highr_seconds"
        text = "Latency with many buckets but no API specific labels. Made for more accurate percentile calculations. "
        family(name, "histogram", text)
        buckets(name, {}, HTTP_DURATION_HIGHR_EDGES, self._highr, self._highr_sum)
        created(name, text, [{}])
        name = "http_request_duration_seconds"
        text = "Latency with only few buckets by handler. Made to be only used if aggregation by handler is important. "
        family(name, "histogram", text)
        for (handler, method), (counts, total) in self._durations.items():
            buckets(name, {"handler": handler, "method": method}, HTTP_DURATION_EDGES, counts, total[0])
        created(name, text, ({"handler": h, "method": m} for h, m in self._durations))
        return "\n".join(lines) + "\n"
