"""What `marginal-delay` says it does, on fleets made by hand."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from router.rates import STALE_SECONDS, Prior

NAME = "marginal-delay"


def test_a_second_request_with_the_same_long_prefix_follows_the_first(lab: Any, prompt: Any) -> None:
    fleet = lab(8)
    first = fleet.send(NAME, fleet.request(prompt("system", 16) + b"alice"))
    fleet.now += 5
    assert fleet.send(NAME, fleet.request(prompt("system", 16) + b"bob")) == first


def test_a_prompt_follows_its_prefix_from_any_worker(lab: Any, prompt: Any) -> None:
    fleet = lab(8)
    first = fleet.send(NAME, fleet.request(prompt("system", 16)), worker=0)
    fleet.now += 5
    assert {fleet.send(NAME, fleet.request(prompt("system", 16)), worker=worker) for worker in (1, 2, 0)} == {first}


def test_a_prompt_leaves_its_prefix_where_computing_it_elsewhere_is_quicker(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    first = fleet.send(NAME, fleet.request(prompt("system", 8)))
    fleet.now += 5
    fleet.promise(first, 200_000)  # 14 seconds of prefill
    assert fleet.send(NAME, fleet.request(prompt("system", 8))) != first


def test_the_score_is_the_sum_of_the_delays(lab: Any) -> None:
    """One pod with 10 requests of 400 tokens, one with 3, nothing cached, nothing learnt."""
    fleet = lab(2)
    fleet.load(0, 10)
    fleet.load(1, 3)
    p = Prior()
    u, output, mean = 1000.0, 200.0, 6.5
    expected = []
    for n in (10, 3):
        compute = u * p.prefill_token_seconds
        context = n * (400 + output / 2)
        step = p.step_seconds + n * p.decode_request_seconds + context * p.kv_token_seconds
        ttft = compute + (1.5 + u / p.step_tokens) * step
        slower = p.decode_request_seconds + u * p.kv_token_seconds
        expected.append(ttft + output * step + (1 + mean + n / 2) * compute + n * output * slower)
    assert fleet.scores(NAME, fleet.request(tokens=1000)) == pytest.approx(expected)


def test_the_terms_of_a_receipt_add_up_to_the_score(lab: Any, prompt: Any) -> None:
    fleet = lab(4, num_gpu_blocks=100.0, block_size=16.0)
    for slot, requests in enumerate((1, 5, 0, 2)):
        fleet.load(slot, requests)
    fleet.send(NAME, fleet.request(prompt("system", 16)))
    fleet.promise(3, 20_000)
    asked = fleet.request(prompt("system", 16) + prompt("own", 4))
    scores = np.array(fleet.scores(NAME, asked))
    terms = fleet.strategy(NAME).terms(asked, fleet.candidates(), fleet.now)
    assert list(terms) == ["queue", "prefill", "answer", "others", "evicted", "followers"]
    assert np.sum(list(terms.values()), 0) == pytest.approx(scores, abs=1e-8)
    assert terms["prefill"].min() < terms["prefill"].max()
    assert terms["queue"].argmax() == 3


def test_tokens_late_in_a_prompt_count_more(lab: Any, prompt: Any) -> None:
    """Three idle pods, one of which holds the first half of a prompt, where attention is half of the mean cost."""
    fleet = lab(3)
    first = fleet.send(NAME, fleet.request(prompt("begin", 16)))
    fleet.finish()
    fleet.now += 60
    fleet.poll(0)
    speeds = fleet.worker()[2].rates.speeds(fleet.candidates(), fleet.now)
    speeds.flat, speeds.slope = 0.5, 2e-4
    whole = fleet.request(prompt("begin", 16) + prompt("end", 16))
    scores = fleet.scores(NAME, whole)
    p, size = Prior(), whole.prefix.prompt_tokens
    uncached = whole.prefix.uncached()
    assert size / 3 < uncached[first] < size / 2 < min(np.delete(uncached, first))
    for pod, u in enumerate(uncached):
        compute = u * (0.5 + 2e-4 * (size - u / 2)) * p.prefill_token_seconds
        ttft = compute + (1.5 + u / p.step_tokens) * p.step_seconds
        assert scores[pod] == pytest.approx(ttft + 200.0 * p.step_seconds + compute, rel=1e-3)


def test_what_a_prompt_pushes_out_of_a_full_cache_counts(lab: Any, prompt: Any) -> None:
    """Two pods with hardly any slack, one of which loses half a token for each that it computes."""
    fleet = lab(2)
    for slot in range(2):
        fleet.promise(slot, 14_000_000)
    before = np.array(fleet.scores(NAME, fleet.request(prompt("any", 4), tokens=1000)))
    fleet.worker()[2].prefixes.index.recompute_per_token[0] = 0.5
    fleet.now += 0.02
    after = np.array(fleet.scores(NAME, fleet.request(prompt("any", 4), tokens=1000)))
    lost = (after - before)[0] - (after - before)[1]
    assert lost == pytest.approx(2 * 0.5 * 1000 * Prior().prefill_token_seconds, rel=0.05)  # its own and one other's


def test_the_load_of_the_last_seconds_counts_for_decoding(lab: Any) -> None:
    """Two pods that are equally loaded now, one of which had nothing to do until a moment ago."""
    fleet = lab(2)
    fleet.load(0, 20)
    fleet.scores(NAME, fleet.request(tokens=500))
    fleet.load(1, 20)
    fleet.now += 0.5
    fleet.poll(0)
    old, new = fleet.scores(NAME, fleet.request(tokens=500))
    assert old > new
    for _ in range(30):
        fleet.now += 1
        fleet.poll(0)
        old, new = fleet.scores(NAME, fleet.request(tokens=500))
    assert old == pytest.approx(new, rel=1e-3)


def test_once_requests_wait_everywhere_waits_are_no_longer_evened_out(lab: Any) -> None:
    """Of two pods with a long and a short queue, how much more the long one costs than its wait: for a small prompt
    and a large one, while a third pod has nothing to do, and when it has."""

    def extra(third: int, tokens: int) -> float:
        fleet = lab(3)
        for slot, promised in ((0, 140_000), (1, 70_000), (2, third)):
            fleet.load(slot, 40)
            fleet.promise(slot, promised)
        scores = fleet.scores(NAME, fleet.request(tokens=tokens))
        return float(scores[0] - scores[1] - 5.0)

    for tokens in (100, 10_000):
        assert 0 < extra(140_000, tokens) < 0.4 * extra(0, tokens)


def test_what_other_workers_promised_a_pod_counts_at_once_and_drains(lab: Any) -> None:
    fleet = lab(2)
    idle = fleet.scores(NAME, fleet.request(tokens=500))
    assert idle[0] == pytest.approx(idle[1])
    fleet.promise(0, 28_000, worker=1)
    busy = fleet.scores(NAME, fleet.request(tokens=500))
    assert busy[0] - busy[1] > 28_000 / 14_000
    fleet.now += 1.0
    later = fleet.scores(NAME, fleet.request(tokens=500))
    assert 1.0 < later[0] - later[1] < busy[0] - busy[1] - 0.9
    fleet.now += 1.5
    done = fleet.scores(NAME, fleet.request(tokens=500))
    assert done[0] - done[1] < 0.5  # decoding beside it remains


def test_an_engines_own_queue_corrects_the_account(lab: Any) -> None:
    fleet = lab(2, running=0.0, waiting=0.0)
    fleet.send(NAME, fleet.request(tokens=1000))
    for slot in (0, 1):
        for _ in range(50):
            fleet.promise(slot, 10_000)
    before = fleet.scores(NAME, fleet.request(tokens=500))
    fleet.now += 0.01
    fleet.poll(0, waiting=0.0, running=1.0)  # has nothing waiting, whatever was promised
    after = fleet.scores(NAME, fleet.request(tokens=500))
    assert before[0] == pytest.approx(before[1], rel=0.05)
    assert after[0] < after[1] / 2


def test_a_hundred_identical_requests_at_once_do_not_pile_up(lab: Any, prompt: Any) -> None:
    fleet = lab(8)
    spread = Counter(fleet.send(NAME, fleet.request(prompt("same", 4), tokens=1000)) for _ in range(100))
    assert max(spread.values()) < 40


def test_a_hundred_different_requests_at_once_are_spread_evenly(lab: Any, prompt: Any) -> None:
    fleet = lab(8)
    spread = Counter(fleet.send(NAME, fleet.request(prompt(f"user {i}", 4))) for i in range(100))
    assert len(spread) == 8
    assert max(spread.values()) - min(spread.values()) <= 2


def test_a_prefix_that_all_pods_hold_leaves_the_choice_to_load(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    candidates = fleet.candidates()
    for index in range(4):
        fleet.worker()[2].prefixes.remember(fleet.request(prompt("system", 16)), candidates, index, fleet.now)
    for slot in (0, 1, 3):
        fleet.load(slot, 5)
    assert fleet.send(NAME, fleet.request(prompt("system", 16) + prompt("carol", 1))) == 2


def test_a_restarted_pod_is_no_longer_preferred(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    first = fleet.send(NAME, fleet.request(prompt("system", 16)))
    fleet.now += 60
    fleet.poll(first, incarnation=1.0)
    request = fleet.request(prompt("system", 16))
    fleet.send(NAME, request)
    assert request.uncached_tokens == request.prompt_tokens


def test_the_chosen_pods_uncached_tokens_are_noted(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    fleet.send(NAME, fleet.request(prompt("system", 16)))
    fleet.now += 5
    request = fleet.request(prompt("system", 8) + prompt("alice", 4))
    fleet.send(NAME, request)
    assert request.uncached_tokens == 1024


def test_a_chat_that_goes_on_is_taken_to_begin_with_the_answer(lab: Any, prompt: Any) -> None:
    """200 tokens, the mean answer, are three blocks of 64."""
    fleet = lab(4)
    fleet.send(NAME, fleet.request(prompt("chat", 16)))
    fleet.now += 5
    request = fleet.request(prompt("chat", 16) + prompt("answer and question", 4))
    fleet.send(NAME, request)
    assert request.uncached_tokens == 1024 - 3 * 64


def steps(slower_decode: float, slower_prefill: float, decoding: float, chunk: float) -> dict[str, float]:
    """Metrics of a busy engine whose rates are those of the prior times the given factors: `decoding` requests with
    a mean context of 1100 tokens and `chunk` prompt tokens in each step."""
    p = Prior()
    seconds = slower_decode * (p.step_seconds + decoding * (p.decode_request_seconds + 1100 * p.kv_token_seconds))
    seconds += slower_prefill * chunk * p.prefill_token_seconds
    return {
        "busy_ratio": 1.0,
        "steps_per_second": 1 / seconds,
        "generation_tokens_per_second": decoding / seconds,
        "computed_prompt_tokens_per_second": chunk / seconds,
        "requests_per_second": chunk / seconds / 1000,
        "prompt_tokens_mean": 1000.0,
        "generation_tokens_mean": 200.0,
        "itl_mean_seconds": seconds,
    }


def test_slow_pods_get_less(lab: Any) -> None:
    """Two pods of the same load, one of which is four times slower in all it does."""
    fleet = lab(2)
    for number in range(20):
        fleet.now += 1
        fleet.poll(0, **steps(4, 4, 4 + number % 5, 100 + number))
        fleet.poll(1, **steps(1, 1, 4 + number % 5, 100 + number))
        scores = fleet.scores(NAME, fleet.request(tokens=2000))
    assert scores[0] > 2 * scores[1]
    spread = Counter(fleet.send(NAME, fleet.request(tokens=2000)) for _ in range(60))
    assert spread[1] > 1.7 * spread[0]


def test_what_a_pod_happens_to_compute_does_not_make_it_a_slow_one(lab: Any) -> None:
    """Four pods, of which each in turn seems to be three times slower for a minute; and the first, all the time."""
    chance, slow = lab(4), lab(4)
    for number in range(480):
        for fleet in (chance, slow):
            fleet.now += 1
            for slot in range(4):
                odd = slot == (number // 60 % 4 if fleet is chance else 0)
                fleet.poll(slot, **steps(1, 3 if odd else 1, 2 + (number * 7 + slot * 3) % 10, 600))
            fleet.scores(NAME, fleet.request(tokens=100))
    spreads = []
    for fleet in (chance, slow):
        seconds = fleet.worker()[2].rates.speeds(fleet.candidates(), fleet.now).prefill_seconds
        spreads.append(seconds.max() / seconds.min())
    assert spreads[0] < 1.5
    assert spreads[1] > 2


@pytest.mark.parametrize(("decode", "prefill"), [(1, 1), (3, 3), (0.3, 3), (3, 0.3), (10, 10)])
def test_speeds_are_learnt_from_counted_steps(lab: Any, decode: float, prefill: float) -> None:
    fleet = lab(4)
    for number in range(30):
        fleet.now += 1
        for slot in range(4):
            mix = (number * 7 + slot * 3) % 10
            fleet.poll(slot, **steps(decode, prefill, 2 + mix, 600 - 50 * mix))
        fleet.scores(NAME, fleet.request(tokens=100))
    speeds = fleet.worker()[2].rates.speeds(fleet.candidates(), fleet.now)
    assert speeds.decode == pytest.approx([decode] * 4, rel=0.25)
    assert speeds.prefill_seconds * 14_000 == pytest.approx([prefill] * 4, rel=0.2)


def test_pods_of_two_speeds_do_not_make_prompts_seem_cheap(lab: Any) -> None:
    """The faster half computes more of them, and has more to do in all."""
    fleet = lab(4)
    for number in range(200):
        fleet.now += 1
        for slot in range(4):
            mix = (number * 7 + slot * 3) % 10
            fleet.poll(
                slot, **(steps(1, 1, 20 + mix, 60 - 5 * mix) if slot < 2 else steps(0.5, 0.5, 60 + mix, 140 - 9 * mix))
            )
        fleet.scores(NAME, fleet.request(tokens=100))
    speeds = fleet.worker()[2].rates.speeds(fleet.candidates(), fleet.now)
    assert speeds.prefill_seconds * 14_000 == pytest.approx([1, 1, 0.5, 0.5], rel=0.35)
    assert speeds.decode == pytest.approx([1, 1, 0.5, 0.5], rel=0.15)


def test_learnt_speeds_come_close_to_the_true_ones(lab: Any) -> None:
    """Metrics of an engine twice as slow as the prior, alone on the machine."""
    fleet = lab(1)
    for _ in range(20):
        fleet.now += 1
        fleet.poll(
            0,
            generation_tokens_per_second=5.0,
            requests_per_second=0.1,
            computed_prompt_tokens_per_second=200.0,
            prompt_tokens_mean=2000.0,
            generation_tokens_mean=50.0,
            busy_ratio=0.2,
            itl_mean_seconds=0.0163,
            prefill_mean_seconds=2000 / 7000 + 0.0163,
        )
        fleet.scores(NAME, fleet.request(tokens=100))
    speeds = fleet.worker()[2].rates.speeds(fleet.candidates(), fleet.now)
    assert 1 / speeds.prefill_seconds[0] == pytest.approx(7000, rel=0.25)
    assert speeds.decode[0] == pytest.approx(2.0, rel=0.25)
    assert speeds.output_tokens == pytest.approx(50, rel=1.1)


def test_a_pod_that_joins_is_used_carefully_and_then_fully(lab: Any) -> None:
    fleet = lab(2)
    fleet.scores(NAME, fleet.request(tokens=4000))
    fleet.now += 10
    fleet.add(2)
    young = fleet.scores(NAME, fleet.request(tokens=4000))
    assert young[2] > young[0]
    fleet.now += 60
    for slot in range(3):
        fleet.poll(slot)
    grown = fleet.scores(NAME, fleet.request(tokens=4000))
    assert grown[2] == pytest.approx(grown[0])


def test_what_others_send_to_a_pod_counts(lab: Any) -> None:
    fleet = lab(2, running=0.0, waiting=0.0)
    fleet.poll(0, running=40.0, waiting=0.0)
    scores = fleet.scores(NAME, fleet.request(tokens=500))
    assert scores[0] > scores[1]
    fleet.now += STALE_SECONDS + 1
    fleet.poll(1)
    stale = fleet.scores(NAME, fleet.request(tokens=500))
    assert stale[0] == pytest.approx(stale[1])


def test_modes_tell_what_decisions_are_made_from(lab: Any, prompt: Any) -> None:
    fleet = lab(4, running=0.0, waiting=0.0)
    fleet.send(NAME, fleet.request(prompt("a", 4)))
    modes = fleet.strategy(NAME).modes
    assert modes == {"m": "full"}
    fleet.send(NAME, fleet.request(b"short", tokens=2))
    assert modes == {"m": "no-prefix"}
    fleet.now += STALE_SECONDS + 1
    fleet.send(NAME, fleet.request(prompt("a", 4)))
    assert modes == {"m": "stale-metrics"}
    fleet.send(NAME, fleet.request(b""))
    assert modes == {"m": "requests-only"}


def test_with_nothing_known_the_fewest_requests_win(lab: Any) -> None:
    fleet = lab(4)
    fleet.now += STALE_SECONDS + 1
    spread = Counter(fleet.send(NAME, fleet.request(b"")) for _ in range(40))
    assert spread == {0: 10, 1: 10, 2: 10, 3: 10}


def test_the_clients_own_bound_on_the_output_counts(lab: Any) -> None:
    fleet = lab(2)
    fleet.load(0, 30)
    short = fleet.scores(NAME, fleet.request(tokens=500, max_tokens=1))
    long = fleet.scores(NAME, fleet.request(tokens=500))
    assert (long[0] - long[1]) > 2 * (short[0] - short[1])


def test_a_prefix_in_demand_spreads_over_the_fleet(lab: Any, prompt: Any) -> None:
    """Agents of one root, each going on for itself: one pod cannot serve them all, however much it holds."""
    fleet = lab(8)
    root = prompt("root", 24)
    for number in range(240):
        fleet.now += 0.05
        fleet.send(NAME, fleet.request(root + prompt(f"agent {number}", 2)))
        if number % 40 == 39:
            fleet.finish()
    slots = {fleet.send(NAME, fleet.request(root + prompt(f"last {number}", 2))) for number in range(40)}
    assert len(slots) >= 6


def test_what_one_client_alone_uses_stays_where_it_is(lab: Any, prompt: Any) -> None:
    fleet = lab(8)
    mine = prompt("mine", 24)
    first = fleet.send(NAME, fleet.request(mine))
    for number in range(60):
        fleet.now += 0.2
        fleet.finish()
        fleet.send(NAME, fleet.request(prompt(f"other {number}", 4)))
    fleet.now += 2
    fleet.finish()
    assert fleet.send(NAME, fleet.request(mine + prompt("more", 1))) == first


def test_more_tokens_than_the_kv_cache_holds_are_a_wait(lab: Any) -> None:
    """Two pods of 20 requests each; those of one fit its cache twice over, those of the other half."""
    fleet = lab(2, num_gpu_blocks=1000.0, block_size=16.0)
    fleet.load(0, 20, tokens=1600)
    fleet.load(1, 20, tokens=400)
    for slot in (0, 1):
        fleet.poll(slot)
    full, free = fleet.scores(NAME, fleet.request(tokens=400))
    assert full - free > 200 * Prior().step_seconds  # the mean answer's time, for as many tokens again


def test_room_is_freed_as_slowly_as_answers_come(lab: Any) -> None:
    """As above, but that the answers of the full pod take five times their steps, for all that is computed there."""
    fleet = lab(2, num_gpu_blocks=1000.0, block_size=16.0)
    fleet.load(0, 20, tokens=1600)
    fleet.load(1, 20, tokens=400)
    fleet.poll(0, itl_mean_seconds=5 * Prior().step_seconds)
    fleet.poll(1)
    full, free = fleet.scores(NAME, fleet.request(tokens=400))
    assert full - free > 5 * 200 * Prior().step_seconds


def test_shared_prompts_take_less_room(lab: Any) -> None:
    fleet = lab(2, num_gpu_blocks=1000.0, block_size=16.0)
    fleet.load(0, 20, tokens=1600)
    fleet.load(1, 20, tokens=400)
    for _ in range(40):
        fleet.now += 1
        fleet.poll(0, running=20.0, waiting=0.0, kv_usage=0.2)
        fleet.poll(1, running=20.0, waiting=0.0, kv_usage=0.05)
        full, free = fleet.scores(NAME, fleet.request(tokens=400))
    assert full - free < 100 * Prior().step_seconds


def test_a_queue_for_one_of_an_engines_places_is_a_wait(lab: Any) -> None:
    fleet = lab(2)
    for slot in (0, 1):
        fleet.load(slot, 64)
    for running in (32.0, 31.0, 32.0, 32.0):
        fleet.now += 1
        fleet.poll(0, running=running, waiting=32.0, kv_usage=0.1)
        fleet.poll(1, running=64.0, waiting=0.0, kv_usage=0.1)
        full, free = fleet.scores(NAME, fleet.request(tokens=400))
    assert full - free > 200 * Prior().step_seconds


def test_a_limit_that_one_pod_showed_is_expected_of_its_like(lab: Any) -> None:
    """One pod was seen full with 32 requests and is no more; another now comes to 40, a third ran 64 before."""
    fleet = lab(3)
    for slot, requests in ((0, 40), (1, 10), (2, 40)):
        fleet.load(slot, requests)
    for _ in range(3):
        fleet.now += 1
        fleet.poll(0, running=10.0, waiting=0.0, kv_usage=0.1)
        fleet.poll(1, running=32.0, waiting=5.0, kv_usage=0.1)
        fleet.poll(2, running=64.0, waiting=0.0, kv_usage=0.1)
        fleet.scores(NAME, fleet.request(tokens=400))
    fleet.now += 1
    fleet.poll(1, running=10.0, waiting=0.0, kv_usage=0.1)
    fleet.scores(NAME, fleet.request(tokens=400))
    share_per_request = fleet.worker()[2].rates.speeds(fleet.candidates(), fleet.now).share_per_request
    assert share_per_request.tolist() == [1 / 32, 1 / 32, 0.0]


def test_requests_that_wait_for_room_in_the_kv_cache_show_no_limit(lab: Any) -> None:
    fleet = lab(2)
    fleet.load(0, 40)
    fleet.load(1, 40)
    for usage in (0.99, 0.99, 0.99, 0.2):
        fleet.now += 1
        fleet.poll(0, running=32.0, waiting=5.0 if usage > 0.9 else 0.0, kv_usage=usage)
        fleet.poll(1, running=10.0, waiting=0.0, kv_usage=0.1)
        one, other = fleet.scores(NAME, fleet.request(tokens=400))
    assert abs(one - other) < 0.1 * 200 * Prior().step_seconds


def test_a_prefix_whose_only_pod_is_full_is_worth_a_copy(lab: Any, prompt: Any) -> None:
    """The more so the more ask for it, and the more pods have room; where one of its pods has room it is not."""
    fleet = lab(4)
    _, _, context = fleet.worker()
    candidates, index = fleet.candidates(), context.prefixes.index
    hot = prompt("hot", 16)
    for uses in (1, 8):
        for _ in range(uses):
            context.prefixes.remember(fleet.request(hot), candidates, 0, fleet.now)
        for number in range(400):  # of all prompts of late it is few that have it
            context.prefixes.remember(fleet.request(prompt(f"{uses} {number}", 1)), candidates, 1, fleet.now)
        found = context.prefixes.look_up(fleet.request(hot), candidates, fleet.now)

        def price_of_a_copy(full: int, found: Any = found) -> float:
            return float(found.uncached_and_scarce(index, fleet.now, full)[1])

        assert found.uncached_and_scarce(index, fleet.now)[:2] == (4096.0, 4096.0)
        assert price_of_a_copy(0b1110) == 4096
        shared = 1 - (1 if uses == 1 else 9) / ((1 if uses == 1 else 9) + 1)
        assert price_of_a_copy(0b0001) == pytest.approx(4096 * (1 - 0.75 * (1 - shared)))
        assert price_of_a_copy(0b0111) == pytest.approx(4096 * (1 - 0.25 * (1 - shared)))
        assert price_of_a_copy(0b1111) == 4096


def test_a_prefix_whose_pods_are_all_busy_is_worth_a_copy(lab: Any, prompt: Any) -> None:
    """The more so the more prompts go on from it, the fewer copies there are, and the more one made now is worth."""
    fleet = lab(4)
    _, _, context = fleet.worker()
    candidates, index = fleet.candidates(), context.prefixes.index
    hot = prompt("hot", 16)
    for number in range(25):
        context.prefixes.remember(fleet.request(hot + prompt(f"own {number}", 1)), candidates, 0, fleet.now)
    for number in range(1000):  # of all prompts of late it is few that have it
        context.prefixes.remember(fleet.request(prompt(f"other {number}", 1)), candidates, 1, fleet.now)

    def price_of_a_copy(busy: int, worth: float = 1.0) -> float:
        found = context.prefixes.look_up(fleet.request(hot), candidates, fleet.now)
        return float(found.uncached_and_scarce(index, fleet.now, 0, busy, worth)[1])

    assert price_of_a_copy(0b1110) == 4096
    sharing = 3 * (25 - 5) / 2
    assert price_of_a_copy(0b0001) == pytest.approx(4096 / (1 + sharing))
    assert price_of_a_copy(0b0001, 0.5) == pytest.approx(4096 / (1 + sharing / 2))
    assert price_of_a_copy(0b1111, 0.0) == 4096
    context.prefixes.remember(fleet.request(hot), candidates, 1, fleet.now)
    assert price_of_a_copy(0b0001) == 4096, "one of its pods is not busy"
    assert price_of_a_copy(0b0011) == pytest.approx(4096 / (1 + sharing / 3))


def test_a_new_prefix_is_in_demand_as_its_share_of_all_prompts_says(lab: Any, prompt: Any) -> None:
    """Not as few as those are that had the time to ask for it."""
    fleet = lab(4)
    _, _, context = fleet.worker()
    candidates, index = fleet.candidates(), context.prefixes.index
    for number in range(1000):
        context.prefixes.remember(fleet.request(prompt(f"other {number}", 1)), candidates, 1, fleet.now)
    hot = prompt("hot", 16)
    for number in range(4):
        context.prefixes.remember(fleet.request(hot + prompt(f"own {number}", 1)), candidates, 0, fleet.now)
    found = context.prefixes.look_up(fleet.request(hot), candidates, fleet.now)
    prompts = 1000 + 4 + 4  # one more for each candidate, in doubt
    sharing = 3 * (4 - 2) / 2 * prompts / (prompts - 1000)
    assert found.uncached_and_scarce(index, fleet.now, 0, 0b0001)[1] == pytest.approx(4096 / (1 + sharing))


def test_the_turns_of_one_conversation_are_no_demand_for_copies(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    _, _, context = fleet.worker()
    candidates, index = fleet.candidates(), context.prefixes.index
    text = b""
    for turn in range(16):
        text += prompt(f"turn {turn}", 1)
        context.prefixes.remember(fleet.request(text), candidates, 0, fleet.now)
        for number in range(100):
            context.prefixes.remember(fleet.request(prompt(f"{turn} {number}", 1)), candidates, 1, fleet.now)
    found = context.prefixes.look_up(fleet.request(text), candidates, fleet.now)
    assert found.uncached_and_scarce(index, fleet.now, 0, 0b0001)[1] == 4096


def test_what_a_copy_is_worth_depends_on_the_slack_and_on_what_is_found(lab: Any, prompt: Any) -> None:
    """Nothing while all prefixes are new; all of it where nobody waits and half of the prompts is found."""
    fleet = lab(2)
    strategy = fleet.strategy(NAME)
    backlog = fleet.worker()[2].backlog

    def worth(mean_prompt: float, mean_computed: float) -> tuple[float, float]:
        backlog.mean_prompt, backlog.mean_tokens = mean_prompt, mean_computed
        fleet.now += 1
        delays = strategy.up_to_date(fleet.candidates(), fleet.now)
        return delays.worth, delays.slack

    assert worth(4000.0, 4000.0) == (0.0, 1.0)
    assert worth(4000.0, 3200.0) == (pytest.approx(0.25), 1.0)
    assert worth(4000.0, 2000.0) == (1.0, 1.0)
    assert worth(4000.0, 400.0) == (1.0, 1.0)
    fleet.promise(0, 400_000)
    found, slack = worth(4000.0, 400.0)
    assert found == slack == pytest.approx(0.5, abs=0.01)


def test_a_copy_is_charged_less_the_more_it_is_worth(lab: Any, prompt: Any) -> None:
    """Of a prefix whose only pod is busy, by what pods are charged for it that do not have it."""
    fleet = lab(4)
    _, _, context = fleet.worker()
    candidates, backlog = fleet.candidates(), context.backlog
    hot = prompt("hot", 16)
    for number in range(25):
        context.prefixes.remember(fleet.request(hot + prompt(f"own {number}", 1)), candidates, 0, fleet.now)
    for number in range(400):
        context.prefixes.remember(fleet.request(prompt(f"other {number}", 1)), candidates, 1, fleet.now)
    fleet.promise(0, 20_000)
    asked = fleet.request(hot)
    charged = []
    for backlog.mean_tokens in (4000.0, 3000.0, 400.0):
        backlog.mean_prompt = 4000.0
        fleet.now += 0.1
        charged.append(fleet.strategy(NAME).terms(asked, fleet.candidates(), fleet.now)["others"][3])
    assert charged == sorted(charged, reverse=True)
    assert charged[1] < 0.5 * charged[0]


def test_pods_that_were_promised_prefill_are_busy_until_it_is_done(lab: Any, prompt: Any) -> None:
    fleet = lab(3)
    strategy = fleet.strategy(NAME)
    assert strategy.up_to_date(fleet.candidates(), fleet.now).busy == 0
    first = fleet.send(NAME, fleet.request(prompt("one", 16), tokens=4096))
    second = fleet.send(NAME, fleet.request(prompt("two", 16), tokens=4096))
    assert strategy.delays(fleet.candidates(), fleet.now).busy == 1 << first | 1 << second
    fleet.now += 60
    assert strategy.delays(fleet.candidates(), fleet.now).busy == 0


def test_an_engine_in_which_nothing_runs_has_nothing_to_do(lab: Any, prompt: Any) -> None:
    """However wrong the speed is by which its prompt was reckoned: what was promised before that poll is done."""
    fleet = lab(2)
    fleet.send(NAME, fleet.request(prompt("system", 40), tokens=20_000))
    (slot,) = [charge.slot for _, charge in fleet.charges]

    def waits() -> float:
        _, _, context = fleet.worker()
        candidates = fleet.candidates()
        speeds = context.rates.speeds(candidates, fleet.now)
        return float(context.backlog.follow(candidates, speeds, fleet.now)[slot])

    fleet.now += 0.1
    fleet.poll(slot, running=0, waiting=0)
    assert waits() > 10_000, "it may be on its way"
    fleet.finish()
    fleet.now += 0.1
    fleet.poll(slot, running=1, waiting=0)
    assert waits() > 10_000, "somebody else's may be it"
    fleet.poll(slot, running=0, waiting=0)
    assert waits() == 0
    assert fleet.send(NAME, fleet.request(prompt("system", 40), tokens=20_000)) == slot


def test_few_uses_among_few_prompts_are_no_demand_for_copies(lab: Any, prompt: Any) -> None:
    fleet = lab(4)
    _, _, context = fleet.worker()
    candidates, index = fleet.candidates(), context.prefixes.index
    hot = prompt("hot", 16)

    def price_of_a_copy(uses: int, others: int) -> float:
        for _ in range(uses):
            context.prefixes.remember(fleet.request(hot), candidates, 0, fleet.now)
        for number in range(others):
            context.prefixes.remember(fleet.request(prompt(f"{uses} {number}", 1)), candidates, 1, fleet.now)
        return float(
            context.prefixes.look_up(fleet.request(hot), candidates, fleet.now).uncached_and_scarce(index, fleet.now)[1]
        )

    assert price_of_a_copy(2, 10) == 4096  # of 12: a share of 1/6 would want to be on 4/3 of 4 pods
    fleet.now += 1000
    assert price_of_a_copy(16, 28) == 4096 * (1 / 2) ** 2  # (16 - 4) of 44 and one for each pod, on 2 pods


def test_what_is_new_and_in_demand_is_copied_soon(lab: Any, prompt: Any) -> None:
    """Its share is that of the prompts since its first use."""
    fleet = lab(4)
    _, _, context = fleet.worker()
    candidates, index = fleet.candidates(), context.prefixes.index

    def send(text: bytes, slot: int) -> None:
        context.prefixes.remember(fleet.request(text), candidates, slot, fleet.now)

    for number in range(200):
        send(prompt(f"before {number}", 1), 1)
    for number in range(16):
        send(prompt("hot", 16), 0)
        if number < 12:
            send(prompt(f"since {number}", 1), 1)
    found = context.prefixes.look_up(fleet.request(prompt("hot", 16)), candidates, fleet.now)
    # (16 - 4) of 28 and one for each pod, on 3 pods
    assert found.uncached_and_scarce(index, fleet.now)[1] == pytest.approx(4096 * (1 / 3) ** 2)


def test_pods_that_no_prompt_was_looked_up_for_are_worked_out_too(lab: Any) -> None:
    """Between requests, when some have just appeared: the prefix index may not know of them yet."""
    fleet = lab(4)
    fleet.strategy(NAME).prepare(fleet.candidates(), fleet.now)
    assert len(set(np.round(fleet.scores(NAME, fleet.request(tokens=100)), 6))) == 1


def test_answers_take_longer_where_prefills_take_the_time(lab: Any) -> None:
    fleet = lab(2)
    speeds = fleet.worker()[2].rates.speeds(fleet.candidates(), fleet.now)
    speeds.sent[0].add(420_000, 420_000)  # half of a minute, and done
    asked = fleet.request(tokens=100)
    scores = fleet.scores(NAME, asked)
    terms = fleet.strategy(NAME).terms(asked, fleet.candidates(), fleet.now)
    assert terms["answer"][0] - terms["answer"][1] == pytest.approx(0.5 * 200 * Prior().step_seconds)
    assert scores[0] - scores[1] == pytest.approx(0.5 * 200 * Prior().step_seconds, abs=1e-6)
    speeds.sent[0].add(10_000_000, 10_000_000)  # more than it can do: no step computes more than its budget
    fleet.poll(1)
    fleet.scores(NAME, asked)
    slow, usual = fleet.strategy(NAME).terms(asked, fleet.candidates(), fleet.now)["answer"]
    assert slow - usual <= 0.5 * 200 * 8192 / 14_000


def test_requests_that_will_come_after_count_by_what_binds_them_to_the_pod(lab: Any, prompt: Any) -> None:
    fleet = lab(3)
    fleet.load(0, 6)
    _, _, context = fleet.worker()
    context.backlog.mean_tokens, context.backlog.mean_prompt = 100.0, 1000.0

    def followers(text: bytes) -> list[float]:
        asked = fleet.request(text)
        fleet.scores(NAME, asked)
        terms = fleet.strategy(NAME).terms(asked, fleet.candidates(), fleet.now)
        result: list[float] = terms["followers"].tolist()
        return result

    text = prompt("one", 8) + prompt("two", 8)
    loaded, *idle = followers(text)
    assert idle == pytest.approx([4096 * (1 / 100 - 1 / 1000) * 200 * Prior().step_seconds] * 2)
    assert loaded > 1.1 * idle[0]
    context.prefixes.remember(fleet.request(prompt("one", 8) + prompt("2", 8)), fleet.candidates(), 1, fleet.now)
    assert followers(text) == pytest.approx([loaded / 4, idle[0] / 4, idle[0] / 4])
    context.prefixes.remember(fleet.request(text), fleet.candidates(), 1, fleet.now)
    assert max(followers(text)) < 1e-3
    context.backlog.mean_prompt = 100.0  # nothing is ever found
    fleet.now += 1.0
    assert followers(prompt("three", 8)) == [0.0, 0.0, 0.0]
