"""From a request to a charged pod, and what is counted and remembered on the way."""

import itertools
from collections import Counter
from random import Random
from typing import ClassVar

import fleet
import pytest
from fleet import MODEL, loads, make_record, set_row

from router.errors import RequestError
from router.fleet import Candidates
from router.prefixes import Prefixes
from router.replies import Destination
from router.request import RoutingRequest
from router.scheduler import Decision, Scheduler
from router.strategies import STRATEGIES, Context
from router.strategies.delays import Delays
from router.strategies.least_request import LeastRequest
from state.catalog import CatalogDocument
from state.ledger import Entry
from state.pods import Health
from state.tables import Tables


def scheduler(tables: Tables, strategy: str = "least-request", tick: float = 0.00003) -> Scheduler:
    return Scheduler(tables, strategy, itertools.count(1000, tick).__next__, Context(Random(1)))


def decide(by: Scheduler, strategy: str = "least-request", model: str = MODEL, **changes: bool) -> Decision:
    request = RoutingRequest(model, prompt_tokens=100)
    how = {"held": True, "duplex": False, **changes}
    return by.decide(request, strategy, destination=Destination.HEADER, **how)


def counted(by: Scheduler, name: str) -> dict[tuple[str, ...], float]:
    return {labels[1:]: value for labels, value in by.series.items() if labels[0] == name}


def test_simultaneous_requests_spread_because_each_sees_those_before_it() -> None:
    tables = fleet.make_fleet(10)
    by = scheduler(tables)
    assert Counter(decide(by).pod.name for _ in range(100)) == {f"pod-{i}": 10 for i in range(10)}


def test_two_workers_see_what_each_other_chose_a_millisecond_ago() -> None:
    tables = fleet.make_fleet(10)
    one, two = scheduler(tables, tick=0.001), scheduler(Tables.attach(tables.segment.fd, 4), tick=0.001)
    for _ in range(50):
        decide(one)
        decide(two)
    assert loads(tables)[:10] == [10] * 10


def test_two_workers_that_decide_within_a_millisecond_still_spread_their_own() -> None:
    tables = fleet.make_fleet(10)
    one, two = scheduler(tables), scheduler(Tables.attach(tables.segment.fd, 4))
    for _ in range(50):
        decide(one)
        decide(two)
    assert set(loads(tables)[:10]) <= {8, 9, 10, 11, 12}


def test_a_decision_charges_and_its_release_gives_back() -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    decision = decide(by)
    assert tables.ledger.load(0) == (1, 100)
    assert loads(tables, Entry.PROMISED)[0] == loads(tables, Entry.CHOSEN)[0] * 100 == 100
    by.release(decision)
    assert tables.ledger.load(0) == (0, 0)
    assert loads(tables, Entry.PROMISED)[0] == 100


def test_what_is_left_to_the_log_is_not_released_here() -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    by.release(decide(by, held=False))
    assert tables.ledger.load(0) == (1, 100)


@pytest.mark.parametrize(
    ("model", "strategy", "status"), [("other", "least-request", 400), ("other", "x", 400), (MODEL, "x", 400)]
)
def test_refusals_charge_nobody(model: str, strategy: str, status: int) -> None:
    tables = fleet.make_fleet(1)
    with pytest.raises(RequestError) as raised:
        decide(scheduler(tables), strategy, model)
    assert raised.value.status == status
    assert (raised.value.code == "model_not_found") == (model == "other")
    assert loads(tables) == [0] * 16


def test_nobody_ready_is_503() -> None:
    tables = fleet.make_fleet(2)
    set_row(tables, 0, Health.FAILED)
    set_row(tables, 1, Health.EJECTED)
    with pytest.raises(RequestError) as raised:
        decide(scheduler(tables))
    assert raised.value.status == 503


def test_decisions_and_their_latency_are_counted() -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    for _ in range(3):
        decide(by)
    decide(by, "random")
    assert counted(by, "decisions") == {(MODEL, "pod-0", "least-request"): 3.0, (MODEL, "pod-0", "random"): 1.0}
    latency = counted(by, "decision_seconds")
    assert sum(value for labels, value in latency.items() if labels[0] == "le") == 4
    assert latency["sum",] > 0


@pytest.mark.parametrize("strategy", ["throughput", "least-latency", "least-busy-time", "least-gpu-cache"])
def test_choices_a_strategy_could_not_base_on_its_metric_are_counted(strategy: str) -> None:
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    for _ in range(6):
        decide(by, strategy)
    assert counted(by, "fallbacks") == {(strategy,): 6.0}
    assert loads(tables)[:2] == [3, 3]


def test_no_fallback_is_counted_when_the_metric_is_there() -> None:
    tables = fleet.make_fleet(2)
    for slot in range(2):
        set_row(tables, slot, busy_ratio=0.5)
    by = scheduler(tables)
    decide(by, "least-busy-time")
    assert counted(by, "fallbacks") == {}


def test_a_pod_that_is_renamed_answers_by_its_new_name() -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    old = decide(by).replies.response_headers(b"0" * 36, b"200")
    tables.catalog.publish(CatalogDocument((make_record(0, name="new-name"),)))
    new = decide(by).replies.response_headers(b"0" * 36, b"200")
    assert b"pod-0" in old
    assert b"new-name" in new
    assert counted(by, "decisions")[MODEL, "new-name", "least-request"] == 1


