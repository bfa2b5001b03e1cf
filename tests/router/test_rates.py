"""What is learnt of pods, beyond single decisions."""

import pytest
from fleet import MODEL, make_fleet, make_record, set_row

from router.fleet import Fleet
from router.rates import Prior, Rates, Speeds
from state.catalog import CatalogDocument
from state.pods import Health
from state.tables import Tables


def test_what_pods_were_sent_is_remembered_when_one_fails() -> None:
    tables = make_fleet(3)
    fleet, rates, now = Fleet(tables), Rates(), 50_000.0
    for _ in range(3):
        now += 1.0
        for slot in range(3):
            set_row(tables, slot, sampled_at=now)
        candidates = fleet.candidates(MODEL)
        assert candidates is not None
        for sent in rates.speeds(candidates, now).sent:
            sent.add(4000.0, 2000.0)
    set_row(tables, 2, health=Health.FAILED, sampled_at=now)
    candidates = fleet.candidates(MODEL)
    assert candidates is not None
    assert all(sent.tokens > 5000.0 for sent in rates.speeds(candidates, now).sent)


def speeds_of(rates: Rates, tables: Tables, now: float) -> Speeds:
    candidates = Fleet(tables).candidates(MODEL)
    assert candidates is not None
    return rates.speeds(candidates, now)


