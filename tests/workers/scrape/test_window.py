import random
from bisect import bisect_right
from dataclasses import replace
from math import inf, isclose, isnan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.scrape.engines import VLLM
from workers.scrape.page import NAN, Histogram, KnownLines, PageReader, Sample
from workers.scrape.window import FIELDS, SLOTS, Window, quantile

FIXTURES = Path(__file__).parents[2] / "fixtures" / "vllm-0.32"
BOUNDS = (0.1, 0.2, 0.4, inf)


def histogram(*values: float, bounds: tuple[float, ...] = BOUNDS) -> Histogram:
    """The histogram of these observations."""
    counts = [float(sum(value <= bound for value in values)) for bound in bounds]
    return Histogram(bounds, counts, sum(values), float(len(values)))


def sample(tokens: float = 0.0, running: float = 0.0, **more: object) -> Sample:
    return replace(
        Sample(running=running, prompt_tokens=10 * tokens, generation_tokens=tokens, start_time_seconds=1.0), **more
    )


def test_rates_are_over_the_window_and_not_since_the_start() -> None:
    window = Window(60.0)
    first = window.add(1000.0, sample(tokens=5_000_000.0))
    assert isnan(first.generation_tokens_per_second) and first.window_seconds == 0.0
    second = window.add(1010.0, sample(tokens=5_000_200.0))
    assert (second.generation_tokens_per_second, second.prompt_tokens_per_second) == (20.0, 200.0)
    assert second.window_seconds == 10.0


def test_a_rate_forgets_what_left_the_window() -> None:
    window = Window(60.0)
    for second in range(300):
        busy = window.add(float(second), sample(tokens=100.0 * min(second, 100)))
        if second == 100:
            assert isclose(busy.generation_tokens_per_second, 100.0)
        assert busy.window_seconds <= 60.0 * (1 + 1.5 / SLOTS)
    assert busy.generation_tokens_per_second == 0.0 and busy.window_seconds >= 60.0


@pytest.mark.parametrize("interval", [0.01, 0.3, 1.0, 4.9, 7.0, 100.0])
def test_few_samples_are_kept_whatever_the_interval(interval: float) -> None:
    window = Window(60.0)
    for i in range(500):
        state = window.add(i * interval, sample(tokens=i * interval))
        assert len(window._kept) <= SLOTS + 2
        if i:
            assert isclose(state.generation_tokens_per_second, 1.0)


def test_after_a_gap_the_rates_speak_of_the_time_since() -> None:
    window = Window(60.0)
    for second in range(100):
        window.add(float(second), sample(tokens=100.0 * second))
    assert window.add(1000.0, sample(tokens=9_900.0)).window_seconds > 900.0  # the only difference there is
    after = window.add(1001.0, sample(tokens=9_900.0 + 7.0))
    assert after.generation_tokens_per_second == 7.0 and after.window_seconds == 1.0


def test_ratios_and_means_come_from_differences() -> None:
    window = Window()
    window.add(0.0, sample(prefix_queries=1000.0, prefix_hits=900.0, finished=5.0, ttft=histogram(*[9.0] * 50)))
    state = window.add(
        10.0, sample(prefix_queries=1100.0, prefix_hits=925.0, finished=25.0, ttft=histogram(*[9.0] * 50, 0.1, 0.3))
    )
    assert (state.hit_ratio, state.requests_per_second) == (0.25, 2.0)
    assert isclose(state.ttft_mean_seconds, 0.2)


def test_quantiles_are_those_of_the_window() -> None:
    window = Window()
    window.add(0.0, sample(itl=histogram(*[0.3] * 1000)))
    state = window.add(1.0, sample(itl=histogram(*[0.3] * 1000, *[0.05] * 90, *[0.15] * 10)))
    assert isclose(state.itl_p50_seconds, 0.1 * 50 / 90)
    assert isclose(state.itl_p90_seconds, 0.1)
    assert isclose(state.itl_p99_seconds, 0.19)


