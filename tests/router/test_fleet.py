"""Who may take a request, as one process sees the shared tables."""

import numpy as np
import pytest
from fleet import MODEL, make_fleet, make_record, make_tables, set_row

from router.fleet import Candidates, Fleet
from state.catalog import CatalogDocument
from state.pods import COLUMN, Health
from state.tables import Tables


def names(candidates: Candidates | None) -> list[str]:
    assert candidates is not None
    return [pod.name for pod in candidates.pods]


def eligible(tables: Tables, model: str = MODEL) -> list[str]:
    return names(Fleet(tables).candidates(model))


def test_before_discovery_nothing_is_known() -> None:
    fleet = Fleet(make_tables())
    assert not fleet.loaded
    assert fleet.candidates(MODEL) is None


def test_ready_pods_come_before_unseen_ones_and_unseen_ones_before_none() -> None:
    tables = make_fleet(3)
    set_row(tables, 0, Health.UNSEEN)
    assert eligible(tables) == ["pod-1", "pod-2"]
    set_row(tables, 1, Health.FAILED)
    set_row(tables, 2, Health.EJECTED)
    assert eligible(tables) == ["pod-0"]
    set_row(tables, 0, Health.ASLEEP)
    assert eligible(tables) == []


def test_draining_pods_get_nothing_new() -> None:
    tables = make_fleet(records=[make_record(0), make_record(1, draining=True)])
    assert eligible(tables) == ["pod-0"]


def test_a_row_that_belongs_to_another_pod_by_now_is_not_taken() -> None:
    tables = make_fleet(2)
    fleet = Fleet(tables)
    assert names(fleet.candidates(MODEL)) == ["pod-0", "pod-1"]
    tables.pods.vacate(0)
    assert names(fleet.candidates(MODEL)) == ["pod-1"]
    tables.pods.claim(0, 77)
    set_row(tables, 0)
    assert names(fleet.candidates(MODEL)) == ["pod-1"]


def test_one_fleet_follows_the_catalog_and_the_rows() -> None:
    tables = make_fleet(2)
    fleet = Fleet(tables)
    before = fleet.candidates(MODEL)
    assert fleet.candidates(MODEL) is before
    set_row(tables, 1, Health.FAILED)
    assert names(fleet.candidates(MODEL)) == ["pod-0"]
    tables.catalog.publish(CatalogDocument((make_record(1, models=("other",)),), {"other": {"x": 1}}))
    assert fleet.candidates(MODEL) is None
    assert names(fleet.candidates("other")) == []
    assert fleet.models["other"].settings == {"x": 1}


def test_adapters_are_models_of_their_own() -> None:
    tables = make_fleet(records=[make_record(0, models=(MODEL, "lora")), make_record(1)])
    assert eligible(tables, "lora") == ["pod-0"]
    assert eligible(tables) == ["pod-0", "pod-1"]


def test_pods_that_only_prefill_take_no_whole_request() -> None:
    tables = make_fleet(
        records=[make_record(0, role="prefill"), make_record(1, role="decode"), make_record(2, role="decode")]
    )
    assert eligible(tables) == ["pod-1", "pod-2"]
    set_row(tables, 1, Health.FAILED)
    set_row(tables, 2, Health.FAILED)
    assert eligible(tables) == []


def test_prefill_pods_serve_a_model_that_has_no_others() -> None:
    assert eligible(make_fleet(records=[make_record(0, role="prefill")])) == ["pod-0"]


def test_pods_of_no_role_take_requests_beside_decode_pods() -> None:
    tables = make_fleet(records=[make_record(0), make_record(1, role="decode"), make_record(2, role="prefill")])
    assert eligible(tables) == ["pod-0", "pod-1"]


@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 5, 9), (0, 1, 15)])
def test_arrays_are_in_the_order_of_the_pods(slots: tuple[int, ...]) -> None:
    tables = make_fleet(records=[make_record(slot) for slot in reversed(slots)])
    for slot in slots:
        set_row(tables, slot, running=slot / 2)
        for _ in range(slot):
            tables.ledger.charge(slot, 10, 7, held=True)
    candidates = Fleet(tables).candidates(MODEL)
    assert candidates is not None
    assert [pod.slot for pod in candidates.pods] == candidates.slots.tolist() == list(slots)
    assert candidates.requests().tolist() == list(slots)
    assert candidates.tokens().tolist() == [slot * 10 for slot in slots]
    assert candidates.promised().tolist() == [slot * 7 for slot in slots]
    assert candidates.loads().tolist() == [[f * slot for slot in slots] for f in (1, 10, 7)]
    assert candidates.metric("running").tolist() == [slot / 2 for slot in slots]
    assert np.isnan(candidates.metric("ttft_mean_seconds")).all()


@pytest.mark.parametrize("indices", [[2, 0], [1], [0, 1, 2], [2, 1]])
def test_a_subset_in_any_order_sees_the_same(indices: list[int]) -> None:
    tables = make_fleet(3)
    for slot in range(3):
        set_row(tables, slot, waiting=slot)
        for _ in range(slot):
            tables.ledger.charge(slot, 1, 1, held=True)
    candidates = Fleet(tables).candidates(MODEL)
    assert candidates is not None
    part = candidates.subset(indices)
    assert part.requests().tolist() == part.metric("waiting").tolist() == indices
    assert part.loads()[1].tolist() == indices


def test_load_since_the_last_poll() -> None:
    tables = make_fleet(2)
    tables.ledger.charge(0, 50, 50, held=True)
    set_row(tables, 0)
    charge = tables.ledger.charge(0, 30, 30, held=True)
    candidates = Fleet(tables).candidates(MODEL)
    assert candidates is not None
    assert candidates.requests_since_sample().tolist() == [1, 0]
    assert candidates.tokens_since_sample().tolist() == [30, 0]
    tables.ledger.release(charge, held=True)
    tables.ledger.settle(0, -1, -50)
    assert candidates.requests_since_sample().tolist() == [0, 0]


def sample(tables: Tables, slot: int, running: float) -> None:
    """A poll that changed nothing but figures."""
    row = tables.pods.row(slot)
    row[COLUMN["running"]] = running
    tables.pods.write(slot, row, announce=False)
    tables.pods.announce()


def running(fleet: Fleet) -> list[float]:
    candidates = fleet.candidates(MODEL)
    assert candidates is not None
    return candidates.metric("running").tolist()


def test_requests_take_samples_in_unless_somebody_does_it_between_them() -> None:
    tables = make_fleet(2)
    fleet = Fleet(tables)
    assert not np.isfinite(running(fleet)).any()
    sample(tables, 0, 3.0)
    assert running(fleet)[0] == 3.0
    fleet.ahead = True
    sample(tables, 0, 4.0)
    assert running(fleet)[0] == 3.0
    assert fleet.catch_up()
    assert running(fleet)[0] == 4.0
    assert not fleet.catch_up()


def test_what_is_urgent_waits_for_nobody() -> None:
    tables = make_fleet(2)
    fleet = Fleet(tables)
    fleet.ahead = True
    assert len(running(fleet)) == 2
    set_row(tables, 1, Health.FAILED, running=5.0)
    assert names(fleet.candidates(MODEL)) == ["pod-0"]
    set_row(tables, 1, Health.READY)
    tables.pods.vacate(0)
    assert names(fleet.candidates(MODEL)) == ["pod-1"]
    tables.catalog.publish(CatalogDocument(()))
    assert fleet.candidates(MODEL) is None
