"""The strategies that go by prefixes, each as its docstring says."""

from collections import Counter
from typing import Any

import pytest

from router.strategies import STRATEGIES, formula
from router.strategies.weighted import Strategies
from state.ledger import Charge

AWARE = [
    "prefix-cache",
    "prefix-cache-preble",
    "marginal-delay",
    "aibrix-prefix-cache",
    "dynamo-kv",
    "llm-d-default",
    "lmetric",
    "preble",
    "sglang-cache-aware",
]


@pytest.mark.parametrize("name", AWARE)
def test_a_long_prefix_is_followed(lab: Any, prompt: Any, name: str) -> None:
    fleet = lab(8, waiting=0.0, running=0.0, kv_usage=0.1)
    first = fleet.send(name, fleet.request(prompt("system", 16) + b"alice"))
    fleet.now += 5
    fleet.finish()
    assert fleet.send(name, fleet.request(prompt("system", 16) + b"bob")) == first


@pytest.mark.parametrize("name", [*AWARE, "consistent-hash-bounded", "vtc-basic"])
def test_an_idle_fleet_is_used_evenly_by_unlike_prompts(lab: Any, prompt: Any, name: str) -> None:
    fleet = lab(4, waiting=0.0, running=0.0, kv_usage=0.1)
    if name == "llm-d-default":
        pytest.skip("by chance alone between two polls")
    spread = Counter(fleet.send(name, fleet.request(prompt(f"user {i}", 4))) for i in range(80))
    assert len(spread) == 4
    assert max(spread.values()) <= 26


@pytest.mark.parametrize("name", AWARE)
def test_they_work_without_prefix_knowledge(lab: Any, prompt: Any, name: str) -> None:
    fleet = lab(4, waiting=0.0, running=0.0, kv_usage=0.1)
    fleet.worker()[2].prefixes = None
    request = fleet.request(prompt("a", 4))
    fleet.send(name, request)
    assert request.uncached_tokens == 1024


@pytest.mark.parametrize(
    ("value", "like"),
    [
        ("prefix-cache:1,preble:1", "prefix-cache"),
        ("lmetric,dynamo-kv,least-request", "lmetric"),
        ("prefix-cache:3,marginal-delay", "marginal-delay"),
        ("marginal-delay,preble", "marginal-delay"),
        ("least-request,prefix-cache", "prefix-cache"),
    ],
)
def test_in_a_combination_a_prompt_is_remembered_and_promised_once(
    lab: Any, prompt: Any, value: str, like: str
) -> None:
    def sent(name: str) -> tuple[float, int]:
        fleet = lab(2, waiting=0.0, running=0.0, kv_usage=0.1)
        tables, _, context = fleet.worker()
        fleet.strategies[(name, 0)] = Strategies(STRATEGIES, context).get(name)
        slot = fleet.send(name, fleet.request(prompt("system", 16)))
        return tables.ledger.busy_until(2)[slot] - fleet.now, sum(tables.prefix_log.heads.tolist())

    assert sent(value) == sent(like)


@pytest.mark.parametrize("name", ["prefix-cache", "prefix-cache-preble"])
@pytest.mark.parametrize("pods", [2, 3, 8])
def test_an_overloaded_pods_cache_is_left_alone_in_small_fleets_too(
    lab: Any, prompt: Any, name: str, pods: int
) -> None:
    fleet = lab(pods)
    first = fleet.send(name, fleet.request(prompt("system", 16)))
    fleet.load(first, 3)
    assert fleet.send(name, fleet.request(prompt("system", 16))) == first
    fleet.load(first, 2)
    assert fleet.send(name, fleet.request(prompt("system", 16))) != first


