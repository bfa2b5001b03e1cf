"""The kept coefficients give the scores that the formula gives, for all pods at once, for some and for one."""

import random
from typing import Any

import numpy as np
import pytest

from router.attention import SENT_SECONDS
from router.backlog import FIRST_STEPS
from router.fleet import Candidates
from router.rates import Prior
from router.request import RoutingRequest
from router.strategies.delays import KEPT_SECONDS, MAX_BUSY, Chance, Delays
from state.pods import Floats

NAME = "marginal-delay"


def by_the_formula(fleet: Any, request: RoutingRequest) -> Floats:
    """`MarginalDelay`'s docstring, term by term, from what the strategy has looked up."""
    strategy, candidates, now = fleet.strategy(NAME), fleet.candidates(), fleet.now
    _, _, context = fleet.worker()
    prior, speeds = Prior(), context.rates.speeds(candidates, now)
    loads, todo = candidates.loads(), context.backlog.follow(candidates, speeds, now)
    room, full = waits_for_room(strategy.delays(candidates, now), request.prompt_tokens)
    common = request.prefix.uncached_and_scarce(context.prefixes.index, now, full)
    u, scarce = np.full(len(candidates), common[0]), np.full(len(candidates), common[1])
    for indices, uncached, counted in common[2]:
        u[indices], scarce[indices] = uncached, counted
    prompt, mean = float(request.prompt_tokens), context.backlog.mean_tokens
    output = speeds.output_tokens
    n = loads[0] + speeds.elsewhere
    decoding = 0.5 * (loads[0] + speeds.smoothed_loads[0]) + speeds.elsewhere
    per_request = prior.decode_request_seconds + 0.5 * output * prior.kv_token_seconds
    context_tokens = 0.5 * (loads[1] + speeds.smoothed_loads[1])
    s = (decoding * per_request + context_tokens * prior.kv_token_seconds + speeds.idle_step) * speeds.decode
    served = n if speeds.share_per_request is None else np.minimum(n, 1 / np.maximum(speeds.share_per_request, 1e-6))
    if speeds.kv_share_per_token is not None:
        served = np.minimum(served, n / np.maximum(loads[1] * speeds.kv_share_per_token, 1.0))
    wait = todo * speeds.prefill_seconds
    c = mean * speeds.prefill_seconds[0]
    mean_room, _ = waits_for_room(strategy.delays(candidates, now), mean)
    slack = np.mean(c / (c + wait + mean_room))
    w = np.minimum(todo / mean, n)
    price = 1 + served.mean() + served / 2 + slack * w
    ttft = wait + room + u * speeds.prefill_seconds + (np.where(todo > 0, 0, FIRST_STEPS) + u / prior.step_tokens) * s
    d = (prior.decode_request_seconds + prompt * prior.kv_token_seconds) * speeds.decode
    busy = np.minimum([sent.tokens / SENT_SECONDS for sent in speeds.sent] * speeds.prefill_seconds, MAX_BUSY)
    x = slack / 2 * np.minimum(s * busy / (1 - busy), prior.step_tokens * speeds.prefill_seconds)
    followers = slack * u.min() / u.max() * u.min() * (1 / mean - 1 / context.backlog.mean_prompt)
    total: Floats = (
        ttft
        + price * scarce * speeds.prefill_seconds
        + slack * served / 2 * wait
        + (1 + followers) * output * (s + x + decoding * d)
    )
    return total


def waits_for_room(delays: Delays, prompt: float) -> tuple[Floats, int]:
    """Seconds for each pod, and the pods that have none as a bitmap."""
    full = delays.wait_for_room(prompt)
    return np.array([pod.capacity_wait for pod in delays._pods]), full


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("crowded", [False, True])
def test_scores_are_those_of_the_formula(lab: Any, prompt: Any, seed: int, crowded: bool) -> None:
    chance = random.Random(seed)
    fleet = lab(7, **({"num_gpu_blocks": 400.0, "block_size": 16.0} if crowded else {}))
    for slot in range(7):
        fleet.load(slot, chance.randrange(12), tokens=chance.randrange(100, 900))
    for number in range(30):
        fleet.send(NAME, fleet.request(prompt("shared", 8) + prompt(f"own {number % 9}", 4)))
        fleet.now += chance.random() / 50
    fleet.poll(chance.randrange(7))
    fleet.now += 0.1
    for text in (prompt("shared", 8) + prompt("own 3", 4), prompt("shared", 4) + prompt("new", 1), prompt("new", 12)):
        request = fleet.request(text)
        scores = fleet.scores(NAME, request)
        assert scores == pytest.approx(by_the_formula(fleet, request), rel=1e-6)


