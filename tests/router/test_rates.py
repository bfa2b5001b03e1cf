"""What is learnt of pods, beyond single decisions."""

from fleet import MODEL, make_fleet, set_row

from router.fleet import Fleet
from router.rates import Rates
from state.pods import Health


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
