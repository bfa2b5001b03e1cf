"""The shared tables as Prometheus metrics: read when somebody asks, no matter how busy the workers are."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from platform import python_version

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from state.ledger import Entry
from state.pods import COLUMN, Health
from state.roster import Kind, Phase, Process
from state.series import DECISION_BUCKETS, OVERFLOW, PREFILL_BUCKETS, merge, pod_of
from state.tables import REPLICATOR, Tables
from workers.compiled import is_compiled

_COUNTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "decisions": ("pointsman_decisions", "Requests routed", ("model", "pod", "strategy")),
    "refused": ("pointsman_refused", "Requests answered by the router itself", ("status", "code")),
    "finished": ("pointsman_finished", "Requests that ended, by the status the client got", ("pod", "status")),
    "exchanges": ("pointsman_exchanges", "Exchanges with other replicas through Redis", ("result",)),
    "prompts": ("pointsman_shared_prompts", "Prompts exchanged between replicas", ("what",)),
    "foreign": ("pointsman_foreign_log_entries", "Log entries for requests that another replica routed", ()),
    "retried": ("pointsman_retried", "Requests that Envoy sent to another pod after the first failed", ("pod",)),
    "used_tokens": (
        "pointsman_used_tokens",
        "Tokens of answered requests, as responses report them",
        ("model", "kind"),
    ),
    "limits_outage": ("pointsman_limits_outage", "Requests whose limits could not be checked", ("policy",)),
    "fallbacks": ("pointsman_strategy_fallbacks", "Decisions a strategy could not base on its metric", ("strategy",)),
    "prefills": ("pointsman_prefills", "Prompts sent to pods that only prefill (strategy pd)", ("result",)),
    "undivided": ("pointsman_undivided", "Requests of pd that went whole to a decode pod", ("reason",)),
    "polls": ("pointsman_scrapes", "Polls of the pods' metrics", ("pod", "result")),
    "page_cpu_seconds": ("pointsman_scrape_cpu_seconds", "CPU time spent reading metrics pages", ()),
    "ejections": ("pointsman_ejections", "Times a pod was left out because its answers failed", ("pod",)),
    "settled": ("pointsman_settled_requests", "In-flight counts corrected against the engine's own", ("pod",)),
    "restarts": ("pointsman_restarts", "Processes restarted after they ended unexpectedly", ("process",)),
    "transport": ("pointsman_transport_events", "Transport events", ("event",)),
}
"""Series name: metric, help, labels."""

_HISTOGRAMS = (
    ("decision_seconds", "Time from a parsed request to the chosen pod", DECISION_BUCKETS),
    ("prefill_seconds", "Time from sending a prompt to a pod that only prefills to its answer", PREFILL_BUCKETS),
)

_POD_GAUGES = (
    ("running", "requests the engine runs"),
    ("waiting", "requests the engine has queued"),
    ("kv_usage", "share of the engine's KV blocks in use"),
    ("hit_ratio", "prefix cache hits per query, in tokens, recent"),
    ("busy_ratio", "share of recent time with a request running"),
    ("prompt_tokens_per_second", "prompt tokens the engine took, recent"),
    ("generation_tokens_per_second", "tokens the engine generated, recent"),
    ("ttft_mean_seconds", "mean time to first token, recent"),
    ("itl_mean_seconds", "mean time between tokens, recent"),
)


class TablesCollector(Collector):
    """Everything in the shared tables."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def collect(self) -> Iterable[Metric]:
        """Called by prometheus_client for each scrape of ours."""
        merged = merge(self._tables.all_series())
        version, document = self._tables.catalog.read()
        if version:
            # Of pods that are gone nothing is told: their rows are given back by one process after the other.
            pods = {pod.name for pod in document.pods}
            merged = {labels: value for labels, value in merged.items() if not (pod := pod_of(labels)) or pod in pods}
        yield from _counters({**self._zeros(), **merged})
        for name, text, bounds in _HISTOGRAMS:
            yield _histogram(merged, name, text, bounds)
        yield from self._gauges(merged)
        yield from self._pods()
        yield from self._processes()

    def _zeros(self) -> dict[tuple[str, ...], float]:
        """Counters whose first event matters: increase() only sees it if they were there before."""
        _, document = self._tables.catalog.read()
        names = {_name(process) for process in self._tables.roster.processes()}
        return {
            ("foreign",): 0.0,
            ("page_cpu_seconds",): 0.0,
            ("transport", "calls_crashed"): 0.0,
            **{("limits_outage", policy): 0.0 for policy in ("open", "closed")},
            **{("restarts", name): 0.0 for name in names},
            **{(name, pod.name): 0.0 for name in ("retried", "ejections", "settled") for pod in document.pods},
        }

    @staticmethod
    def _gauges(merged: dict[tuple[str, ...], float]) -> Iterator[Metric]:
        levels = GaugeMetricFamily("pointsman_transport_level", "What the transport has open", labels=("what",))
        for labels, value in merged.items():
            if labels[0] == "transport_level":
                levels.add_metric(labels[1:], value)
        yield levels
        replicas = GaugeMetricFamily("pointsman_replicas_heard", "Other replicas that report what they have in flight")
        replicas.add_metric((), merged.get(("replicas",), 0.0))
        yield replicas
        usable = GaugeMetricFamily(
            "pointsman_discovery_usable", "1 where the source of pods can be used, 0 where they are those of before"
        )
        if ("discovery_usable",) in merged:
            usable.add_metric((), merged["discovery_usable",])
        yield usable
        modes = GaugeMetricFamily(
            "pointsman_strategy_mode",
            "Workers whose last marginal-delay decision used this mode",
            labels=("model", "mode"),
        )
        for labels, value in merged.items():
            if labels[0] == "mode":
                modes.add_metric(labels[1:], value)
        yield modes
        forgotten = GaugeMetricFamily(
            "pointsman_prefix_forgotten_ratio",
            "Of what pods hold and prompts went on from, what the fullest prefix index had no room for",
        )
        shares = (value for labels, value in merged.items() if labels[0] == "prefix_forgotten")
        forgotten.add_metric((), max(shares, default=0.0))
        yield forgotten

    def _pods(self) -> Iterator[Metric]:
        tables = self._tables
        _, document = tables.catalog.read()
        _, rows = tables.pods.snapshot()
        now = time.monotonic()
        in_flight = GaugeMetricFamily(
            "pointsman_in_flight", "Requests in flight, as the router counts them", labels=("pod",)
        )
        elsewhere = GaugeMetricFamily(
            "pointsman_in_flight_elsewhere", "Requests in flight, as other replicas report them", labels=("pod",)
        )
        age = GaugeMetricFamily("pointsman_scrape_age_seconds", "Age of the last good poll", labels=("pod",))
        health = GaugeMetricFamily("pointsman_pod_health", "1 for the pod's state", labels=("pod", "state"))
        engine = {
            name: GaugeMetricFamily(f"pointsman_pod_{name}", f"As the engine reports it: {text}", labels=("pod",))
            for name, text in _POD_GAUGES
        }
        requests = tables.ledger.totals(Entry.REQUESTS, tables.pods.high)
        own = tables.ledger.of_this_replica(tables.pods.high, REPLICATOR)[0]
        for pod in document.pods:
            if pod.slot >= len(rows):
                continue
            row = rows[pod.slot]
            in_flight.add_metric((pod.name,), int(own[pod.slot]))
            elsewhere.add_metric((pod.name,), int(requests[pod.slot] - own[pod.slot]))
            if row[COLUMN["sampled_at"]] > 0:
                age.add_metric((pod.name,), now - row[COLUMN["sampled_at"]])
            state = "draining" if pod.draining else Health(int(row[COLUMN["health"]])).name.lower()
            health.add_metric((pod.name, state), 1)
            for name, family in engine.items():
                value = row[COLUMN[name]]
                if value == value:
                    family.add_metric((pod.name,), value)
        yield in_flight
        yield elsewhere
        yield age
        yield health
        yield from engine.values()

    def _processes(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "pointsman_build",
            "Build information",
            {
                "version": version("pointsman"),
                "python": python_version(),
                "hot_path": "compiled" if is_compiled() else "interpreted",
            },
        )
        up = GaugeMetricFamily("pointsman_process_up", "1 for a process that is ready", labels=("process",))
        ready: dict[str, float] = {}
        for process in self._tables.roster.processes():  # a worker and its successor are one
            name = _name(process)
            ready[name] = max(ready.get(name, 0.0), 1.0 if process.phase is Phase.READY else 0.0)
        for name, value in ready.items():
            up.add_metric((name,), value)
        yield up


