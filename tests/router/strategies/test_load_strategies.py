"""The ten load strategies do what their names say, on rows made by hand."""

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fleet import MODEL, make_fleet, make_record, set_row
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet import Candidates, Fleet
from router.request import RoutingRequest
from router.strategies import STRATEGIES, Context, Scoring
from router.strategies.base import fewest, lowest, smallest
from state.tables import Tables

NOW = 1005.0
NAN = float("nan")

LIKED: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "throughput": (
        {"prompt_tokens_per_second": 10.0, "generation_tokens_per_second": 100.0},
        {"prompt_tokens_per_second": 100.0, "generation_tokens_per_second": 10.0},
    ),
    "least-busy-time": ({"busy_ratio": 0.2}, {"busy_ratio": 0.9}),
    "least-gpu-cache": ({"kv_usage": 0.1}, {"kv_usage": 0.3}),
    "least-kv-cache": ({"kv_usage": 0.1}, {"kv_usage": 0.3}),
    "least-latency": (
        {"queue_mean_seconds": 0.0, "prefill_mean_seconds": 0.1, "decode_mean_seconds": 1.0, "prompt_tokens_mean": 100},
        {"queue_mean_seconds": 0.5, "prefill_mean_seconds": 0.1, "decode_mean_seconds": 1.0, "prompt_tokens_mean": 100},
    ),
    "least-utilization": ({"kv_usage": 0.9, "waiting": 0.0}, {"kv_usage": 0.1, "waiting": 3.0, "running": 8.0}),
}
"""Strategy: the metrics of a pod that it must prefer, and of one that it must not."""
EQUAL: dict[str, dict[str, float]] = {
    "throughput": {"prompt_tokens_per_second": 50.0, "generation_tokens_per_second": 50.0},
    "least-busy-time": {"busy_ratio": 0.5},
    "least-gpu-cache": {"kv_usage": 0.4},
    "least-kv-cache": {"kv_usage": 0.4},
    "least-latency": {"prefill_mean_seconds": 0.1, "decode_mean_seconds": 1.0, "running": 2.0, "waiting": 0.0},
    "least-utilization": {"kv_usage": 0.4, "waiting": 0.0, "running": 4.0},
}


class Router:
    """One process with one strategy."""

    def __init__(self, tables: Tables, name: str, seed: int = 5) -> None:
        self.tables = tables
        self.fleet = Fleet(tables)
        self.strategy = STRATEGIES[name](Context(random.Random(seed)))

    def candidates(self) -> Candidates:
        found = self.fleet.candidates(MODEL)
        assert found is not None
        return found

    def pick(self, tokens: int = 400, charge: bool = False) -> int:
        request = RoutingRequest(MODEL, prompt_tokens=tokens)
        candidates = self.candidates()
        index = self.strategy.pick(request, candidates, NOW)
        slot: int = candidates.pods[index].slot
        if charge:
            self.tables.ledger.charge(slot, tokens, tokens, held=True)
        return slot

    def burst(self, count: int = 100, tokens: int = 400) -> list[int]:
        picked = Counter(self.pick(tokens, charge=True) for _ in range(count))
        return [picked[pod.slot] for pod in self.candidates().pods]

    def scores(self, tokens: int = 400) -> list[float]:
        assert isinstance(self.strategy, Scoring)
        scores: list[float] = self.strategy.scores(
            RoutingRequest(MODEL, prompt_tokens=tokens), self.candidates(), NOW
        ).tolist()
        return scores


def router(name: str, *rows: dict[str, float]) -> Router:
    tables = make_fleet(len(rows))
    for slot, metrics in enumerate(rows):
        set_row(tables, slot, **metrics)
    return Router(tables, name)


# -- each does what its name says


@pytest.mark.parametrize("name", LIKED)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_pod_that_the_name_says(name: str, swapped: bool) -> None:
    liked, other = LIKED[name]
    by = router(name, *((other, liked) if swapped else (liked, other)))
    assert {by.pick() for _ in range(20)} == {int(swapped)}
    assert by.strategy.fallbacks == 0


def test_random_is_uniform() -> None:
    by = router("random", *[{}] * 4)
    assert all(400 < count < 600 for count in by.burst(2000))


def test_round_robin_takes_each_in_turn() -> None:
    by = router("round-robin", *[{}] * 5)
    picks = [by.pick() for _ in range(15)]
    assert all((after - before) % 5 == 1 for before, after in itertools.pairwise(picks))