def test_without_data_means_stay_and_say_their_age_while_quantiles_go() -> None:
    window = Window(60.0)
    window.add(0.0, sample(e2e=histogram()))
    seen = window.add(1.0, sample(e2e=histogram(0.3)))
    assert (seen.e2e_mean_seconds, seen.observed_age_seconds) == (0.3, 0.0)
    for second in range(2, 200):
        state = window.add(float(second), sample(e2e=histogram(0.3)))
    assert (state.e2e_mean_seconds, state.observed_age_seconds) == (0.3, 198.0)
    assert isnan(state.e2e_p50_seconds)


def test_the_first_means_are_those_since_the_engine_started() -> None:
    state = Window().add(0.0, sample(ttft=histogram(0.1, 0.3)))
    assert isclose(state.ttft_mean_seconds, 0.2)
    assert isnan(state.ttft_p50_seconds) and isnan(state.observed_age_seconds)


@pytest.mark.parametrize(
    "after", [sample(tokens=9.0), sample(tokens=2000.0, start_time_seconds=2.0), sample(tokens=1001.0, e2e=histogram())]
)
def test_a_restart_begins_anew(after: Sample) -> None:
    window = Window()
    before = sample(tokens=1000.0, e2e=histogram(0.1))
    window.add(0.0, before)
    assert window.add(1.0, before).restarts == 0.0
    state = window.add(2.0, after)
    assert state.restarts == 1.0
    assert isnan(state.generation_tokens_per_second) and isnan(state.e2e_mean_seconds)
    later = window.add(12.0, replace(after, generation_tokens=after.generation_tokens + 50.0))
    assert later.restarts == 1.0 and later.generation_tokens_per_second == 5.0


def test_a_total_that_leaves_the_page_and_returns_is_no_restart() -> None:
    window = Window()
    window.add(0.0, sample(tokens=100.0))
    assert isnan(window.add(1.0, sample(tokens=NAN, running=3.0)).generation_tokens_per_second)
    state = window.add(2.0, sample(tokens=120.0))
    assert state.generation_tokens_per_second == 10.0 and state.restarts == 0.0


def test_a_truncated_page_gives_gauges_and_is_not_compared() -> None:
    window = Window()
    assert window.add(0.0, sample(running=2.0, truncated=True)).running == 2.0
    window.add(1.0, sample(tokens=100.0))
    state = window.add(2.0, sample(tokens=1.0, running=4.0, truncated=True))
    assert state.running == 4.0 and state.restarts == 0.0
    assert window.add(3.0, sample(tokens=120.0)).generation_tokens_per_second == 10.0


def test_a_clock_that_stands_still_does_no_harm() -> None:
    window = Window()
    window.add(5.0, sample(tokens=100.0))
    assert window.add(5.0, sample(tokens=200.0, running=1.0)).running == 1.0
    assert window.add(6.0, sample(tokens=110.0)).generation_tokens_per_second == 10.0


def test_histograms_whose_bounds_changed_give_no_quantiles() -> None:
    window = Window()
    window.add(0.0, sample(ttft=histogram(0.1)))
    state = window.add(1.0, sample(ttft=histogram(0.1, 0.3, bounds=(1.0, inf))))
    assert isnan(state.ttft_p50_seconds) and isclose(state.ttft_mean_seconds, 0.3)


def test_busy_time_is_what_the_polls_saw() -> None:
    window = Window(60.0)
    for second in range(61):
        state = window.add(float(second), sample(tokens=float(second), running=float(second < 30)))
    assert isclose(state.busy_ratio, 29.5 / 60)


def test_a_slowly_polled_idle_pod_is_not_charged_for_the_gap() -> None:
    window = Window(60.0)
    window.add(0.0, sample(tokens=1.0, running=1.0))
    state = window.add(30.0, sample(tokens=1.0, running=0.0))
    assert state.busy_ratio == 0.0
    assert window.add(60.0, sample(tokens=2.0, running=1.0)).busy_ratio == 0.25


