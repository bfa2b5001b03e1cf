"""Rows for pods: who comes, who goes, and what the others notice of it."""

from collections.abc import Sequence
from typing import Any

import pytest
from fleet import SMALL, loads, make_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from router.fleet import Fleet
from state.catalog import Catalog, PodRecord
from state.ledger import Charge
from state.pods import Health, PodTable
from state.tables import SCRAPER, Capacity, Tables
from workers.discovery.registry import REST_SECONDS, FoundPod, Registry, RegistryFull
from workers.metrics import TablesCollector

FOUR = Capacity(pods=4, writers=12, catalog_bytes=1 << 14, series=64, prefix_ring_bytes=1 << 16)


def pod(number: int, **changes: Any) -> FoundPod:
    values: dict[str, Any] = {
        "address": f"10.0.0.{number}:8000", "name": f"pod-{number}", "models": ("m",),
        "metrics_address": f"10.0.0.{number}:8000", "host": f"host-{number}",
    }  # fmt: skip
    return FoundPod(**{**values, **changes})


def pods(*numbers: int) -> list[FoundPod]:
    return [pod(number) for number in numbers]


def published(tables: Tables) -> dict[str, PodRecord]:
    return {record.name: record for record in tables.catalog.read()[1].pods}


def draining(tables: Tables) -> set[str]:
    return {name for name, record in published(tables).items() if record.draining}


class World:
    def __init__(self, capacity: Capacity = SMALL, **how: float) -> None:
        self.tables = make_tables(capacity, SCRAPER)
        self.worker = Tables.attach(self.tables.segment.fd, 5)
        self.registry = Registry(self.tables, 0.0, **how)

    def update(self, found: Sequence[FoundPod], now: float = 0.0) -> tuple[list[int], list[int]]:
        return self.registry.update(found, {}, now)

    def charge(self, name: str, held: bool = True) -> Charge:
        return self.worker.ledger.charge(published(self.tables)[name].slot, 100, 100, held=held)


def test_a_pod_whose_source_wants_it_to_drain_stays_until_the_source_wants_otherwise() -> None:
    world = World()
    world.update([pod(1, draining=True), pod(2)])
    assert draining(world.tables) == {"pod-1"}
    assert world.registry.draining == {published(world.tables)["pod-1"].slot}
    assert world.registry.sweep(1e6) == []
    world.update(pods(1, 2))
    assert draining(world.tables) == set()


def test_pods_get_rows_unseen_and_published() -> None:
    world = World()
    assert world.update(pods(1, 2)) == ([0, 1], [])
    found = published(world.tables)
    assert [(found[name].slot, found[name].generation) for name in ("pod-1", "pod-2")] == [(0, 1), (1, 2)]
    assert found["pod-1"].host == "host-1"
    assert world.tables.pods.generation[:3].tolist() == [1, 2, 0]
    assert world.tables.pods.row(0)[0] == Health.UNSEEN


def test_an_empty_source_is_published_too_so_that_discovery_counts_as_loaded() -> None:
    world = World()
    world.update([])
    assert world.tables.catalog.version == 1
    world.update([])
    assert world.tables.catalog.version == 1


def test_adding_and_removing_leaves_the_others_as_they_are() -> None:
    world = World()
    world.update(pods(1, 2))
    charge = world.charge("pod-1")
    before = published(world.tables)["pod-1"]
    world.update(pods(1, 2, 3))
    world.update(pods(1, 3))
    assert published(world.tables)["pod-1"] == before
    assert world.tables.ledger.load(charge.slot) == (1, 100)
    assert draining(world.tables) == {"pod-2"}
    assert world.registry.draining == {1}


def test_a_pod_that_leaves_drains_until_nothing_is_in_flight() -> None:
    world = World()
    world.update(pods(1, 2))
    charge = world.charge("pod-2")
    assert world.update(pods(1), 10.0) == ([], [1])
    assert world.registry.sweep(20.0) == []
    world.worker.ledger.release(charge, held=True)
    assert world.registry.sweep(21.0) == [1]
    assert set(published(world.tables)) == {"pod-1"}
    assert world.tables.pods.generation[:2].tolist() == [1, 0]
    assert world.registry.sweep(22.0) == []


def test_a_draining_pod_is_removed_after_drain_seconds() -> None:
    world = World(drain_seconds=60.0)
    world.update(pods(1))
    world.charge("pod-1")
    world.update([], 10.0)
    assert world.registry.sweep(69.0) == []
    assert world.registry.sweep(71.0) == [0]


def test_a_pod_that_comes_back_while_it_drains_carries_on() -> None:
    world = World()
    world.update(pods(1, 2))
    before = published(world.tables)
    world.charge("pod-2")
    world.update(pods(1), 1.0)
    assert world.update(pods(1, 2), 2.0) == ([], [])
    assert published(world.tables) == before
    assert world.registry.sweep(9999.0) == []
    assert world.tables.ledger.load(1) == (1, 100)


