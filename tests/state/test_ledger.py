"""Signed rows, one per writer: what is charged is given back, whoever does it and whoever dies."""

import os
import random

import numpy as np
import pytest
from fleet import end_of, in_child, kill_all, loads, make_fleet, make_tables
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from state.ledger import FRESH_SECONDS, Charge, Entry
from state.tables import FIRST_WORKER, Tables

PODS = 4
LOADS = (Entry.REQUESTS, Entry.TOKENS)


def settled(tables: Tables) -> bool:
    return all(loads(tables, entry) == [0] * tables.capacity.pods for entry in LOADS)


def test_a_charge_and_its_release() -> None:
    tables = make_fleet(PODS)
    charge = tables.ledger.charge(2, 300, 100, held=True)
    assert (charge.slot, charge.generation, charge.tokens) == (2, 3, 300)
    assert tables.ledger.load(2) == (1, 300)
    assert tables.ledger.loads(PODS)[:, 2].tolist() == [1, 300, 100]
    assert tables.ledger.total(Entry.CHOSEN, 2) == 1
    tables.ledger.release(charge, held=True)
    assert settled(tables)
    assert (tables.ledger.total(Entry.PROMISED, 2), tables.ledger.total(Entry.CHOSEN, 2)) == (100, 1)


def test_one_writer_may_release_what_another_charged() -> None:
    tables = make_fleet(PODS)
    other = Tables.attach(tables.segment.fd, 5)
    charge = tables.ledger.charge(1, 10, 10, held=False)
    other.ledger.release(charge, held=False)
    assert settled(tables)
    assert tables.ledger.forfeit(FIRST_WORKER) == tables.ledger.forfeit(5) == 0
    assert settled(tables)


def test_sums_that_are_kept_are_exact_in_what_this_process_does() -> None:
    tables = make_fleet(PODS)
    ledger = tables.ledger
    assert ledger.follow(100.0, PODS)[:PODS] == [0, 0, 0, 0]
    charge = ledger.charge(1, 10, 10, held=True)
    ledger.charge(2, 10, 10, held=False)
    assert ledger.follow(100.0, PODS)[:PODS] == [0, 1, 1, 0]
    ledger.release(charge, held=True)
    ledger.settle(3, 2, 0)
    assert ledger.follow(100.0, PODS)[:PODS] == [0, 0, 1, 2]


def test_sums_that_are_kept_are_a_millisecond_old_at_most_in_what_others_do() -> None:
    tables = make_fleet(PODS)
    other = Tables.attach(tables.segment.fd, 5).ledger
    tables.ledger.follow(100.0, PODS)
    other.charge(1, 10, 10, held=True)
    assert tables.ledger.follow(100.0 + 0.5 * FRESH_SECONDS, PODS)[1] == 0
    assert tables.ledger.follow(100.0 + 1.5 * FRESH_SECONDS, PODS)[1] == 1
    other.charge(0, 10, 10, held=True)
    assert tables.ledger.follow(99.0, PODS)[0] == 1  # a clock that went back hides nothing


def test_sums_are_kept_of_as_many_pods_as_were_asked_for() -> None:
    tables = make_fleet(PODS)
    other = Tables.attach(tables.segment.fd, 5).ledger
    tables.ledger.follow(100.0, 2)
    other.charge(3, 10, 10, held=True)
    assert tables.ledger.follow(100.0, 4)[3] == 1


def test_rows_count_from_when_they_are_admitted() -> None:
    tables = Tables.create(make_tables().capacity, FIRST_WORKER)
    tables.ledger.charge(0, 5, 5, held=True)
    assert tables.ledger.load(0) == (0, 0)
    tables.ledger.admit(FIRST_WORKER)
    tables.ledger.admit(0)
    assert tables.ledger.load(0) == (1, 5)


def test_a_dead_writer_forfeits_what_it_held_and_only_that() -> None:
    tables = make_fleet(PODS)
    dead = Tables.attach(tables.segment.fd, 6).ledger
    kept = [dead.charge(slot, 7, 7, held=False) for slot in range(PODS)]
    for _ in range(3):
        dead.charge(1, 11, 11, held=True)
    mine = tables.ledger.charge(1, 13, 13, held=True)
    assert tables.ledger.forfeit(6) == 3
    assert tables.ledger.forfeit(6) == 0
    assert tables.ledger.load(1) == (2, 20)
    for charge in kept:
        tables.ledger.release(charge, held=False)
    tables.ledger.release(mine, held=True)
    assert settled(tables)


