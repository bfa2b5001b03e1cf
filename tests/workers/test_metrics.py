"""What /metrics says of the shared tables."""

import time
from pathlib import Path

import fleet
import pytest
from fleet import SMALL, make_fleet, make_record, make_tables, set_row
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from state.catalog import CatalogDocument
from state.pods import Health
from state.roster import Kind, Phase, Process
from state.series import DECISION_BUCKETS, OVERFLOW, Histogram
from state.tables import SCRAPER, Capacity, Tables
from workers.config import load
from workers.metrics import TablesCollector
from workers.scraper import Scraper

Labels = tuple[tuple[str, str], ...]


def page(tables: Tables) -> str:
    registry = CollectorRegistry()
    registry.register(TablesCollector(tables))
    return generate_latest(registry).decode()


def families(tables: Tables) -> dict[str, Metric]:
    text = page(tables)
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples)), "a sample is there twice"
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(tables: Tables, name: str) -> dict[Labels, float]:
    """Samples of one family, by their labels."""
    return {tuple(sorted(sample.labels.items())): sample.value for sample in families(tables)[name].samples}


def test_every_family_is_there_before_anything_happened() -> None:
    assert set(families(make_tables())) >= {
        f"pointsman_{name}"
        for name in (
            "decisions", "refused", "finished", "strategy_fallbacks", "scrapes", "scrape_cpu_seconds", "ejections",
            "settled_requests", "restarts", "transport_events", "decision_seconds", "in_flight", "scrape_age_seconds",
            "pod_health", "pod_running", "pod_waiting", "pod_kv_usage", "process_up",
        )
    }  # fmt: skip


def test_counters_are_added_up_over_all_processes() -> None:
    tables = make_tables()
    for writer in (3, 4, 5):
        tables.series(writer).add(2.0, "decisions", "m", "pod-0", "random")
    tables.series(3).add(1.0, "decisions", "m", "pod-1", "random")
    tables.series(4).add(1.0, "refused", "400", "none")
    tables.series(0).add(3.0, "restarts", "worker 1")
    tables.series(1).add(0.5, "page_cpu_seconds")
    tables.series(3).add(4.0, "fallbacks", "throughput")
    assert values(tables, "pointsman_decisions") == {
        (("model", "m"), ("pod", "pod-0"), ("strategy", "random")): 6.0,
        (("model", "m"), ("pod", "pod-1"), ("strategy", "random")): 1.0,
    }
    assert values(tables, "pointsman_refused") == {(("code", "none"), ("status", "400")): 1.0}
    assert values(tables, "pointsman_restarts") == {(("process", "worker 1"),): 3.0}
    assert values(tables, "pointsman_scrape_cpu_seconds") == {(): 0.5}
    assert values(tables, "pointsman_strategy_fallbacks") == {(("strategy", "throughput"),): 4.0}


def test_what_overflowed_is_still_in_the_total() -> None:
    tables = make_tables(Capacity(pods=4, writers=6, catalog_bytes=4096, series=40, prefix_ring_bytes=1 << 16))
    for number in range(100):
        tables.series(3).add(1.0, "polls", f"pod-{number}", "ok")
        tables.series(3).add(1.0, "decisions", "m", f"pod-{number}", "random")
    for name, labels in (("scrapes", ("pod", "result")), ("decisions", ("model", "pod", "strategy"))):
        found = values(tables, f"pointsman_{name}")
        assert sum(found.values()) == 100
        assert found[tuple((label, OVERFLOW) for label in labels)] > 50


@pytest.mark.parametrize("text", ['quo"te', "back\\slash", "ünïcode", "a" * 500, "{}=,"])
def test_label_values_of_any_kind_are_written_so_that_they_can_be_read(text: str) -> None:
    tables = make_tables()
    tables.series(3).add(1.0, "decisions", text, "pod", "random")
    ((labels, value),) = values(tables, "pointsman_decisions").items()
    assert value == 1.0
    assert text.startswith(dict(labels)["model"])


def test_the_histogram_is_cumulative_and_whole() -> None:
    tables = make_tables()
    observed = [0.000001, 0.00003, 0.00003, 0.004, 5.0]
    for writer, value in enumerate(observed):
        Histogram(tables.series(3 + writer % 2), "decision_seconds").observe(value)
    samples = families(tables)["pointsman_decision_seconds"].samples
    buckets = [(sample.labels["le"], sample.value) for sample in samples if sample.name.endswith("_bucket")]
    assert [float(bound) for bound, _ in buckets] == [*DECISION_BUCKETS, float("inf")]
    assert [count for _, count in buckets] == [sum(v <= float(bound) for v in observed) for bound, _ in buckets]
    (total,) = [sample.value for sample in samples if sample.name.endswith("_sum")]
    (count,) = [sample.value for sample in samples if sample.name.endswith("_count")]
    assert (total, count) == (pytest.approx(sum(observed)), 5)


