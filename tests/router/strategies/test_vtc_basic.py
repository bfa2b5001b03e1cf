"""Users who use much apart from users who use little, by tokens that are really counted."""

from collections import Counter, defaultdict
from typing import Any

import pytest
from exchanges import Contract, completion, response_with
from fleet import chat, loads, request_body, request_headers, response_body

from router.strategies import STRATEGIES
from router.strategies.weighted import Strategies
from state.user_tokens import cells_of

NAME = "vtc-basic"


def vtc(fleet: Any, worker: int = 0) -> Any:
    tables, _, context = fleet.worker(worker)
    context.user_tokens = tables.user_tokens
    return fleet.strategy(NAME, worker)


def counted(tables: Any, user: str, now: float) -> float:
    first, second = cells_of(user)
    totals = tables.user_tokens.totals(now)
    return float(min(totals[0, first], totals[1, second]))


def shares(requests: list[int]) -> list[float]:
    return [count / sum(requests) for count in requests]


def test_forty_users_spread_over_the_pods() -> None:
    contract = Contract(8, strategy=NAME)
    for i in range(400):
        contract.routed(user=f"u{i % 40}")
        for _ in range(100):  # 10 ms
            next(contract.clock)
    assert max(loads(contract.tables)[:8]) <= 60
    assert min(loads(contract.tables)[:8]) >= 40


@pytest.mark.parametrize("pods", [2, 3, 8, 40])
@pytest.mark.parametrize("tokens", [1, 500, 20_000])
def test_users_who_use_alike_are_spread_evenly_and_keep_their_pods(lab: Any, pods: int, tokens: int) -> None:
    fleet = lab(pods)
    vtc(fleet)
    where: dict[str, Counter[int]] = defaultdict(Counter)
    for turn in range(30):
        for number in range(40):
            fleet.now += 0.05
            user = f"u{number}"
            slot = fleet.send(NAME, fleet.request(tokens=tokens + number * tokens // 80, user=user))
            if turn >= 10:
                where[user][slot] += 1
        fleet.finish()
    total = sum(where.values(), Counter())
    mean = 800 / pods
    assert max(total.values()) <= 1.35 * mean + 10
    assert min(total[slot] for slot in range(pods)) >= 0.65 * mean - 10
    at_home = sum(sum(count for _, count in slots.most_common(2)) for slots in where.values())
    assert at_home >= 0.9 * 800


def test_users_seen_for_the_first_time_do_not_pile_up(lab: Any) -> None:
    fleet = lab(8)
    vtc(fleet)
    slots: Counter[int] = Counter()
    for number in range(800):  # none of them comes twice
        fleet.now += 0.02
        slots[fleet.send(NAME, fleet.request(tokens=300, user=f"session-{number}"))] += 1
    assert max(slots.values()) <= 150


def test_heavy_users_are_kept_from_light_ones(lab: Any) -> None:
    fleet = lab(8)
    strategy = vtc(fleet)
    slots: dict[str, Counter[int]] = {"heavy": Counter(), "light": Counter()}
    for turn in range(200):
        fleet.now += 0.5
        for user, tokens, answer in (("heavy", 8000, 2000), (f"light-{turn % 20}", 200, 100)):
            request = fleet.request(tokens=tokens, user=user)
            slots[user.partition("-")[0]][fleet.send(NAME, request)] += 1
            strategy.used(user, tokens, tokens, answer, fleet.now)
        fleet.finish()
        if turn == 20:
            for seen in slots.values():
                seen.clear()
    assert not slots["heavy"].keys() & slots["light"].keys()
    assert len(slots["light"]) == 4  # they use a fiftieth, and need not wait behind the one that uses the rest
    assert len(slots["heavy"]) == 4
    assert max(slots["heavy"]) > max(slots["light"])


def test_all_workers_count_together(lab: Any) -> None:
    fleet = lab(4)
    first, second = vtc(fleet, 0), vtc(fleet, 1)
    for _ in range(10):
        fleet.send(NAME, fleet.request(tokens=9_000, user="heavy"), 0)
        first.used("heavy", 9_000, 10_000, 5_000, fleet.now)
    fleet.send(NAME, fleet.request(tokens=120, user="light"), 1)
    second.used("light", 120, 100, 50, fleet.now)
    fleet.finish()
    fleet.now += 1.0
    for worker in (0, 1):
        tables = fleet.worker(worker)[0]
        assert counted(tables, "heavy", fleet.now) == 200_000
        assert counted(tables, "light", fleet.now) == 200
    for worker in (0, 1):
        sent: dict[str, set[int]] = {"heavy": set(), "light": set()}
        for _ in range(10):
            for user, slots in sent.items():
                slots.add(fleet.send(NAME, fleet.request(tokens=1, user=user), worker))
        fleet.finish()
        assert sent["light"] == {0}
        assert sent["heavy"] == {1, 2, 3}


def test_use_is_forgotten_after_the_window(lab: Any) -> None:
    fleet = lab(4)
    strategy = vtc(fleet)
    strategy.used("heavy", 0, 100_000, 0, fleet.now)
    tables = fleet.tables
    assert counted(tables, "heavy", fleet.now) == 100_000
    assert counted(tables, "heavy", fleet.now + 200) == 100_000
    assert counted(tables, "heavy", fleet.now + 301) == 0


def test_an_estimate_that_was_too_high_leaves_nothing_below_zero(lab: Any) -> None:
    fleet = lab(4)
    strategy = vtc(fleet)
    fleet.send(NAME, fleet.request(tokens=5_000, user="a"))
    fleet.now += 250
    strategy.used("a", 5_000, 1_000, 10, fleet.now)
    assert counted(fleet.tables, "a", fleet.now) == 1_020
    assert counted(fleet.tables, "a", fleet.now + 100) == 0
    assert fleet.send(NAME, fleet.request(tokens=1, user="a")) in range(4)


def test_without_a_user_requests_decide(lab: Any) -> None:
    fleet = lab(3)
    vtc(fleet)
    fleet.load(0, 30)
    fleet.load(2, 30)
    assert {fleet.send(NAME, fleet.request(tokens=1)) for _ in range(5)} == {1}


@pytest.mark.parametrize("strategy", [NAME, "vtc-basic:2,least-request"])
def test_what_an_answer_says_it_used_is_counted_for_its_user(strategy: str) -> None:
    contract = Contract(2, strategy=strategy, usage_metrics=True)
    stream = contract.exchange()
    stream.send(request_headers(user="alice"))
    stream.send(request_body(chat(text="x" * 400)))
    now = next(contract.clock)
    estimate = counted(contract.tables, "alice", now)
    assert estimate > 0
    stream.send(response_with("200", content_type="application/json"))
    stream.send(response_body(completion(), eos=True))
    assert counted(contract.tables, "alice", now) == 5 + 2 * 7


def test_a_part_of_a_combination_counts_too(lab: Any) -> None:
    fleet = lab(2)
    tables, _, context = fleet.worker()
    context.user_tokens = tables.user_tokens
    fleet.strategies[("both", 0)] = Strategies(STRATEGIES, context).get("vtc-basic,least-request")
    fleet.send("both", fleet.request(tokens=70, user="alice"))
    assert counted(tables, "alice", fleet.now) == 70
