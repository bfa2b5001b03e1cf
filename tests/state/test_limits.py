"""Windows: never more than the limit, however many processes ask at once, die in between, or come late."""

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest

import state.limits
from state.limits import NoRoom, Verdict, Windows
from state.segment import Segment
from state.tables import Capacity, Tables

SLOTS, WRITERS = 16, 6
NOW = 6000.0  # the first second of a minute


def segment(slots: int = SLOTS) -> Segment:
    return Segment.create({"windows": Windows.size(slots, WRITERS)})


def windows(shared: Segment, writer: int, slots: int = SLOTS, seconds: float = 60.0) -> Windows:
    return Windows(shared.region("windows"), slots, WRITERS, seconds, fd=shared.fd, lock_byte=0, writer=writer)


def taken(counts: Windows, user: str, now: float, limit: int, tries: int, token_limit: int | None = None) -> int:
    return sum(counts.take(user, now, limit, token_limit).verdict is Verdict.TAKEN for _ in range(tries))


def test_requests_are_taken_up_to_the_limit_whoever_asks_and_again_in_the_next_window() -> None:
    shared = segment()
    first, second = windows(shared, 0), windows(shared, 1)
    assert taken(first, "alice", NOW, 5, 3) == 3
    assert taken(second, "alice", NOW + 59.9, 5, 9) == 2
    refused = first.take("alice", NOW + 1, 5)
    assert (refused.verdict, refused.requests) == (Verdict.OVER_REQUESTS, 5)
    assert taken(first, "bob", NOW, 5, 9) == 5
    assert taken(first, "alice", NOW + 60, 5, 9) == 5
    assert taken(second, "alice", NOW + 300, 5, 9) == 5


def test_refused_requests_are_not_counted() -> None:
    shared = segment()
    counts = windows(shared, 0)
    assert taken(counts, "alice", NOW, 2, 10) == 2
    assert counts.take("alice", NOW, 100).requests == 3
    assert counts.add_tokens("alice", NOW, 50) == (3, 50)
    refused = counts.take("alice", NOW, 100, 50)
    assert refused == (Verdict.OVER_TOKENS, 3, 50, 100)
    assert counts.take("alice", NOW, 100, 51).requests == 4


def test_a_limit_below_one_takes_nothing() -> None:
    shared = segment()
    counts = windows(shared, 0)
    assert taken(counts, "alice", NOW, -1, 3) == 0
    assert taken(counts, "alice", NOW, 10, 3, token_limit=-1000) == 0
    assert counts.take("alice", NOW, 10).requests == 1


def test_tokens_of_all_processes_count_in_the_window_in_which_they_are_known() -> None:
    shared = segment()
    first, second = windows(shared, 0), windows(shared, 1)
    first.take("alice", NOW, 10)
    assert first.add_tokens("alice", NOW, 30) == (1, 30)
    assert second.add_tokens("alice", NOW, 12) == (1, 42)
    assert second.add_tokens("alice", NOW, -5) == (1, 42)
    assert second.add_tokens("alice", NOW + 60, 7) == (0, 7)


def test_absurd_token_numbers_fill_the_window_and_nothing_else() -> None:
    shared = segment()
    counts = windows(shared, 0)
    counts.add_tokens("alice", NOW, 10**30)
    assert counts.take("alice", NOW, 10, 1000).verdict is Verdict.OVER_TOKENS
    assert counts.take("alice", NOW + 60, 10, 1000) == (Verdict.TAKEN, 1, 0, 101)


def test_a_request_can_be_given_back_in_its_own_window() -> None:
    shared = segment()
    first, second = windows(shared, 0, seconds=1.0), windows(shared, 1, seconds=1.0)
    period = first.take("m", 10.2, 1).period
    assert taken(second, "m", 10.3, 1, 1) == 0
    first.give_back("m", period)
    first.give_back("m", period)  # once too often
    assert taken(second, "m", 10.4, 1, 5) == 1
    first.give_back("m", period - 2)
    second.give_back("never seen", period)
    assert taken(second, "m", 10.5, 1, 5) == 0


