"""What is learnt of pods, beyond single decisions."""

from fleet import MODEL, make_fleet, set_row

from router.fleet import Fleet
from router.rates import Rates, Speeds
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