def replace_pod(tables: Tables, slot: int) -> None:
    """What the registry does when another pod gets the row."""
    tables.pods.vacate(slot)
    requests, tokens = tables.ledger.load(slot)
    tables.ledger.settle(slot, -requests, -tokens)
    tables.pods.claim(slot, tables.pods.last_generation + 1)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("end", ["release", "outcome", "forfeit"])
def test_the_successor_in_a_row_is_never_touched(held: bool, end: str) -> None:
    tables = make_fleet(PODS)
    worker = Tables.attach(tables.segment.fd, 5).ledger
    old = worker.charge(0, 100, 100, held=held)
    replace_pod(tables, 0)
    new = worker.charge(0, 40, 40, held=held)
    if end == "release":
        worker.release(old, held=held)
    elif end == "outcome":
        worker.outcome(old, ok=False)
        assert tables.ledger.total(Entry.FAILED, 0) == 0
    else:
        assert tables.ledger.forfeit(5) == int(held)
        assert tables.ledger.load(0) == ((0, 0) if held else (1, 40))
        return
    assert tables.ledger.load(0) == (1, 40)
    worker.release(new, held=held)
    assert tables.ledger.load(0) == (0, 0)


def test_a_writer_that_dies_after_its_pod_was_replaced_takes_nothing_from_the_successor() -> None:
    tables = make_fleet(PODS)
    dead = Tables.attach(tables.segment.fd, 5).ledger
    for _ in range(4):
        dead.charge(0, 100, 100, held=True)
    replace_pod(tables, 0)
    tables.ledger.charge(0, 9, 9, held=True)
    assert tables.ledger.forfeit(5) == 0
    assert tables.ledger.load(0) == (1, 9)


def test_outcomes() -> None:
    tables = make_fleet(PODS)
    charge = tables.ledger.charge(3, 1, 1, held=True)
    tables.ledger.outcome(charge, ok=True)
    tables.ledger.outcome(charge, ok=False)
    tables.ledger.outcome(charge, ok=False)
    assert (tables.ledger.total(Entry.SUCCEEDED, 3), tables.ledger.total(Entry.FAILED, 3)) == (1, 2)


