import random
from collections import Counter
from itertools import pairwise

import pytest

from workers.scrape.pace import AHEAD_SECONDS, BURST, HEADROOM, Pace


class Run:
    """A scraper that polls what is due at the moment it is due; a poll takes `latency` seconds."""

    def __init__(self, pace: Pace[int], latency: float = 0.01) -> None:
        self.pace = pace
        self.latency = latency
        self.now = 0.0
        self.polls: list[tuple[float, int]] = []
        self.busy: set[int] = set()
        self.failing: set[int] = set()
        self._pending: list[tuple[float, int]] = []

    def until(self, end: float) -> None:
        while True:
            next_due = self.pace.next_due()
            ends = self._pending[0][0] if self._pending else float("inf")
            at = min(ends, float("inf") if next_due is None else max(self.now, next_due))
            if at > end:
                self.now = end
                return
            self.now = at
            if ends <= at:
                _, key = self._pending.pop(0)
                self.pace.polled(key, self.now, busy=key in self.busy, ok=key not in self.failing)
            for key in self.pace.due(self.now):
                self.polls.append((self.now, key))
                self._pending.append((self.now + self.latency, key))

    def most_in(self, length: float, after: float = 0.0) -> int:
        """The greatest number of polls in any stretch of that length."""
        times = [time for time, _ in self.polls if time >= after]
        most = start = 0
        for end, time in enumerate(times):
            while times[start] <= time - length:
                start += 1
            most = max(most, end - start + 1)
        return most

    def intervals(self, key: int, after: float = 0.0) -> list[float]:
        times = [time for time, polled in self.polls if polled == key and time >= after]
        return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize("pods", [1, 2, 10, 64, 500])
def test_pods_added_at_once_are_polled_evenly_from_the_first_interval_on(pods: int) -> None:
    run = Run(Pace(1.0, 5.0, batch=1))
    run.busy.update(range(pods))
    for key in range(pods):
        run.pace.add(key, 0.0)
    run.until(10.0)
    assert {key for _, key in run.polls if _ <= 1.0} == set(range(pods))
    assert run.most_in(1.0 / pods) <= 2
    assert run.most_in(10.0 / pods) <= 10 * HEADROOM + 1
    for key in range(pods):
        assert all(abs(interval - 1.0) < 0.11 for interval in run.intervals(key))


def test_a_pod_added_alone_is_polled_at_once() -> None:
    pace: Pace[int] = Pace()
    pace.add(1, 100.0)
    assert pace.next_due() == 100.0
    assert pace.due(100.0) == [1]
    assert pace.next_due() is None and pace.due(1000.0) == []


def test_idle_pods_are_polled_less_and_busy_ones_no_less_often() -> None:
    run = Run(Pace(1.0, 5.0, batch=1))
    run.busy = {0, 1}
    for key in range(10):
        run.pace.add(key, 0.0)
    run.until(60.0)
    for key in range(10):
        expected = 1.0 if key in run.busy else 5.0
        assert run.pace.interval(key) == expected
        assert all(abs(interval - expected) < 0.5 for interval in run.intervals(key, after=25.0))


def test_mixed_intervals_leave_no_bunches() -> None:
    run = Run(Pace(1.0, 5.0, batch=1))
    run.busy = set(range(0, 100, 3))
    for key in range(100):
        run.pace.add(key, 0.0)
    run.until(60.0)
    rate = 34 / 1.0 + 66 / 5.0
    assert run.most_in(1.0 / rate, after=20.0) <= 2
    assert run.most_in(10.0 / rate, after=20.0) <= 10 * HEADROOM + 1


def test_pods_that_all_turn_busy_idle_and_busy_again_stay_apart() -> None:
    run = Run(Pace(1.0, 5.0, batch=1))
    for key in range(100):
        run.pace.add(key, 0.0)
    run.until(50.0)
    run.busy = set(range(100))
    for key in range(100):
        run.pace.hurry(key, run.now)
    run.until(51.5)
    assert {key for time, key in run.polls if time >= 50.0} == set(range(100))
    run.until(70.0)
    run.busy = set()
    run.until(120.0)
    assert run.most_in(0.01) <= 2
    assert run.most_in(0.1) <= 10 * HEADROOM + 1


def test_random_coming_and_going_makes_no_bunches() -> None:
    random_ = random.Random(3)
    run = Run(Pace(1.0, 5.0, batch=1))
    alive: set[int] = set()
    for step in range(400):
        for key in random_.sample(range(200), 5):
            if key in alive:
                alive.discard(key)
                run.pace.remove(key)
            else:
                alive.add(key)
                run.pace.add(key, run.now)
        run.busy = set(random_.sample(range(200), 100))
        run.until(step * 0.25)
    assert len(run.pace) == len(alive) and len(run.polls) > 2_000
    assert run.most_in(1 / 200) <= 2  # no more than 200 polls a second are ever wanted
    after = run.now - 12.0
    run.until(run.now + 12.0)
    polled = Counter(key for time, key in run.polls if time >= after + 12.0)
    assert set(polled) == alive