def test_pods() -> None:
    tables = make_fleet(3)
    set_row(tables, 0, running=4.0, kv_usage=0.25, sampled_at=time.monotonic() - 2.0)
    set_row(tables, 1, Health.FAILED)
    tables.pods.claim(2, 99)
    tables.ledger.charge(0, 10, 10, held=True)
    tables.catalog.publish(
        CatalogDocument((make_record(0), make_record(1), make_record(2, generation=99, draining=True)))
    )
    assert values(tables, "pointsman_in_flight")[("pod", "pod-0"),] == 1
    assert values(tables, "pointsman_pod_running") == {(("pod", "pod-0"),): 4.0}
    assert values(tables, "pointsman_pod_kv_usage") == {(("pod", "pod-0"),): 0.25}
    assert {dict(labels)["pod"]: dict(labels)["state"] for labels in values(tables, "pointsman_pod_health")} == {
        "pod-0": "ready", "pod-1": "failed", "pod-2": "draining",
    }  # fmt: skip
    ages = values(tables, "pointsman_scrape_age_seconds")
    assert 2.0 <= ages[("pod", "pod-0"),] < 60
    assert (("pod", "pod-2"),) not in ages


def test_processes() -> None:
    tables = make_tables()
    tables.roster.put(1, Process(Kind.SCRAPER, 0, 10, Phase.READY, 0))
    tables.roster.put(3, Process(Kind.WORKER, 0, 11, Phase.DOWN, 1))
    assert values(tables, "pointsman_process_up") == {
        (("process", "scraper"),): 1.0,
        (("process", "worker 0"),): 0.0,
    }
    assert values(tables, "pointsman_restarts").keys() == values(tables, "pointsman_process_up").keys()


def test_a_worker_and_its_successor_are_one_sample() -> None:
    """In a rolling restart both are there."""
    tables = make_tables()
    tables.roster.put(3, Process(Kind.WORKER, 0, 11, Phase.READY, 0))
    tables.roster.put(4, Process(Kind.WORKER, 0, 12, Phase.STARTING, 0))
    tables.roster.put(5, Process(Kind.WORKER, 0, 13, Phase.DRAINING, 0))
    assert values(tables, "pointsman_process_up") == {(("process", "worker 0"),): 1.0}


def test_a_row_whose_writer_died_half_way_reads_as_unseen() -> None:
    tables = make_fleet(1)
    tables.pods._sequence[0] += 1
    assert values(tables, "pointsman_pod_health") == {(("pod", "pod-0"), ("state", "unseen")): 1.0}


def test_capacity_of_the_test_fleet_is_enough() -> None:
    assert len(families(fleet.make_fleet(SMALL.pods))) > 20


def test_counters_that_are_watched_for_their_first_event_are_there_before_it() -> None:
    tables = make_fleet(1)
    tables.roster.put(3, Process(Kind.WORKER, 0, 1, Phase.READY, 0))
    for name in ("retried", "ejections", "settled_requests"):
        assert values(tables, f"pointsman_{name}") == {(("pod", "pod-0"),): 0.0}
    assert values(tables, "pointsman_restarts") == {(("process", "worker 0"),): 0.0}
    assert values(tables, "pointsman_foreign_log_entries") == {(): 0.0}
    assert values(tables, "pointsman_transport_events") == {(("event", "calls_crashed"),): 0.0}
    assert values(tables, "pointsman_limits_outage") == {(("policy", "open"),): 0.0, (("policy", "closed"),): 0.0}


def test_the_page_says_what_runs() -> None:
    ((labels, value),) = values(make_tables(), "pointsman_build_info").items()
    assert value == 1.0
    assert dict(labels)["version"]
    assert dict(labels)["hot_path"] in ("compiled", "interpreted")


def test_counters_of_pods_that_are_gone_are_not_shown() -> None:
    tables = make_fleet(1)
    series = tables.series()
    for pod in ("pod-0", "gone", ""):
        series.add(1.0, "finished", pod, "200")
        series.add(1.0, "decisions", "m", pod, "random")
    series.add(1.0, "refused", "400", "none")
    shown = {
        (sample.name, sample.labels.get("pod"))
        for family in TablesCollector(tables).collect()
        for sample in family.samples
        if sample.name in ("pointsman_finished_total", "pointsman_decisions_total", "pointsman_refused_total")
    }
    assert shown == {
        *((f"pointsman_{name}_total", pod) for name in ("finished", "decisions") for pod in ("pod-0", "")),
        ("pointsman_refused_total", None),
    }


async def test_a_file_that_cannot_be_used_any_more_is_seen(tmp_path: Path) -> None:
    tables = make_tables(writer=SCRAPER)
    assert values(tables, "pointsman_discovery_usable") == {}
    path = tmp_path / "e.yaml"
    path.write_text("models: [{name: m, endpoints: ['10.0.0.1:1']}]")
    scraper = Scraper(load(None, {"endpoints": path}), tables)
    seen = []
    for text in ("models: []", "models: [", "models: [] # mended"):
        path.write_text(text)
        await scraper.discover()
        seen.append(values(tables, "pointsman_discovery_usable")[()])
    assert seen == [1.0, 0.0, 1.0]
