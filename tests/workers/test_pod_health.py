"""What polls and answers make of a pod."""

import pytest

from state.pods import Health
from workers.scrape.health import EJECT_AFTER, EJECT_SECONDS, EJECT_SECONDS_MAX, Peer, Peers, PodHealth


def always() -> bool:
    return True


def never() -> bool:
    return False


def ready(failures: int = 3) -> PodHealth:
    health = PodHealth(failures)
    health.polled(ok=True)
    return health


def test_unseen_until_the_first_good_poll_however_many_fail() -> None:
    health = PodHealth(3)
    assert health.state(0.0) is Health.UNSEEN
    for _ in range(10):
        health.polled(ok=False)
    assert health.state(0.0) is Health.UNSEEN
    health.polled(ok=True)
    assert health.state(0.0) is Health.READY


def test_failed_after_as_many_bad_polls_and_back_with_the_first_good_one() -> None:
    health = ready(3)
    states = []
    for ok in (False, False, True, False, False, False, False, True):
        health.polled(ok=ok)
        states.append(health.state(0.0))
    ok_, no = Health.READY, Health.FAILED
    assert states == [ok_, ok_, ok_, ok_, ok_, no, no, ok_]


def test_asleep() -> None:
    health = ready()
    health.polled(ok=True, asleep=True)
    assert (health.state(0.0), health.able) == (Health.ASLEEP, False)
    health.polled(ok=True)
    assert (health.state(0.0), health.able) == (Health.READY, True)


def test_bad_answers_in_a_row_eject_and_time_brings_back() -> None:
    health = ready()
    assert [health.answered(0, 1, now, always) for now in (1.0, 2.0, 3.0)] == [False, False, True]
    assert health.state(3.1) is Health.EJECTED
    assert health.state(3.0 + EJECT_SECONDS) is Health.READY
    assert health.able


def test_a_good_answer_between_them_forgives() -> None:
    health = ready()
    for _ in range(10):
        assert not health.answered(0, EJECT_AFTER - 1, 1.0, always)
        assert not health.answered(1, 0, 1.0, always)
    assert health.state(1.0) is Health.READY


@pytest.mark.parametrize(("good", "bad", "ejected"), [(5, 3, False), (3, 3, False), (2, 3, True), (0, 3, True)])
def test_of_answers_that_came_together_the_majority_counts(good: int, bad: int, ejected: bool) -> None:
    assert ready().answered(good, bad, 1.0, always) is ejected


def test_each_ejection_in_a_row_is_twice_as_long_up_to_a_bound_for_ever() -> None:
    health, now, lengths = ready(), 1.0, []
    for _ in range(1200):
        assert health.answered(0, 3, now, always)
        lengths.append(health.ejected_until - now)
        now = health.ejected_until
    assert lengths[:4] == pytest.approx([5.0, 10.0, 20.0, 40.0])
    assert max(lengths) == pytest.approx(EJECT_SECONDS_MAX)
    assert lengths[-1] == pytest.approx(EJECT_SECONDS_MAX)


def test_a_good_answer_after_its_return_makes_the_next_one_short_again() -> None:
    health = ready()
    health.answered(0, 3, 1.0, always)
    health.answered(0, 3, 10.0, always)
    health.answered(1, 0, 30.0, always)
    assert health.answered(0, 3, 31.0, always)
    assert health.ejected_until == pytest.approx(31.0 + EJECT_SECONDS)


def test_answers_to_what_was_sent_before_the_ejection_count_neither_way() -> None:
    health = ready()
    health.answered(0, 3, 1.0, always)
    assert not health.answered(0, 50, 2.0, always)
    assert not health.answered(50, 0, 2.5, always)
    assert not health.answered(0, 2, 7.0, always)
    assert health.answered(0, 1, 7.1, always)
    assert health.ejected_until == pytest.approx(7.1 + 2 * EJECT_SECONDS)


def test_nobody_is_ejected_when_too_many_are_and_the_next_chance_is_taken() -> None:
    health = ready()
    assert not health.answered(0, 9, 1.0, never)
    assert health.state(1.0) is Health.READY
    assert health.answered(0, 1, 2.0, always)


def test_a_pod_whose_metrics_never_answered_can_be_ejected_too() -> None:
    health = PodHealth(3)
    health.answered(0, 3, 1.0, always)
    assert health.state(2.0) is Health.EJECTED
    assert health.state(60.0) is Health.UNSEEN


@pytest.mark.parametrize("last", list(Health))
def test_a_restarted_scraper_carries_on(last: Health) -> None:
    """Above all it makes no dead pod ready before it has heard of it."""
    seen = last is not Health.UNSEEN
    bad = 5 if last is Health.FAILED else 0
    health = PodHealth.resumed(3, last, seen=seen, failed_polls=bad, now=100.0)
    assert health.state(100.0) is last
    health.polled(ok=False)
    assert health.state(100.1) is last
    health.polled(ok=True)
    assert health.state(100.0 + EJECT_SECONDS) is Health.READY


def peer(*models: str, draining: bool = False, out_until: float = 0.0, able: bool = True) -> Peer:
    health = ready()
    health.asleep = not able
    health.ejected_until = out_until
    return Peer(models, health, draining)


def test_half_of_the_pods_of_every_model_stay_in() -> None:
    pods = [peer("a"), peer("a"), peer("a", "b"), peer("b")]
    peers = Peers(lambda: pods, 1.0)
    assert peers.spare(pods[0])  # one of three
    assert not peers.spare(pods[1])
    assert not peers.spare(pods[2])  # two of the three that serve a, though only one of the two that serve b
    assert peers.spare(pods[3])


@pytest.mark.parametrize(
    ("others", "spared"),
    [
        ([], False),
        ([peer("a")], True),
        ([peer("b")], False),
        ([peer("a", draining=True)], False),
        ([peer("a", able=False)], False),
        ([peer("a"), peer("a", out_until=2.0)], False),
        ([peer("a"), peer("a", out_until=0.5)], True),
        ([peer("a"), peer("a"), peer("a", out_until=2.0)], True),
    ],
)
def test_only_those_count_that_could_take_over(others: list[Peer], spared: bool) -> None:
    failing = peer("a")
    assert Peers(lambda: [failing, *others], 1.0).spare(failing) is spared


def test_peers_are_counted_only_when_a_pod_is_to_go() -> None:
    counted = []
    health = ready()
    peers = Peers(lambda: counted.append(1) or [], 1.0)  # type: ignore[func-returns-value]
    for _ in range(5):
        health.answered(10, 1, 1.0, lambda: peers.spare(Peer(("a",), health, False)))
    assert not counted
    health.answered(0, 3, 1.0, lambda: peers.spare(Peer(("a",), health, False)))
    assert len(counted) == 1