def test_round_robin_goes_on_where_it_was_when_a_pod_goes() -> None:
    by = router("round-robin", *[{}] * 4)
    while by.pick() != 1:
        pass
    by.tables.pods.vacate(2)
    assert [by.pick() for _ in range(4)] == [3, 0, 1, 3]


def test_round_robin_of_several_workers_does_not_march_in_step() -> None:
    tables = make_fleet(8)
    assert len({Router(tables, "round-robin", seed).pick() for seed in range(20)}) > 3


def test_least_request_takes_the_fewest() -> None:
    by = router("least-request", *[{}] * 3)
    for slot, count in enumerate((3, 1, 2)):
        for _ in range(count):
            by.tables.ledger.charge(slot, 1, 1, held=True)
    assert by.scores() == [3, 1, 2]
    assert [by.pick(charge=True) for _ in range(1)] == [1]


def test_power_of_two_never_takes_the_worst_and_always_the_better_of_two() -> None:
    by = router("power-of-two", *[{}] * 3)
    for _ in range(5):
        by.tables.ledger.charge(1, 1, 1, held=True)
    assert {by.pick() for _ in range(200)} == {0, 2}
    pair = router("power-of-two", {}, {})
    pair.tables.ledger.charge(0, 1, 1, held=True)
    assert {pair.pick() for _ in range(50)} == {1}
    assert router("power-of-two", {}).pick() == 0


def test_the_published_utilization_wins_over_what_could_be_derived() -> None:
    by = router("least-utilization", {"utilization": 0.2, "kv_usage": 0.9}, {"utilization": 0.8, "kv_usage": 0.1})
    assert by.pick() == 0


def test_a_longer_prompt_weighs_the_prefill_more() -> None:
    """Pod 0 prefills quickly and decodes slowly."""
    quick = {"prefill_mean_seconds": 0.1, "decode_mean_seconds": 2.0, "prompt_tokens_mean": 1000.0}
    slow = {"prefill_mean_seconds": 0.5, "decode_mean_seconds": 1.0, "prompt_tokens_mean": 1000.0}
    by = router("least-latency", quick, slow)
    assert (by.pick(tokens=100), by.pick(tokens=5000)) == (1, 0)


def test_a_pod_without_a_finished_request_is_tried() -> None:
    by = router("least-latency", EQUAL["least-latency"], {}, EQUAL["least-latency"])
    assert 1 in {by.pick() for _ in range(50)}
    assert by.strategy.fallbacks == 0


# -- bursts


@pytest.mark.parametrize("name", ["least-request", "round-robin"])
def test_a_hundred_at_once_over_ten_pods_are_ten_each(name: str) -> None:
    assert router(name, *[{}] * 10).burst() == [10] * 10


def test_power_of_two_spreads_a_burst() -> None:
    counts = router("power-of-two", *[{}] * 10).burst()
    assert max(counts) - min(counts) <= 4


@pytest.mark.parametrize("name", EQUAL)
def test_between_two_polls_requests_do_not_pile_up_on_one_pod(name: str) -> None:
    counts = router(name, *[EQUAL[name]] * 10).burst()
    assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize("name", ["least-busy-time", "least-latency", "throughput"])
def test_a_burst_does_not_pile_up_on_the_best_pod(name: str) -> None:
    better = {key: value * 0.5 for key, value in EQUAL[name].items()}
    counts = router(name, better, *[EQUAL[name]] * 9).burst()
    assert counts[0] == max(counts)
    assert counts[0] < 40
    assert min(counts) > 0


@pytest.mark.parametrize("room", [{}, {"num_gpu_blocks": 20_000.0, "block_size": 16.0}, {"num_gpu_blocks": 0.0}])
@pytest.mark.parametrize("name", ["least-gpu-cache", "least-kv-cache", "least-utilization"])
def test_prompts_sent_since_the_last_poll_fill_the_cache(name: str, room: dict[str, float]) -> None:
    """Also where the engine does not say how much it holds."""
    by = router(name, {**EQUAL[name], **room, "kv_usage": 0.40}, {**EQUAL[name], **room, "kv_usage": 0.45})
    counts = by.burst(100, tokens=4000)
    assert 40 < counts[1] < counts[0]


