"""All tables together: made by one process, opened by the others."""

import pytest
from fleet import SMALL, end_of, in_child, loads, make_fleet, make_record

from state.catalog import CatalogDocument
from state.tables import FIRST_WORKER, Capacity, Tables


def test_who_attaches_finds_the_same_capacity_and_contents() -> None:
    tables = make_fleet(3)
    other = Tables.attach(tables.segment.fd, 7)
    assert other.capacity == SMALL
    assert other.catalog.read() == tables.catalog.read()
    assert other.pods.high == 3
    other.ledger.charge(1, 5, 5, held=True)
    assert loads(tables)[:3] == [0, 1, 0]


def test_a_forked_child_writes_what_the_parent_reads() -> None:
    tables = make_fleet(2)

    def work() -> None:
        mine = Tables.attach(tables.segment.fd, 5)
        mine.ledger.charge(0, 5, 5, held=True)
        mine.series().add(2.0, "a")
        mine.catalog.publish(CatalogDocument((make_record(0),)))

    assert end_of(in_child(work)) == 0
    assert loads(tables)[0] == 1
    assert dict(tables.series(5).items()) == {("a",): 2.0}
    assert tables.catalog.version == 2


def test_a_pure_reader_has_no_counters() -> None:
    tables = make_fleet(1)
    with pytest.raises(ValueError, match="no counters"):
        Tables.attach(tables.segment.fd).series()


def test_writers_do_not_share_counters() -> None:
    tables = make_fleet(1)
    for writer in range(SMALL.writers):
        tables.series(writer).add(writer, "a")
    assert [dict(series.items())["a",] for series in tables.all_series()] == list(range(SMALL.writers))


def test_memory_for_the_default_capacity_is_bounded() -> None:
    tables = Tables.create(Capacity(), FIRST_WORKER)
    assert sum(tables.segment.sizes().values()) < 256 << 20