@pytest.mark.parametrize(("busy_seconds", "idle_seconds"), [(0.3, 0.7), (3.0, 1.0), (0.2, 3.0)])
def test_busy_time_is_near_the_truth_under_an_on_off_load(busy_seconds: float, idle_seconds: float) -> None:
    """Requests one at a time, of exponential length; the polls slow down when the pod is idle."""
    random_ = random.Random(7)
    window = Window(10_000.0)
    now = changes = tokens = 0.0
    running = False
    next_poll = 0.0
    busy_time = 0.0
    while now < 10_000.0:
        until = min(changes, next_poll)
        busy_time += (until - now) * running
        tokens += (until - now) * running * 50
        now = until
        if now == changes:
            running = not running
            changes += random_.expovariate(1 / (busy_seconds if running else idle_seconds))
        if now == next_poll:
            moved = tokens != window._newest.sample.generation_tokens if window._newest else True
            state = window.add(now, sample(tokens=tokens, running=float(running)))
            next_poll += random_.uniform(0.9, 1.1) * (1.0 if running or moved else 3.0)
    assert abs(state.busy_ratio - busy_time / now) < 0.05


@pytest.mark.parametrize(
    ("per_second", "run_seconds", "off"),
    [(0.2, 0.1, 0.1), (1.0, 0.1, 0.1), (1.0, 0.5, 0.1), (5.0, 0.5, 0.1), (0.05, 20.0, 0.15)],
)
def test_busy_time_is_near_the_truth_where_polls_follow_the_load(
    per_second: float, run_seconds: float, off: float
) -> None:
    """Requests come by chance and overlap. An idle pod is polled every 5 s, or a moment after it has got one."""
    random_ = random.Random(3)
    end = 3_000.0
    starts = []
    now = 0.0
    while now < end:
        now += random_.expovariate(per_second)
        starts.append((now, now + random_.expovariate(1 / run_seconds)))
    window = Window(end)
    next_poll = 0.0
    busy_time = latest = 0.0
    for begin, finish in starts:
        busy_time += max(min(finish, end) - max(begin, latest), 0.0) if begin < end else 0.0
        latest = max(latest, finish)
    begins = [begin for begin, _ in starts]
    ends = sorted((finish, finish - begin) for begin, finish in starts)
    counts, total, ended = [0.0] * len(BOUNDS), 0.0, 0
    while next_poll < end:
        now = next_poll
        while ended < len(ends) and ends[ended][0] <= now:
            took = ends[ended][1]
            counts = [count + (took <= bound) for count, bound in zip(counts, BOUNDS, strict=True)]
            total, ended = total + took, ended + 1
        begun = bisect_right(begins, now)
        running = begun - ended
        times = Histogram(BOUNDS, counts, total, float(ended))
        state = window.add(now, sample(tokens=float(ended), running=float(running), inference=times, ttft=times))
        first = begins[begun] if begun < len(begins) else end
        next_poll = now + 0.5 if running else min(now + 5.0, max(now + 0.5, first + random_.uniform(0.0, 0.1)))
    assert state.busy_ratio == pytest.approx(busy_time / end, rel=off)


def test_busy_time_without_running_times_is_what_the_polls_saw() -> None:
    window = Window(60.0)
    window.add(0.0, sample(tokens=1.0))
    window.add(4.0, sample(tokens=1.0, running=1.0))
    assert window.add(5.0, sample(tokens=2.0)).busy_ratio == 2.5 / 5
    window = Window(60.0)
    none = histogram()
    window.add(0.0, sample(tokens=1.0, e2e=none, queue=none, ttft=none))
    window.add(4.0, sample(tokens=1.0, running=1.0, e2e=none, queue=none, ttft=none))
    state = window.add(5.0, sample(tokens=2.0, e2e=histogram(0.3), queue=histogram(0.1), ttft=histogram(0.1)))
    assert isclose(state.busy_ratio, 0.2 / 5)


def test_requests_that_were_aborted_leave_the_time_that_was_sampled() -> None:
    """Engines tell no time of them."""
    window = Window(1000.0)
    for second in range(101):
        busy = second % 5 != 0
        state = window.add(
            float(second),
            sample(
                tokens=float(second), running=float(busy), inference=histogram(0.1), ttft=histogram(*[0.1] * second)
            ),
        )
    assert 0.7 < state.busy_ratio <= 0.82