def test_what_a_fleet_has_learnt_outlives_a_pod_that_fails_and_one_that_comes() -> None:
    """Its engines' limit of requests, and what attention costs."""
    tables = make_fleet(3)
    rates, now = Rates(), 50_000.0
    for number in range(200):
        now += 1.0
        before = 1000.0 * (1 + (number // 10) % 10)
        for slot in range(3):
            prefill = 400.0 / (1.0 + 5e-5 * before)
            set_row(
                tables, slot, sampled_at=now, running=32.0, waiting=5.0, kv_usage=0.5, num_gpu_blocks=1000.0,
                block_size=16.0, busy_ratio=1.0, steps_per_second=10.0, generation_tokens_per_second=50.0 + number % 7,
                computed_prompt_tokens_per_second=prefill, observed_age_seconds=0.0, generation_tokens_mean=333.0,
            )  # fmt: skip
        for sent in speeds_of(rates, tables, now).sent:
            sent.add(before + 100.0, 200.0)
    learnt = speeds_of(rates, tables, now)
    assert learnt.slope > 0 and learnt.share_per_request is not None
    set_row(tables, 2, health=Health.FAILED, sampled_at=now)
    left = speeds_of(rates, tables, now)
    assert (left.slope, left.output_tokens) == (learnt.slope, learnt.output_tokens)
    assert left.share_per_request is not None and left.share_per_request.tolist() == [1 / 32] * 2
    assert left.kv_share_per_token is not None and left.kv_share_per_token.all()
    set_row(tables, 2, health=Health.READY, sampled_at=now)
    assert speeds_of(rates, tables, now).slope == learnt.slope


def decode_step(
    tables: Tables,
    slot: int,
    now: float,
    window: float,
    speed: float,
    *,
    busy: float = 1.0,
    prefill: float = 1.0,
    prompt: float = 400.0,
) -> None:
    """A sample of a pod that decodes ten requests and computes so many tokens of prompts in each step: `speed` times as
    fast as the prior says, prompts `prefill` times as slowly as that."""
    prior = Prior()
    context = 1000.0 + 100.0
    step = prior.step_seconds + 10 * (prior.decode_request_seconds + context * prior.kv_token_seconds)
    steps = busy * speed / (step + prompt * prefill * prior.prefill_token_seconds)
    set_row(
        tables, slot, sampled_at=now, window_seconds=window, busy_ratio=busy, running=10.0, steps_per_second=steps,
        generation_tokens_per_second=10.0 * steps, computed_prompt_tokens_per_second=prompt * steps,
        observed_age_seconds=0.0, tracked_requests_at_sample=10.0, tracked_tokens_at_sample=10_000.0,
        generation_tokens_mean=200.0,
    )  # fmt: skip


class Polled:
    """Three pods polled once a second, the last one half as fast as the others."""

    def __init__(self) -> None:
        self.tables, self.rates, self.now = make_fleet(3), Rates(), 50_000.0
        self.windows = [0.0] * 3

    def poll(self, seconds: int, *, idle: tuple[int, ...] = ()) -> Speeds:
        for _ in range(seconds):
            self.now += 1.0
            for slot in range(3):
                self.windows[slot] = min(self.windows[slot] + 1.0, 60.0)
                if slot in idle:
                    set_row(self.tables, slot, sampled_at=self.now, window_seconds=self.windows[slot], busy_ratio=0.0)
                else:
                    decode_step(self.tables, slot, self.now, self.windows[slot], 0.5 if slot == 2 else 1.0)
            speeds = speeds_of(self.rates, self.tables, self.now)
        return speeds


def how_much_slower(speeds: Speeds) -> float:
    """The last pod than the first, for decode; the least of prefill and decode."""
    return float(min(speeds.decode[-1] / speeds.decode[0], speeds.prefill_seconds[-1] / speeds.prefill_seconds[0]))


def test_a_slow_pod_is_known_for_one_when_its_engine_has_restarted() -> None:
    """Its counters begin anew, and so does the window of what is known of it."""
    fleet = Polled()
    assert how_much_slower(fleet.poll(60)) > 1.8
    fleet.windows[2] = 0.0
    for _ in range(20):
        assert how_much_slower(fleet.poll(1)) > 1.7


def test_a_slow_pod_is_known_for_one_when_another_has_failed() -> None:
    fleet = Polled()
    fleet.poll(60)
    set_row(fleet.tables, 1, health=Health.FAILED, sampled_at=fleet.now)
    left = speeds_of(fleet.rates, fleet.tables, fleet.now)
    assert len(left.decode) == 2
    assert how_much_slower(left) > 1.8


def test_pods_that_had_nothing_to_do_were_not_seen_to_be_alike() -> None:
    """The slow one is told apart as soon after a quiet hour as after a quiet second."""
    fleet = Polled()
    fleet.poll(300, idle=(2,))
    fleet.windows[2] = 60.0
    assert how_much_slower(fleet.poll(10)) > 1.5


def test_a_fleet_that_is_replaced_as_a_whole_is_as_new_as_its_pods() -> None:
    """However well known the pods before were: what the first samples seem to say of decode and prefill is doubted.
    Here they count prompts that were begun before, and decoding seems to take no time."""
    fleet = Polled()
    fleet.poll(120)
    tables, old, new = fleet.tables, [make_record(slot) for slot in range(3)], [make_record(slot) for slot in (3, 4, 5)]
    for record in new:
        tables.pods.claim(record.slot, record.generation)
    for published in (old + new, new):
        tables.catalog.publish(CatalogDocument(tuple(published)))
        fleet.now += 1
        for record in published:
            decode_step(tables, record.slot, fleet.now, 1.0, 1.0)
            if record in new:
                set_row(
                    tables, record.slot, sampled_at=fleet.now, tracked_requests_at_sample=10.0,
                    computed_prompt_tokens_per_second=4000.0 * (record.slot - 2),
                )  # fmt: skip
        speeds = speeds_of(fleet.rates, tables, fleet.now)
    assert len(speeds.decode) == 3
    warm = speeds.prefill_seconds / Prior().prefill_token_seconds / 2.0
    assert speeds.decode == pytest.approx(warm, rel=0.15)


@pytest.mark.parametrize("busy", [1.0, 0.05])
def test_decode_and_prefill_are_told_apart_within_half_a_minute_however_little_there_is_to_do(busy: float) -> None:
    """By a worker that starts where pods have been watched for long."""
    tables, rates, now = make_fleet(3), Rates(), 50_000.0
    for number in range(30):
        now += 1.0
        for slot in range(3):
            prompt = 200.0 * (1 + (number + slot) % 3)
            decode_step(tables, slot, now, 60.0, 1.0, busy=busy, prefill=3.0, prompt=prompt)
        speeds = speeds_of(rates, tables, now)
    assert speeds.decode == pytest.approx([1.0] * 3, rel=0.2)
    assert speeds.prefill_seconds / Prior().prefill_token_seconds == pytest.approx([3.0] * 3, rel=0.2)