def test_published_utilization_grows_with_what_was_sent() -> None:
    assert min(router("least-utilization", {"utilization": 0.30}, {"utilization": 0.31}).burst(100, 4000)) > 40


def test_requests_before_the_last_poll_are_not_counted_twice() -> None:
    by = router("least-busy-time", {"busy_ratio": 0.5}, {"busy_ratio": 0.6})
    for _ in range(10):
        by.tables.ledger.charge(0, 400, 400, held=True)
    set_row(by.tables, 0, busy_ratio=0.5)
    assert by.scores() == [0.5, 0.6]


# -- what is not known


@pytest.mark.parametrize("name", EQUAL)
def test_when_no_metric_is_known_the_fewest_requests_decide_and_it_is_counted(name: str) -> None:
    by = router(name, *[{}] * 5)
    assert by.burst(50) == [10] * 5
    assert by.strategy.fallbacks == 50


@pytest.mark.parametrize("name", ["least-busy-time", "least-gpu-cache", "least-kv-cache", "throughput"])
def test_a_pod_without_the_metric_is_neither_shunned_nor_flooded(name: str) -> None:
    rows = [{key: value * (1 + slot / 50) for key, value in EQUAL[name].items()} for slot in range(9)]
    by = router(name, {}, *rows)
    count = by.burst(300)[0]
    assert 5 <= count <= 100
    assert by.strategy.fallbacks == 0


@pytest.mark.parametrize("name", [*EQUAL, "random", "round-robin", "least-request", "power-of-two"])
@settings(max_examples=40)
@given(st.data())
def test_any_metrics_give_a_pod(name: str, data: Any) -> None:
    value = st.one_of(st.just(NAN), st.just(0.0), st.floats(0, 1e9), st.just(float("inf")))
    metrics = sorted({key for row in (*EQUAL.values(), *LIKED["least-latency"]) for key in row})
    metrics += ["utilization", "num_gpu_blocks", "block_size", "prompt_tokens_mean", "e2e_mean_seconds"]
    by = _ROUTERS.setdefault(name, router(name, {}, {}, {}))
    for slot in range(3):
        set_row(
            by.tables, slot, **{metric: data.draw(value) for metric in data.draw(st.lists(st.sampled_from(metrics)))}
        )
    with np.errstate(all="ignore"):
        assert by.pick(data.draw(st.integers(0, 10**8))) in (0, 1, 2)


_ROUTERS: dict[str, Router] = {}


@given(st.lists(st.one_of(st.floats(allow_nan=True, allow_infinity=True)), min_size=1, max_size=8), st.integers(0, 99))
def test_lowest_takes_a_lowest_one(scores: list[float], seed: int) -> None:
    index = lowest(scores, random.Random(seed))
    known = [score for score in scores if score == score]
    if not known:
        assert index == -1
    elif index >= 0 and scores[index] == scores[index] and len(known) == len(scores):
        assert scores[index] <= min(scores) + abs(min(scores)) * 1e-8 or scores[index] == min(scores)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 99))
def test_fewest_takes_a_smallest_one(counts: list[int], seed: int) -> None:
    assert counts[fewest(counts, random.Random(seed))] == min(counts)


def test_ties_are_broken_at_random() -> None:
    rng = random.Random(3)
    assert {fewest([2, 1, 1, 5, 1], rng) for _ in range(60)} == {1, 2, 4}
    assert {lowest([2.0, 1.0, 1.0, 5.0, 1.0], rng) for _ in range(60)} == {1, 2, 4}
    assert lowest([NAN, NAN], rng) == -1


def test_the_pods_to_try_next_are_others_even_where_nobody_is_fit() -> None:
    assert smallest([3.0, 1.0, 2.0, 1.0], 0, 2) == [1, 3]
    assert smallest([3.0, 1.0], 0, 5) == [1]
    assert smallest([3.0], 0, 2) == []


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_names_different_pods_for_retries(name: str) -> None:
    roles = ("decode", "decode", "decode", "decode", "prefill") if name == "pd" else ("",) * 4
    records = [make_record(slot, role=role, roleset="rs") for slot, role in enumerate(roles)]
    router = Router(make_fleet(records=records), name)
    candidates, request = router.candidates(), RoutingRequest(MODEL, 100, text=b"x" * 400)
    first = router.strategy.pick(request, candidates, NOW)
    others = router.strategy.next_best(request, candidates, first, 2, NOW)
    assert len({first, *others}) == 3