def test_what_is_sent_meanwhile_counts_as_if_all_were_worked_out_anew(lab: Any, prompt: Any) -> None:
    fleet = lab(5)
    for slot in range(5):
        fleet.load(slot, 3 + slot)
    for number in range(4):  # all within the time that coefficients are kept
        fleet.send(NAME, fleet.request(prompt(f"user {number}", 4)))
    kept = fleet.scores(NAME, fleet.request(tokens=1000))
    fleet.now += KEPT_SECONDS * 1.01
    anew = fleet.scores(NAME, fleet.request(tokens=1000))
    assert kept == pytest.approx(anew, rel=0.1)
    assert min(kept) == kept[4]  # the one pod that was sent nothing


def test_what_another_worker_sends_is_heard_from_the_log_at_once(lab: Any, prompt: Any) -> None:
    fleet = lab(3)
    before = fleet.scores(NAME, fleet.request(tokens=1000))
    slot = fleet.send(NAME, fleet.request(prompt("long", 64)), worker=1)
    after = fleet.scores(NAME, fleet.request(tokens=1000))
    assert after[slot] - before[slot] > 16_384 / 14_000  # the wait, and its price
    others = [place for place in range(3) if place != slot]
    assert [after[place] for place in others] == pytest.approx([before[place] for place in others], rel=0.05)


def test_chance_is_drawn_for_any_number_of_pods() -> None:
    chance = Chance(random.Random(1))
    drawn = chance.draw(5000)
    assert len(drawn) == 5000 and drawn.min() >= 0 and drawn.max() < 1e-8


def test_equal_pods_are_chosen_alike(lab: Any) -> None:
    fleet = lab(4)
    chosen = []
    for _ in range(200):
        fleet.now += 1.0
        chosen.append(fleet.send(NAME, fleet.request(b"")))
        fleet.finish()
    assert all(20 < chosen.count(slot) < 90 for slot in range(4))


def test_coefficients_belong_to_one_epoch(lab: Any) -> None:
    fleet = lab(2)
    fleet.scores(NAME, fleet.request(tokens=100))
    first: Candidates = fleet.candidates()
    fleet.poll(0)
    fleet.scores(NAME, fleet.request(tokens=100))
    assert fleet.candidates().derived[Delays] is not first.derived[Delays]


def test_what_this_process_sends_through_other_eyes_counts_at_once(lab: Any) -> None:
    """Of the same pods another model, another strategy or a part of them, as a label filter leaves: all charge the
    same ledger, and none waits until all is worked out anew."""
    fleet = lab(4)
    before = fleet.scores(NAME, fleet.request(tokens=1000))
    ledger = fleet.worker()[0].ledger
    some = fleet.candidates().subset([0])
    for _ in range(20):
        fleet.strategy("least-request").pick(fleet.request(tokens=1000), some, fleet.now)
        ledger.charge(0, 1000, 1000, held=False)
    kept = fleet.scores(NAME, fleet.request(tokens=1000))
    assert kept[0] > 2 * before[0]
    assert kept[1:] == pytest.approx(before[1:], rel=0.5)
    for _ in range(200):  # more than is remembered one by one
        ledger.charge(1, 1000, 1000, held=False)
    assert fleet.scores(NAME, fleet.request(tokens=1000))[1] > kept[1]


def test_what_another_worker_sends_is_heard_by_every_model(lab: Any, prompt: Any) -> None:
    """Whoever asks first takes nothing away from the others."""
    fleet = lab(3)
    part = fleet.candidates().subset([1, 2])
    strategy = fleet.strategy(NAME)
    for candidates in (fleet.candidates(), part):
        strategy.scores(fleet.request(tokens=1000), candidates, fleet.now)
    slot = fleet.send(NAME, fleet.request(prompt("long", 64)), worker=1)
    strategy.scores(fleet.request(tokens=1000), part, fleet.now)
    after = fleet.scores(NAME, fleet.request(tokens=1000))
    assert after[slot] > 1.0 + min(after)


def test_short_prompts_of_other_workers_are_heard_too(lab: Any) -> None:
    fleet = lab(3)
    before = fleet.scores(NAME, fleet.request(tokens=1000))
    slots = [fleet.send(NAME, fleet.request(b"hi", tokens=2), worker=1) for _ in range(9)]
    after = fleet.scores(NAME, fleet.request(tokens=1000))
    assert all(after[slot] > before[slot] for slot in set(slots))


def test_what_others_send_is_noted_once_over_all_epochs_and_models(lab: Any, prompt: Any) -> None:
    fleet = lab(3)
    part = fleet.candidates().subset([0, 1, 2])
    sent = fleet.worker()[2].rates.speeds(fleet.candidates(), fleet.now).sent
    fleet.scores(NAME, fleet.request(tokens=1000))
    slots = [fleet.send(NAME, fleet.request(prompt(f"user {number}", 8)), worker=1) for number in range(4)]
    for _ in range(3):
        fleet.scores(NAME, fleet.request(tokens=1000))
        fleet.strategy(NAME).scores(fleet.request(tokens=1000), part, fleet.now)
        assert [noted.tokens for noted in sent] == pytest.approx([2048 * slots.count(slot) for slot in range(3)])
        fleet.publish()  # another epoch