def test_a_late_clock_reading_finds_its_own_window_or_the_present_one() -> None:
    shared = segment()
    late, other = windows(shared, 0), windows(shared, 1)
    assert taken(other, "alice", NOW, 3, 3) == 3
    assert taken(other, "alice", NOW + 60, 3, 2) == 2
    assert taken(late, "alice", NOW + 59, 3, 5) == 0, "the window before is still known"
    assert taken(other, "alice", NOW + 120, 3, 3) == 3
    assert taken(late, "alice", NOW + 59, 3, 5) == 0, "it has been overwritten: the newest one counts"
    assert other.add_tokens("alice", NOW + 120, 5) == (3, 5)
    assert late.add_tokens("alice", NOW, 5) == (3, 10)


def in_the_middle_of(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any]) -> None:
    """Have `what` done by another process between the next claim and the look."""

    def once() -> None:
        monkeypatch.setattr(state.limits, "fence", lambda: None)
        what()

    monkeypatch.setattr(state.limits, "fence", once)


def test_of_two_who_race_for_the_last_place_one_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = segment()
    first, second = windows(shared, 0), windows(shared, 1)
    others: list[int] = []
    in_the_middle_of(monkeypatch, lambda: others.append(taken(second, "alice", NOW, 1, 1)))
    assert taken(first, "alice", NOW, 1, 1) + others[0] == 1


def test_a_process_that_dies_between_claim_and_look_costs_one_place_until_the_window_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = segment()
    victim, other = windows(shared, 0), windows(shared, 1)

    def die() -> None:
        raise KeyboardInterrupt

    in_the_middle_of(monkeypatch, die)
    with pytest.raises(KeyboardInterrupt):
        victim.take("alice", NOW, 5)
    successor = windows(shared, 0)
    assert taken(other, "alice", NOW, 5, 3) + taken(successor, "alice", NOW, 5, 9) == 4
    assert taken(successor, "alice", NOW + 60, 5, 9) == 5


def test_rows_nobody_uses_are_given_to_others_and_no_others() -> None:
    shared = segment()
    first, second = windows(shared, 0), windows(shared, 1)
    for number in range(SLOTS):
        assert taken(first, f"user {number}", NOW, 1, 2) == 1
    with pytest.raises(NoRoom):
        second.take("one more", NOW + 60, 1)
    assert taken(second, "user 3", NOW + 90, 1, 2) == 1
    for number in range(SLOTS - 1):
        assert taken(second, f"newcomer {number}", NOW + 120, 1, 2) == 1
    with pytest.raises(NoRoom):
        second.take("one more", NOW + 120, 1)
    assert taken(first, "user 3", NOW + 90, 1, 2) == 0, "its row was in use"
    with pytest.raises(NoRoom):
        first.take("user 5", NOW + 120, 1)
    assert taken(first, "newcomer 5", NOW + 120, 1, 2) == 0