def test_what_is_kept_for_replies_does_not_grow_as_pods_and_models_come_and_go() -> None:
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    for turn in range(30):
        generation = 10 + turn
        tables.pods.claim(0, generation)
        set_row(tables, 0)
        models = (MODEL, f"adapter-{turn}")
        tables.catalog.publish(
            CatalogDocument((make_record(0, generation=generation, models=models), make_record(1, models=models)))
        )
        for _ in range(4):
            decide(by)
            decide(by, model=f"adapter-{turn}")
    assert len(by._replies) <= 2
    assert len(by._decision_cells) <= 4


def test_a_model_that_nobody_serves_is_remembered_nowhere() -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    before = len(list(by.series.items()))
    for number in range(50):
        with pytest.raises(RequestError):
            decide(by, model=f"made-up-{number}")
    assert len(list(by.series.items())) == before
    assert set(by.fleet.models) == {MODEL}


def test_what_the_default_strategy_had_to_go_by_is_shown_per_model() -> None:
    by = scheduler(fleet.make_fleet(2))
    by.show_modes()
    assert not counted(by, "mode")
    decide(by, "marginal-delay")
    by.show_modes()
    shown = counted(by, "mode")
    assert set(shown) == {(MODEL, mode) for mode in ("full", "stale-metrics", "no-prefix", "requests-only")}
    assert sorted(shown.values()) == [0.0, 0.0, 0.0, 1.0]


def test_how_much_the_index_has_forgotten_is_shown_per_worker() -> None:
    tables = fleet.make_fleet(2)
    prefixes = Prefixes.of(tables, max_blocks=64)
    by = Scheduler(
        tables, "marginal-delay", itertools.count(1000, 0.001).__next__, Context(Random(1), prefixes=prefixes)
    )

    def have_conversations(count: int) -> None:
        for number in range(count):
            for turns in (1, 2, 3):
                text = b"".join(f"{number} {turn}".encode() * 200 for turn in range(turns))
                by.decide(
                    RoutingRequest(MODEL, text=text),
                    "marginal-delay",
                    destination=Destination.HEADER,
                    held=True,
                    duplex=False,
                )
        by.show_modes()

    have_conversations(1)
    assert counted(by, "prefix_forgotten") == {(str(tables.writer),): 0.0}
    have_conversations(40)
    assert counted(by, "prefix_forgotten") == {(str(tables.writer),): pytest.approx(prefixes.index.forgotten())}
    assert prefixes.index.forgotten() > 0.3


class Prepared(LeastRequest):
    """Notes for which pods it was prepared."""

    name = "prepared"
    seen: ClassVar[list[list[str]]] = []

    def prepare(self, candidates: Candidates, now: float) -> None:
        self.seen.append([pod.name for pod in candidates.pods])


def test_between_requests_the_strategies_in_use_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "prepared", Prepared)
    monkeypatch.setattr(Prepared, "seen", [])
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    by.catch_up()  # nobody has asked for anything
    assert not by.fleet.ahead
    decide(by, "prepared")
    tables.pods.announce()
    by.catch_up()
    assert by.fleet.ahead
    assert Prepared.seen == [["pod-0", "pod-1"]]
    decide(by, "prepared")
    by.catch_up()  # nothing has changed
    assert len(Prepared.seen) == 1
    decide(by, "prepared")
    set_row(tables, 0, Health.FAILED)
    by.catch_up()
    assert Prepared.seen[1:] == [["pod-1"]]
    decide(by, "prepared")
    tables.catalog.publish(CatalogDocument(()))
    by.catch_up()  # the model is gone
    by.catch_up()
    assert len(Prepared.seen) == 2
    assert not by.fleet.ahead


def test_speeds_are_learnt_before_the_next_request() -> None:
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    decide(by, "marginal-delay")
    tables.pods.announce()
    by.catch_up()
    candidates = by.fleet.candidates(MODEL)
    assert candidates is not None
    assert Delays in candidates.derived
    decide(by, "marginal-delay")
    assert by.fleet.candidates(MODEL) is candidates


def test_counts_of_pods_that_are_gone_make_room_for_those_of_new_ones() -> None:
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    decide(by)
    for number in range(600):
        by.series.add(1.0, "finished", f"gone-{number}", "200")
    decide(by)
    assert len(counted(by, "finished")) > 90  # nothing has changed
    tables.catalog.publish(CatalogDocument(tuple(make_record(slot) for slot in range(2))))
    decision = decide(by)
    assert set(counted(by, "finished")) <= {("overflow",)}
    assert counted(by, "decisions")[MODEL, decision.pod.name, "least-request"] >= 1


def test_what_is_decided_among_some_pods_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "prepared", Prepared)
    monkeypatch.setattr(Prepared, "seen", [])
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    candidates, _ = by.serving(MODEL)
    request = RoutingRequest(MODEL, prompt_tokens=100)
    by.decide(request, "prepared", candidates.subset([1]), destination=Destination.HEADER, held=True, duplex=False)
    tables.pods.announce()
    by.catch_up()
    assert Prepared.seen == []
    assert not by.fleet.ahead