def test_a_failing_pod_is_asked_ever_less_often_and_at_once_normally_when_it_is_back() -> None:
    run = Run(Pace(1.0, 5.0, failing_max=30.0, batch=1))
    run.failing = {0}
    run.pace.add(0, 0.0)
    run.until(200.0)
    intervals = [round(interval) for interval in run.intervals(0)]
    assert intervals[:7] == [1, 2, 4, 8, 16, 30, 30]
    run.pace.hurry(0, run.now)
    assert run.pace.interval(0) == 30.0
    run.failing = set()
    run.until(240.0)
    assert run.pace.interval(0) == 5.0
    assert round(run.intervals(0, after=200.0)[0]) == 1


def test_a_late_call_does_not_pour_out_what_piled_up() -> None:
    pace: Pace[int] = Pace(1.0, 5.0, batch=1)
    for key in range(100):
        pace.add(key, 0.0)
    now = 0.0
    while (next_due := pace.next_due()) is not None and next_due < 3.0:
        now = max(now, next_due)
        for key in pace.due(now):
            pace.polled(key, now, busy=True, ok=True)
    first = pace.due(13.0)
    assert 1 < len(first) <= BURST
    assert pace.due(13.0) == []
    assert pace.next_due() == pytest.approx(13.0 + 1 / (100 * HEADROOM), abs=1 / 100)


def test_a_slow_poll_is_not_repeated_before_it_has_ended() -> None:
    pace: Pace[str] = Pace(1.0, 5.0, batch=1)
    pace.add("pod", 0.0)
    assert pace.due(0.0) == ["pod"]
    assert pace.due(50.0) == []
    pace.polled("pod", 50.0, busy=True, ok=True)
    assert pace.next_due() == pytest.approx(50.0)


def test_a_removed_pod_is_not_polled_and_its_late_outcome_is_ignored() -> None:
    pace: Pace[str] = Pace()
    pace.add("a", 0.0)
    pace.add("b", 0.0)
    assert pace.due(0.0) == ["a"]
    pace.remove("a")
    pace.remove("b")
    pace.remove("never known")
    pace.polled("a", 0.5, busy=True, ok=True)
    assert pace.next_due() is None and pace.due(100.0) == [] and len(pace) == 0
    pace.add("a", 200.0)
    pace.polled("a", 200.0, busy=True, ok=True)  # of the life before
    assert pace.due(200.0) == ["a"]


def test_the_timetable_does_not_grow_with_use() -> None:
    pace: Pace[int] = Pace(1.0, 5.0, batch=1)
    for key in range(10):
        pace.add(key, 0.0)
    for i in range(5_000):
        now = i * 0.1
        for key in pace.due(now):
            pace.polled(key, now, busy=False, ok=True)
        pace.hurry(i % 10, now)
        if i % 3 == 0:
            pace.remove(i % 10)
            pace.add(i % 10, now)
    assert len(pace._queue) <= 40
    assert pace._rate == pytest.approx(sum(1 / pace.interval(key) for key in range(10)))


def test_polls_leave_in_small_batches_of_those_whose_time_is_near() -> None:
    alone, run = Run(Pace(1.0, 5.0, batch=1)), Run(Pace(1.0, 5.0, batch=4))
    for each in (alone, run):
        each.busy.update(range(100))
        for key in range(100):
            each.pace.add(key, 0.0)
        each.until(20.0)
    together = Counter(time for time, _ in run.polls)
    assert set(together.values()) <= {1, 2, 3, 4} and together.most_common(60)[-1][1] == 4
    assert abs(len(run.polls) - len(alone.polls)) <= 4
    assert run.most_in(0.1) <= 10 * HEADROOM + 1 + 4
    for key in range(100):
        assert all(abs(interval - 1.0) <= 2 * AHEAD_SECONDS for interval in run.intervals(key, after=2.0))


def test_few_pods_are_not_drawn_together_for_a_batch() -> None:
    run = Run(Pace(1.0, 5.0, batch=4))
    run.busy.update(range(10))
    for key in range(10):
        run.pace.add(key, 0.0)
    run.until(20.0)
    assert run.most_in(0.08) == 1


def test_intervals_must_make_sense() -> None:
    for intervals in ((0.0, 1.0, 1.0), (2.0, 1.0, 5.0), (1.0, 2.0, 0.5)):
        with pytest.raises(ValueError, match="interval_min"):
            Pace(*intervals)
    with pytest.raises(ValueError, match="batch 0"):
        Pace(batch=0)