def _name(process: Process) -> str:
    """As the supervisor calls it where it counts restarts, and the log."""
    kind = process.kind.name.lower()
    return f"{kind} {process.number}" if process.kind is Kind.WORKER else kind


def _counters(merged: dict[tuple[str, ...], float]) -> Iterator[Metric]:
    families: dict[str, CounterMetricFamily] = {
        name: CounterMetricFamily(metric, text, labels=labels) for name, (metric, text, labels) in _COUNTERS.items()
    }
    for labels, value in merged.items():
        family = families.get(labels[0])
        if family is None:
            continue
        wanted = len(_COUNTERS[labels[0]][2])
        given = labels[1:]
        if given == (OVERFLOW,):
            given = (OVERFLOW,) * wanted
        if len(given) == wanted:
            family.add_metric(given, value)
    yield from families.values()


def _histogram(merged: dict[tuple[str, ...], float], name: str, text: str, bounds: tuple[float, ...]) -> Metric:
    """Buckets are counted apart in the tables; Prometheus wants them added up."""
    buckets: dict[float, float] = defaultdict(float)
    total = 0.0
    for labels, value in merged.items():
        if labels[0] == name:
            if labels[1] == "sum":
                total += value
            elif labels[1] == "le":
                buckets[float(labels[2])] += value
    running = 0.0
    cumulative = []
    for bound in (*bounds, float("inf")):
        running += buckets[bound]
        cumulative.append(("+Inf" if bound == float("inf") else repr(bound), running))
    family = HistogramMetricFamily(f"pointsman_{name}", text)
    family.add_metric((), buckets=cumulative, sum_value=total)
    return family