@pytest.mark.parametrize("owner", ["marked", "another"])
def test_a_claim_in_a_row_that_was_just_taken_away_is_made_again(monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    shared = segment(2)
    first, second = windows(shared, 0, 2), windows(shared, 1, 2)
    assert taken(second, "alice", NOW, 2, 1) == 1
    first.take("alice", NOW, 2)
    keys = shared.region("windows")[:16].cast("q")

    def take_away() -> None:
        keys[0] = -keys[0] if owner == "marked" else 12345

    in_the_middle_of(monkeypatch, take_away)
    assert taken(first, "alice", NOW + 600, 2, 1) == 1
    assert taken(second, "alice", NOW + 600, 2, 5) == 1
    assert windows(shared, 2, 2).add_tokens("alice", NOW + 600, 0) == (2, 0)


def test_rows_marked_by_one_who_died_over_it_go_back_to_their_keys() -> None:
    shared = segment(2)
    first, second = windows(shared, 0, 2), windows(shared, 1, 2)
    first.take("alice", NOW, 1)
    keys = shared.region("windows")[:16].cast("q")
    keys[0] = -keys[0]
    assert taken(first, "alice", NOW, 1, 1) == 0
    assert taken(second, "alice", NOW, 1, 1) == 0


def hammer(shared: Segment, writer: int, limit: int, rounds: int, pipe: Connection) -> None:
    counts = windows(shared, writer)
    for number in range(rounds):
        pipe.send("ready")
        pipe.recv()
        admitted = refused = 0
        while refused < 300:
            if counts.take("alice", NOW + 60 * number, limit).verdict is Verdict.TAKEN:
                admitted += 1
            else:
                refused += 1
        pipe.send(admitted)


def test_four_processes_hammering_one_user_are_given_the_limit_exactly() -> None:
    shared, limit, rounds = segment(), 1500, 6
    fork = get_context("fork")
    pipes, processes = [], []
    for writer in range(4):
        mine, theirs = fork.Pipe()
        processes.append(fork.Process(target=hammer, args=(shared, writer, limit, rounds, theirs)))
        processes[-1].start()
        pipes.append(mine)
    for _ in range(rounds):
        for pipe in pipes:
            assert pipe.recv() == "ready"
        for pipe in pipes:
            pipe.send("go")
        assert sum(pipe.recv() for pipe in pipes) == limit
    for process in processes:
        process.join(10)
        assert process.exitcode == 0


def test_workers_killed_while_they_hammer_admit_no_more_than_the_limit() -> None:
    """Each admission is written down after it: a killed one may have one admission that is not. So the count of the
    window is compared as well: every claim in it is an admission, or was left by a kill."""
    shared, limit, kills = segment(), 40_000, 12
    book = Segment.create({"admitted": 8 * WRITERS})
    admitted = book.region("admitted").cast("q")

    def worker(writer: int) -> None:
        counts = windows(shared, writer)
        while True:
            if counts.take("alice", NOW, limit).verdict is Verdict.TAKEN:
                admitted[writer] += 1

    def start(writer: int) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                worker(writer)
            finally:
                os._exit(1)
        return pid

    children = {writer: start(writer) for writer in range(3)}
    watcher = windows(shared, WRITERS - 1)
    try:
        for kill in range(kills):
            while watcher.add_tokens("alice", NOW, 0)[0] < limit * (kill + 1) // (kills + 1):
                os.sched_yield()
            victim = kill % 3
            os.kill(children[victim], signal.SIGKILL)
            os.waitpid(children[victim], 0)
            children[victim] = start(victim)
        while watcher.take("alice", NOW, limit).verdict is Verdict.TAKEN:
            admitted[WRITERS - 1] += 1
    finally:
        for pid in children.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    left_behind = kills + len(children)
    assert limit - left_behind - len(children) <= sum(admitted) <= limit
    assert watcher.add_tokens("alice", NOW, 0)[0] <= limit + left_behind


def test_the_tables_have_windows_for_users_and_models() -> None:
    tables = Tables.create(Capacity(pods=4, writers=4, limited_users=8, limited_models=8), writer=3)
    other = Tables.attach(tables.segment.fd, writer=2)
    assert tables.user_minutes.take("alice", NOW, 1).verdict is Verdict.TAKEN
    assert other.user_minutes.take("alice", NOW + 59, 1).verdict is Verdict.OVER_REQUESTS
    assert tables.model_seconds.take("m", NOW, 1).verdict is Verdict.TAKEN
    assert other.model_seconds.take("m", NOW + 0.9, 1).verdict is Verdict.OVER_REQUESTS
    assert other.model_seconds.take("m", NOW + 1, 1).verdict is Verdict.TAKEN
    with pytest.raises(ValueError, match="writer row"):
        Tables.attach(tables.segment.fd).user_minutes.take("alice", NOW, 1)


@pytest.mark.parametrize("writers", [15, 34])
@pytest.mark.parametrize("what", ["take", "refuse", "add_tokens"])
def test_cost(benchmark: Any, writers: int, what: str) -> None:
    shared = Segment.create({"windows": Windows.size(4096, writers)})
    counts = Windows(shared.region("windows"), 4096, writers, 60.0, fd=shared.fd, lock_byte=0, writer=3)
    if what == "add_tokens":
        benchmark(counts.add_tokens, "alice", NOW, 100)
    else:
        benchmark(counts.take, "alice", NOW, 0 if what == "refuse" else 1 << 40, 1 << 40)