def test_sums_that_fall_are_not_believed() -> None:
    window = Window(60.0)
    window.add(0.0, sample(tokens=1.0, e2e=histogram(0.4), queue=histogram()))
    window.add(1.0, sample(tokens=1.0, running=1.0, e2e=histogram(0.4), queue=histogram()))
    state = window.add(2.0, sample(tokens=2.0, e2e=histogram(0.4), queue=histogram(*[9e4] * 9)))
    assert state.busy_ratio == 0.5


def test_what_an_engine_keeps_no_totals_of_comes_from_its_gauges() -> None:
    window = Window()
    window.add(0.0, Sample(prefix_hit_ratio=0.5, generation_throughput=70.0, utilization=0.25))
    state = window.add(1.0, Sample(prefix_hit_ratio=0.5, generation_throughput=70.0, utilization=0.25))
    assert (state.hit_ratio, state.generation_tokens_per_second, state.busy_ratio) == (0.5, 70.0, 0.25)


def test_a_counter_that_leaps_gives_no_rate() -> None:
    window = Window()
    window.add(0.0, sample(100.0))
    assert window.add(1.0, sample(150.0)).generation_tokens_per_second == 50.0
    assert isnan(window.add(2.0, sample(1e15)).generation_tokens_per_second)


def test_a_mean_longer_than_a_day_or_any_context_is_not_known() -> None:
    absurd = Histogram((), [], 1e15, 1.0)
    state = Window().add(0.0, Sample(e2e=absurd, prompt_length=absurd, generation_length=Histogram((), [], 8.0, 2.0)))
    assert isnan(state.e2e_mean_seconds) and isnan(state.prompt_tokens_mean)
    assert state.generation_tokens_mean == 4.0


def test_the_kv_cache_is_sized_by_its_blocks_where_tokens_are_not_given() -> None:
    assert Window().add(0.0, Sample(block_size=16.0, num_gpu_blocks=100.0)).kv_cache_tokens == 1600.0


def test_two_captured_pages_of_one_engine() -> None:
    reader = PageReader(KnownLines(VLLM))
    old, new = (
        reader.read((FIXTURES / name).read_bytes())
        for name in ("metrics-after-4-requests.txt", "metrics-after-evictions.txt")
    )
    window = Window()
    window.add(0.0, old)
    assert window.add(10.0, new).restarts == 1.0  # two runs of one engine, in truth
    window = Window()
    window.add(0.0, old)
    state = window.add(10.0, replace(new, start_time_seconds=old.start_time_seconds))
    assert state.restarts == 0.0
    assert (state.requests_per_second, state.prompt_tokens_per_second) == (1.3, 446.1)
    assert isclose(state.hit_ratio, (384 - 128) / (4707 - 246))
    assert isclose(state.prompt_tokens_mean, (4707 - 246) / 13)
    assert 0.005 < state.itl_p50_seconds < state.itl_p90_seconds < state.itl_p99_seconds < 0.25


def test_an_unknown_pod_is_all_unknown() -> None:
    state = Window().add(0.0, Sample())
    known = {name for name, value in zip(FIELDS, state, strict=True) if not isnan(value)}
    assert known == {"restarts", "window_seconds"}


@given(st.lists(st.floats(0.0, 0.4), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], q: float) -> None:
    seen = histogram(*values)
    estimate = quantile(seen.bounds, seen.counts, q)
    true = sorted(values)[max(0, min(len(values) - 1, -(-q * len(values) // 1).__int__() - 1))]
    at = next(i for i, bound in enumerate(BOUNDS) if true <= bound)
    assert (BOUNDS[at - 1] if at else 0.0) <= estimate <= BOUNDS[at]


def test_a_quantile_above_the_last_bound_is_that_bound() -> None:
    seen = histogram(5.0, 6.0)
    assert quantile(seen.bounds, seen.counts, 0.5) == 0.4
    assert (
        isnan(quantile((inf,), [3.0], 0.5)) and isnan(quantile(BOUNDS, [0.0] * 4, 0.5)) and isnan(quantile((), [], 0.5))
    )


def test_a_window_has_a_length() -> None:
    with pytest.raises(ValueError, match="longer than 0"):
        Window(0.0)