def test_prefix_cache_lets_load_decide_between_equal_matches(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    candidates = fleet.candidates()
    for index in range(4):
        fleet.worker()[2].prefixes.remember(fleet.request(prompt("system", 8)), candidates, index, fleet.now)
    for slot in (0, 2, 3):
        fleet.load(slot, 1)
    assert fleet.send("prefix-cache", fleet.request(prompt("system", 8) + prompt("x", 2))) == 1


def test_prefix_cache_needs_a_useful_match(lab: Any, prompt: Any) -> None:
    """One block of 64 tokens in common does not draw a request to a busier pod; eight do."""
    fleet = lab(2)
    candidates = fleet.candidates()
    fleet.worker()[2].prefixes.remember(fleet.request(prompt("head", 0.25)), candidates, 0, fleet.now)
    fleet.load(0, 2)
    assert fleet.send("prefix-cache", fleet.request(prompt("head", 0.25) + prompt("a", 8))) == 1
    fleet.worker()[2].prefixes.remember(fleet.request(prompt("long", 2)), candidates, 0, fleet.now)
    assert fleet.send("prefix-cache", fleet.request(prompt("long", 2) + prompt("b", 8))) == 0


def test_aibrix_takes_any_match_within_its_guards(lab: Any, prompt: Any) -> None:
    fleet = lab(8)
    candidates = fleet.candidates()
    fleet.worker()[2].prefixes.remember(fleet.request(prompt("head", 0.25)), candidates, 5, fleet.now)
    fleet.load(5, 3)
    for slot in (0, 1, 2, 3):
        fleet.load(slot, 3)
    assert fleet.send("aibrix-prefix-cache", fleet.request(prompt("head", 0.25) + prompt("a", 8))) == 5


def test_aibrix_asks_only_the_least_loaded_when_the_spread_is_above_16(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    first = fleet.send("aibrix-prefix-cache", fleet.request(prompt("system", 16)))
    fleet.load(first, 15)
    assert fleet.send("aibrix-prefix-cache", fleet.request(prompt("system", 16))) == first
    assert fleet.send("aibrix-prefix-cache", fleet.request(prompt("system", 16))) != first


def test_aibrix_deviations_cannot_protect_five_pods_but_six(lab: Any, prompt: Any) -> None:
    for pods, protected in ((5, False), (6, True)):
        fleet = lab(pods)
        first = fleet.send("aibrix-prefix-cache", fleet.request(prompt("system", 16)))
        fleet.load(first, 14)
        again = fleet.send("aibrix-prefix-cache", fleet.request(prompt("system", 16)))
        assert (again != first) is protected


def test_dynamo_adds_prefill_and_decode_blocks(lab: Any, prompt: Any) -> None:
    fleet = lab(2)
    fleet.scores("dynamo-kv", fleet.request(tokens=640))
    fleet.promise(0, 640)
    assert fleet.scores("dynamo-kv", fleet.request(tokens=640)) == pytest.approx([10 + 10 + 10 + 10, 10 + 10], rel=0.1)


def test_lmetric_is_tokens_times_requests(lab: Any) -> None:
    fleet = lab(2)
    fleet.load(0, 3)
    assert fleet.scores("lmetric", fleet.request(tokens=1000)) == [4000.0, 1000.0]


def test_sglang_goes_by_load_when_unbalanced_or_below_its_threshold(lab: Any, prompt: Any) -> None:
    name = "sglang-cache-aware"
    fleet = lab(3)
    first = fleet.send(name, fleet.request(prompt("system", 2)))
    assert fleet.send(name, fleet.request(prompt("system", 2) + prompt("a", 4))) == first  # 0.33 matched
    assert fleet.send(name, fleet.request(prompt("system", 2) + prompt("b", 6))) != first  # 0.25
    fleet.load(first, 61)
    alone = prompt("system", 2) + prompt("a", 4)
    assert fleet.send(name, fleet.request(alone)) == first
    fleet.load(first, 1)
    assert fleet.send(name, fleet.request(alone)) != first


def test_llm_d_weighs_queue_cache_room_and_match(lab: Any, prompt: Any) -> None:
    fleet = lab(3, waiting=0.0, kv_usage=0.0)
    fleet.poll(0, waiting=4.0, kv_usage=0.5)
    fleet.poll(1, waiting=1.0, kv_usage=0.2)
    found = fleet.scores("llm-d-default", fleet.request(prompt("a", 4)))
    assert found == pytest.approx([-(0 + 1.0), -(2 * 0.75 + 1.6), -(2 + 2.0)])
    fleet.worker()[2].prefixes.remember(fleet.request(prompt("b", 4)), fleet.candidates(), 1, fleet.now)
    matched = fleet.scores("llm-d-default", fleet.request(prompt("b", 4) + prompt("c", 4)))
    assert matched[1] == pytest.approx(found[1] - 1.5)


def test_preble_exploits_above_half_and_explores_below(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    first = fleet.send("preble", fleet.request(prompt("system", 2)))
    assert fleet.send("preble", fleet.request(prompt("system", 2) + prompt("a", 1.5))) == first
    assert fleet.send("preble", fleet.request(prompt("system", 2) + prompt("b", 16))) != first


def test_preble_remembers_three_minutes_of_work(lab: Any, prompt: Any) -> None:
    fleet = lab(2)
    fleet.scores("preble", fleet.request(tokens=10))
    fleet.tables.ledger.charge(0, 7000, 7000, held=False)
    fleet.now += 20
    assert fleet.scores("preble", fleet.request(tokens=10))[0] > 0.4
    for _ in range(20):
        fleet.now += 10
        scores = fleet.scores("preble", fleet.request(tokens=10))
    assert scores[0] == pytest.approx(scores[1])


def test_a_conversation_stays_on_its_pod_until_that_is_full(lab: Any, prompt: Any) -> None:
    name = "consistent-hash-bounded"
    fleet = lab(4)
    first = fleet.send(name, fleet.request(prompt("a", 4), session_key="s"))
    for slot in range(4):
        fleet.load(slot, 8)
    assert [fleet.send(name, fleet.request(prompt(str(i), 4), session_key="s")) for i in range(2)] == [first] * 2
    spread = Counter(fleet.send(name, fleet.request(prompt(str(i), 4), session_key="s")) for i in range(40))
    assert max(spread.values()) < 30
    assert max(fleet.candidates().requests()) <= 1.25 * (fleet.candidates().requests().sum() + 1) / 4 + 1


def test_a_pod_that_leaves_moves_only_its_own_conversations(lab: Any, prompt: Any) -> None:
    name = "consistent-hash-bounded"
    fleet = lab(4)
    strategy = fleet.strategy(name)

    def places() -> dict[int, int]:
        candidates = fleet.candidates()
        return {
            key: candidates.pods[strategy.pick(fleet.request(session_key=f"k{key}"), candidates, fleet.now)].slot
            for key in range(200)
        }

    before = places()
    fleet.publish(0, 1, 3)
    after = places()
    assert all(after[key] == before[key] for key in before if before[key] != 2)
    assert 20 < sum(before[key] == 2 for key in before) < 90


def test_equal_prompts_without_a_session_share_a_pod(lab: Any, prompt: Any) -> None:
    fleet = lab(8)
    fleet.load(0, 100)
    sent = {fleet.send("consistent-hash-bounded", fleet.request(prompt("same", 4))) for _ in range(3)}
    assert len(sent) == 1


def test_every_strategy_explains_itself() -> None:
    for name, kind in STRATEGIES.items():
        assert formula(kind), name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("released", [(1, 1, 1), (2, 2, 2), (3, 0, 0)])
def test_counts_below_zero_are_survived(lab: Any, prompt: Any, name: str, released: tuple[int, ...]) -> None:
    """As a late release of a charge that was given up leaves them until the next poll."""
    fleet = lab(3, waiting=0.0, running=0.0, kv_usage=0.1)
    if name == "pd":
        fleet.divide(waiting=0.0, running=0.0, kv_usage=0.1)
    for slot, count in enumerate(released):
        for _ in range(count):
            fleet.tables.ledger.release(Charge(slot, slot + 1, 100), held=False)
    sent = Counter(fleet.send(name, fleet.request(prompt(f"user {i}", 2), session_key=f"s{i}")) for i in range(30))
    assert len(sent) == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_pod_that_says_nothing_of_itself_is_neither_flooded_nor_shunned(lab: Any, prompt: Any, name: str) -> None:
    said = {"waiting": 0.0, "running": 2.0, "kv_usage": 0.4, "busy_ratio": 0.5, "num_gpu_blocks": 4000.0}
    said |= {"block_size": 16.0, "prompt_tokens_per_second": 900.0, "generation_tokens_per_second": 200.0}
    said |= {"prefill_mean_seconds": 0.1, "decode_mean_seconds": 2.0, "prompt_tokens_mean": 500.0}
    fleet = lab(3, **said)
    fleet.add(3)
    if name == "pd":
        fleet.divide(**said)
    sent: Counter[int] = Counter()
    for number in range(200):
        fleet.now += 0.1
        sent[fleet.send(name, fleet.request(prompt(f"user {number}", 2), session_key=f"s{number}"))] += 1
        if number % 10 == 9:
            fleet.finish()
            for slot in range(3):
                fleet.poll(slot, **said)
            fleet.poll(3)
    assert 15 <= sent[3] <= 110
    assert max(sent.values()) <= 110