def test_another_address_is_another_pod() -> None:
    world = World()
    world.update([pod(1)])
    moved = pod(1, address="10.0.9.9:8000")
    assert world.update([moved], 1.0) == ([1], [0])
    assert {(r.address, r.draining) for r in world.tables.catalog.read()[1].pods} == {
        ("10.0.0.1:8000", True), ("10.0.9.9:8000", False),
    }  # fmt: skip


def test_changed_particulars_keep_the_row() -> None:
    world = World()
    world.update(pods(1))
    changed = pod(1, models=("m", "lora"), labels={"a": "b"}, metrics_address="10.0.0.1:9000")
    assert world.update([changed]) == ([], [])
    record = published(world.tables)["pod-1"]
    assert (record.slot, record.generation, record.models, record.labels) == (0, 1, ("m", "lora"), {"a": "b"})
    assert world.registry.pods == {0: changed}


def test_settings_are_published_and_nothing_is_when_nothing_changed() -> None:
    world = World()
    world.registry.update(pods(1), {"m": {"x": 1}}, 0.0)
    assert world.tables.catalog.read()[1].models == {"m": {"x": 1}}
    version = world.tables.catalog.version
    world.registry.update(pods(1), {"m": {"x": 1}}, 1.0)
    assert world.tables.catalog.version == version
    world.registry.update(pods(1), {"m": {"x": 2}}, 2.0)
    assert world.tables.catalog.version == version + 1


def test_more_pods_than_rows_change_nothing() -> None:
    world = World(FOUR)
    world.update(pods(1, 2, 3))
    before = (world.tables.catalog.read(), world.tables.pods.generation.tolist(), world.registry.pods)
    with pytest.raises(RegistryFull, match=r"raise capacity\.pods"):
        world.update(pods(4, 5, 6, 7, 8))
    assert (world.tables.catalog.read(), world.tables.pods.generation.tolist(), world.registry.pods) == before
    assert world.registry.draining == set()
    assert world.update(pods(1, 2, 3, 4)) == ([3], [])


def test_pods_that_replace_others_get_their_rows_as_these_drain() -> None:
    world = World(FOUR)
    world.update(pods(1, 2, 3))
    assert world.update(pods(4, 5, 6), 1.0) == ([3], [0, 1, 2])
    assert world.registry.waiting == 2
    assert sorted(world.registry.sweep(2.0)) == [0, 1, 2]
    added, leaving = world.update(pods(4, 5, 6), 3.0)
    assert (len(added), leaving, world.registry.waiting) == (2, [], 0)


def test_a_description_that_does_not_fit_changes_nothing() -> None:
    world = World(FOUR)
    world.update(pods(1))
    before = (world.tables.catalog.read(), world.tables.pods.generation.tolist(), world.registry.pods)
    with pytest.raises(RegistryFull, match=r"raise capacity\.catalog_bytes"):
        world.update([pod(1), pod(2, labels={"note": "x" * 20_000})])
    assert (world.tables.catalog.read(), world.tables.pods.generation.tolist(), world.registry.pods) == before
    assert world.update(pods(1, 2)) == ([1], [])


def test_a_row_rests_before_another_pod_gets_it() -> None:
    world = World()
    world.update(pods(1))
    world.update([], 1.0)
    world.registry.sweep(2.0)
    assert world.update(pods(2), 3.0) == ([1], [])
    assert world.update(pods(2, 3), 2.0 + REST_SECONDS) == ([0], [])


def test_a_resting_row_is_reused_if_no_other_is_free() -> None:
    world = World(FOUR)
    world.update(pods(1, 2, 3, 4))
    world.update(pods(3, 4), 1.0)
    world.registry.sweep(2.0)
    assert sorted(world.update(pods(3, 4, 5, 6), 3.0)[0]) == [0, 1]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_a_successor_begins_at_zero_and_late_releases_do_not_touch_it(held: bool, restart: bool) -> None:
    """Also when the scraper was restarted between, and knows nothing of the generations of rows that were given up."""
    world = World(drain_seconds=5.0)
    world.update(pods(1))
    late = [world.charge("pod-1", held) for _ in range(3)]
    world.update([], 1.0)
    world.registry.sweep(10.0)
    registry = Registry(world.tables, 50.0) if restart else world.registry
    assert registry.update(pods(2), {}, 100.0) == ([0], [])
    assert loads(world.tables) == [0] * 16
    mine = world.charge("pod-2", held)
    assert mine.generation > late[0].generation
    for charge in late:
        world.worker.ledger.release(charge, held=held)
        world.worker.ledger.outcome(charge, ok=False)
    assert world.tables.ledger.load(0) == (1, 100)


