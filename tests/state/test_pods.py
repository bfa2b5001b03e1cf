"""Rows under a sequence lock: whole or not at all, whoever dies."""

import os
import time

import numpy as np
import pytest
from fleet import end_of, in_child, kill_all

from state import pods as pods_module
from state.pods import COLUMN, FIELDS, Floats, Health, PodTable
from state.segment import Segment

PODS = 24


@pytest.fixture
def table() -> PodTable:
    return PodTable(Segment.create({"pods": PodTable.size(PODS)}).region("pods"), PODS)


def row_of(number: float) -> Floats:
    """Every field a function of one number."""
    row: Floats = np.arange(len(FIELDS)) * 1e-3 + number
    return row


def whole(row: Floats) -> bool:
    """One sample, or nothing: what a reader gives when the writer has been stopped for long inside `write`."""
    nothing = np.isnan(row[COLUMN["running"] :]).all() and not row[: COLUMN["running"]].any()
    return bool(nothing or (row == row_of(row[0])).all())


class FieldByField:
    """The rows, written one number after the other: a thousand times the chance to read half a row."""

    def __init__(self, rows: Floats) -> None:
        self._rows = rows

    def __setitem__(self, slot: int, row: Floats) -> None:
        for column, value in enumerate(row.tolist()):
            self._rows[slot, column] = value


def test_a_claimed_row_is_unseen_and_nothing_is_known(table: PodTable) -> None:
    table.claim(3, 9)
    row = table.row(3)
    assert row[COLUMN["health"]] == Health.UNSEEN
    assert np.isnan(row[COLUMN["running"] :]).all()
    assert (row[: COLUMN["running"]] == 0).all()
    assert (table.high, int(table.generation[3]), table.last_generation) == (4, 9, 9)


def test_rows_come_back_as_written_and_the_epoch_moves(table: PodTable) -> None:
    for slot in range(5):
        table.claim(slot, slot + 1)
        before = table.epoch
        table.write(slot, row_of(slot))
        assert table.epoch > before
    epoch, values = table.snapshot()
    assert epoch == table.epoch
    assert values.shape == (5, len(FIELDS))
    for slot in range(5):
        assert (values[slot] == row_of(slot)).all()
        assert (table.row(slot) == row_of(slot)).all()


def test_a_snapshot_is_a_copy(table: PodTable) -> None:
    table.claim(0, 1)
    _, values = table.snapshot()
    table.write(0, row_of(5.0))
    assert values[0][COLUMN["health"]] == 0


def test_a_vacated_row_belongs_to_nobody_and_the_highest_generation_stays_known(table: PodTable) -> None:
    table.claim(0, 41)
    before = table.epoch
    table.vacate(0)
    assert int(table.generation[0]) == 0
    assert table.epoch > before
    assert table.last_generation == 41


def test_a_row_left_half_written_reads_as_unseen_until_somebody_writes_it(
    table: PodTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods_module, "_PATIENCE_SECONDS", 0.01)
    table.claim(0, 1)
    table.claim(1, 2)
    table.write(0, row_of(1.0))
    table.write(1, row_of(2.0))
    table._sequence[0] += 1  # a writer died inside `write`
    assert table.row(0)[COLUMN["health"]] == Health.UNSEEN
    _, values = table.snapshot()
    assert np.isnan(values[0][COLUMN["running"]])
    assert (values[1] == row_of(2.0)).all()
    table.write(0, row_of(3.0))
    assert (table.row(0) == row_of(3.0)).all()
    assert (table.snapshot()[1][0] == row_of(3.0)).all()


def test_giving_up_a_half_written_row_mends_it(table: PodTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every snapshot would wait for a writer that never comes."""
    table.claim(0, 1)
    table._sequence[0] += 1
    table.vacate(0)
    monkeypatch.setattr(pods_module, "_PATIENCE_SECONDS", 1e9)
    table.snapshot()


def test_readers_never_see_a_torn_row(table: PodTable) -> None:
    for slot in range(PODS):
        table.claim(slot, slot + 1)
        table.write(slot, row_of(0.0))
    until = time.monotonic() + 2.0
    read_fd, write_fd = os.pipe()

    def write() -> None:
        table._values = FieldByField(table._values)  # type: ignore[assignment]
        number = 0.0
        while time.monotonic() < until:
            for slot in range(PODS):
                number += 1.0
                table.write(slot, row_of(number))

    def read_rows() -> None:
        last, changes = [0.0] * PODS, 0
        while time.monotonic() < until:
            for slot in range(PODS):
                row = table.row(slot)
                assert whole(row), row
                if np.isnan(row[-1]):
                    continue
                assert row[0] >= last[slot]
                changes += bool(row[0] != last[slot])
                last[slot] = float(row[0])
        os.write(write_fd, changes.to_bytes(4, "little"))

    def read_snapshots() -> None:
        changes, seen = 0, -1
        while time.monotonic() < until:
            epoch, values = table.snapshot()
            for row in values:
                assert whole(row), row
            changes += epoch != seen
            seen = epoch
        os.write(write_fd, changes.to_bytes(4, "little"))

    children = [in_child(work) for work in (write, read_rows, read_snapshots, read_snapshots)]
    assert [end_of(pid) for pid in children] == [0] * 4
    changes = [int.from_bytes(os.read(read_fd, 4), "little") for _ in range(3)]
    os.close(read_fd)
    os.close(write_fd)
    assert min(changes) > 20


def test_readers_go_on_when_the_writer_is_killed_and_its_successor_takes_over(table: PodTable) -> None:
    for slot in range(PODS):
        table.claim(slot, slot + 1)
        table.write(slot, row_of(1.0))

    def write() -> None:
        table._values = FieldByField(table._values)  # type: ignore[assignment]
        number = 1.0
        while True:
            number += 1.0
            for slot in range(PODS):
                table.write(slot, row_of(number))

    torn = 0
    for _ in range(8):
        writer = in_child(write)
        time.sleep(0.02)
        kill_all([writer])
        _, values = table.snapshot()
        assert all(whole(row) for row in values)
        torn += sum(bool(np.isnan(row[-1])) for row in values)
    assert 1 <= torn <= 8
    for slot in range(PODS):
        table.write(slot, row_of(7.0))
    assert (table.snapshot()[1] == row_of(7.0)).all()