def test_eight_processes_end_at_exactly_zero() -> None:
    """Each charges and releases 20,000 times, half of it for others to release."""
    tables = make_fleet(PODS)
    turns, batch = 20_000, 200

    def work(writer: int, pipe_in: int, pipe_out: int) -> None:
        ledger = Tables.attach(tables.segment.fd, writer).ledger
        rng = random.Random(writer)
        for _ in range(turns // batch):
            slots = [rng.randrange(PODS) for _ in range(batch)]
            charges = [ledger.charge(slot, slot + 1, 1, held=index % 2 == 0) for index, slot in enumerate(slots)]
            os.write(pipe_out, bytes(charge.slot for charge in charges[1::2]))
            for charge in charges[0::2]:
                ledger.release(charge, held=True)
            got = b""
            while len(got) < batch // 2:
                got += os.read(pipe_in, batch // 2 - len(got))
            for slot in got:
                ledger.release(Charge(slot, slot + 1, slot + 1), held=False)

    pipes = [os.pipe() for _ in range(8)]
    children = [
        in_child(lambda n=n: work(FIRST_WORKER + n, pipes[n][0], pipes[(n + 1) % 8][1]))  # type: ignore[misc]
        for n in range(8)
    ]
    assert [end_of(pid) for pid in children] == [0] * 8
    for pipe in pipes:
        os.close(pipe[0])
        os.close(pipe[1])
    assert settled(tables)
    assert sum(loads(tables, Entry.CHOSEN)) == sum(loads(tables, Entry.PROMISED)) == 8 * turns
    assert sum(tables.ledger.forfeit(writer) for writer in range(12)) == 0
    assert settled(tables)


def test_processes_killed_at_any_moment_leave_what_was_kept() -> None:
    tables = make_fleet(PODS)
    mine = tables.ledger.charge(0, 3, 3, held=True)

    def work(writer: int) -> None:
        ledger = Tables.attach(tables.segment.fd, writer).ledger
        rng = random.Random(writer)
        charges: list[Charge] = []
        while True:
            charges.append(ledger.charge(rng.randrange(PODS), 5, 5, held=True))
            if len(charges) > 30:
                ledger.release(charges.pop(rng.randrange(len(charges))), held=True)

    children = [in_child(lambda n=n: work(FIRST_WORKER + 1 + n)) for n in range(4)]  # type: ignore[misc]
    while sum(loads(tables)) < 100:
        pass
    kill_all(children)
    forfeited = [tables.ledger.forfeit(writer) for writer in range(FIRST_WORKER + 1, FIRST_WORKER + 5)]
    assert max(forfeited) <= 31
    assert sum(forfeited) >= 90
    # A kill between the two stores of one charge leaves one request wrong at most, which the scraper settles.
    totals = loads(tables)
    assert sum(map(abs, totals)) <= 1 + 4
    tables.ledger.release(mine, held=True)


class LedgerMachine(RuleBasedStateMachine):
    """Against a plain list of who charged what and is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = make_fleet(PODS)
        self.writers = {
            n: Tables.attach(self.tables.segment.fd, n).ledger for n in range(FIRST_WORKER, FIRST_WORKER + 3)
        }
        self.open: list[tuple[int, Charge, bool]] = []
        self.stale: list[tuple[int, Charge, bool]] = []

    @rule(
        writer=st.integers(FIRST_WORKER, FIRST_WORKER + 2), slot=st.integers(0, PODS - 1),
        tokens=st.integers(0, 1000), held=st.booleans(),
    )  # fmt: skip
    def charge(self, writer: int, slot: int, tokens: int, held: bool) -> None:
        self.open.append((writer, self.writers[writer].charge(slot, tokens, tokens, held=held), held))

    @precondition(lambda self: self.open or self.stale)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        which = self.open if self.open and (not self.stale or data.draw(st.booleans())) else self.stale
        writer, charge, held = which.pop(data.draw(st.integers(0, len(which) - 1)))
        if not held:
            writer = data.draw(st.sampled_from(sorted(self.writers)))
        self.writers[writer].release(charge, held=held)

    @rule(slot=st.integers(0, PODS - 1))
    def replace(self, slot: int) -> None:
        replace_pod(self.tables, slot)
        self.stale += [entry for entry in self.open if entry[1].slot == slot]
        self.open = [entry for entry in self.open if entry[1].slot != slot]

    @rule(writer=st.integers(FIRST_WORKER, FIRST_WORKER + 2))
    def die(self, writer: int) -> None:
        lost = [entry for entry in self.open if entry[0] == writer and entry[2]]
        assert self.tables.ledger.forfeit(writer) == len(lost)
        self.open = [entry for entry in self.open if entry not in lost]
        self.stale = [entry for entry in self.stale if not (entry[0] == writer and entry[2])]

    @invariant()
    def totals_are_the_open_charges(self) -> None:
        requests, tokens = np.zeros(PODS, int), np.zeros(PODS, int)
        for _, charge, _ in self.open:
            requests[charge.slot] += 1
            tokens[charge.slot] += charge.tokens
        assert self.tables.ledger.totals(Entry.REQUESTS, PODS).tolist() == requests.tolist()
        assert self.tables.ledger.totals(Entry.TOKENS, PODS).tolist() == tokens.tolist()


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase


def test_a_charge_may_be_held_for_a_while_and_then_be_left_to_the_log() -> None:
    tables = make_fleet(2)
    ledger = tables.ledger
    charge = ledger.charge(1, 100, 100, held=False)
    ledger.take_hold(charge)
    assert ledger.held_by(FIRST_WORKER, 1) == (1, 100)
    ledger.let_go(charge)
    assert ledger.held_by(FIRST_WORKER, 1) == (0, 0) and ledger.load(1) == (1, 100)
    ledger.take_hold(charge)
    assert ledger.forfeit(FIRST_WORKER) == 1
    assert ledger.load(1) == (0, 0)