def test_a_restarted_scraper_adopts_what_is_there() -> None:
    world = World()
    world.update([pod(1, labels={"a": "b"}, role="decode", roleset="r"), pod(2), pod(3)])
    world.charge("pod-3")
    world.update([pod(1, labels={"a": "b"}, role="decode", roleset="r"), pod(2)], 100.0)
    before = published(world.tables)
    version = world.tables.catalog.version
    successor = Registry(world.tables, 5000.0)
    found = [pod(1, labels={"a": "b"}, role="decode", roleset="r"), pod(2)]
    assert successor.update(found, {}, 5000.0) == ([], [])
    assert world.tables.catalog.version == version
    assert successor.sweep(5001.0) == []  # the time it may drain begins anew
    assert published(world.tables) == before
    assert successor.pods[0].labels == {"a": "b"}
    assert successor.sweep(5601.0) == [2]


class _Killed(BaseException):
    pass


def killed(*_: Any) -> None:
    raise _Killed


@pytest.mark.parametrize(("owner", "step"), [(Catalog, "publish"), (PodTable, "vacate")])
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_scraper_killed_while_a_pod_goes_shuts_nobody_out(
    owner: type, step: str, comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step of it is the last that the scraper does."""
    world = World()
    world.update(pods(1, 2))
    world.update(pods(2), 1.0)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(owner, step, killed)
        world.registry.sweep(2.0)
    successor = Registry(world.tables, 3.0)
    successor.update(pods(1, 2) if comes_back else pods(2), {}, 4.0)
    successor.sweep(5.0)
    records = published(world.tables)
    generations = world.tables.pods.generation
    assert {name: int(generations[record.slot]) for name, record in records.items()} == {
        name: record.generation for name, record in records.items()
    }
    assert generations.nonzero()[0].tolist() == sorted(record.slot for record in records.values())
    candidates = Fleet(world.tables).candidates("m")
    assert candidates is not None
    assert {pod.name for pod in candidates.pods} == ({"pod-1", "pod-2"} if comes_back else {"pod-2"})


def test_a_row_that_is_not_its_pods_is_claimed_anew() -> None:
    world = World()
    world.update(pods(1, 2))
    charge = world.charge("pod-1")
    world.tables.pods.vacate(0)
    Registry(world.tables, 1.0)
    record = published(world.tables)["pod-1"]
    assert (record.slot, record.generation) == (0, 3) and world.tables.pods.generation[0] == 3
    assert published(world.tables)["pod-2"].generation == 2
    world.worker.ledger.release(charge, held=True)
    assert world.tables.ledger.load(0) == (0, 0)


def test_a_pod_that_drains_leaves_its_name_to_one_that_is_listed() -> None:
    """A name has the pod's number in the file, so that one may inherit that of the pod listed before it."""
    world = World()
    world.update([pod(1, name="a"), pod(2, name="b"), pod(3, name="c")])
    world.charge("a")
    world.charge("b")
    world.update([pod(2, name="a"), pod(3, name="b")], 1.0)
    assert {name: record.address for name, record in published(world.tables).items()} == {
        "a": "10.0.0.2:8000", "b": "10.0.0.3:8000", "a-10.0.0.1:8000": "10.0.0.1:8000",
    }  # fmt: skip
    world.update([pod(3, name="a")], 2.0)
    assert len(published(world.tables)) == 3 and len(world.registry.draining) == 2
    pages = exposed(world.tables)
    assert len(pages) == len(set(pages)), "no two series of one name"
    world.update([pod(1, name="a"), pod(2, name="b"), pod(3, name="c")], 3.0)
    assert set(published(world.tables)) == {"a", "b", "c"}


def exposed(tables: Tables) -> list[str]:
    """The series on the metrics page, without their values."""
    registry = CollectorRegistry()
    registry.register(TablesCollector(tables))
    lines = generate_latest(registry).decode().splitlines()
    return [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]


def test_pods_missing_from_an_incomplete_list_stay_as_they_are() -> None:
    world = World()
    world.update(pods(1, 2))
    world.update(pods(2), 1.0)
    assert world.registry.update(pods(3), {}, 2.0, complete=False) == ([2], [])
    assert draining(world.tables) == {"pod-1"}
    assert world.registry.update(pods(3), {}, 3.0) == ([], [1])


@given(st.lists(st.tuples(st.sets(st.integers(1, 9), max_size=6), st.floats(0, 40), st.booleans()), max_size=12))
@settings(max_examples=60)
def test_whatever_comes_and_goes_each_pod_has_one_row_and_each_generation_one_pod(
    steps: list[tuple[set[int], float, bool]],
) -> None:
    world = World(drain_seconds=30.0)
    registry, now = world.registry, 0.0
    owners: dict[int, str] = {}
    for wanted, wait, restart in steps:
        now += wait
        if restart:
            registry = Registry(world.tables, now, drain_seconds=30.0)
        try:
            registry.update([pod(n) for n in sorted(wanted)], {}, now)
        except RegistryFull:
            continue
        registry.sweep(now)
        records = world.tables.catalog.read()[1].pods
        assert {record.name for record in records if not record.draining} == {f"pod-{n}" for n in wanted}
        assert len({record.slot for record in records}) == len(records)
        for record in records:
            assert int(world.tables.pods.generation[record.slot]) == record.generation
            assert owners.setdefault(record.generation, record.name) == record.name
        assert loads(world.tables) == [0] * 16
