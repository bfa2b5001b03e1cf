"""Counts that have no request behind them."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.scrape.settle import PATIENCE_SECONDS, POLLS, Excess


def corrections(pairs: list[tuple[int, float]], seconds: float = 1.0) -> list[int]:
    excess = Excess()
    return [excess.correction(own, engine, number * seconds) for number, (own, engine) in enumerate(pairs)]


def test_counts_that_agree_are_left_alone() -> None:
    assert not any(corrections([(n % 7, n % 7) for n in range(60)]))


def test_more_in_the_engine_than_here_is_somebody_elses() -> None:
    assert not any(corrections([(1, 9.0)] * 60))


def test_what_stays_above_through_the_patience_is_taken_off_once() -> None:
    found = corrections([(5, 2)] * (int(PATIENCE_SECONDS) + 1))
    assert found[:-1] == [0] * int(PATIENCE_SECONDS)
    assert found[-1] == -3


def test_only_the_smallest_excess_is_taken_off() -> None:
    assert min(corrections([(9, 2), (3, 2), *[(9, 2)] * 14])) == -1


def test_one_poll_without_an_excess_begins_the_patience_anew() -> None:
    assert not any(corrections([*[(5, 2)] * 14, (2, 2), *[(5, 2)] * 14]))


def test_few_polls_are_not_enough_however_long_they_take() -> None:
    found = corrections([(5, 0)] * POLLS, seconds=100.0)
    assert found == [0] * (POLLS - 1) + [-5]


def test_a_count_below_zero_is_put_right_at_once() -> None:
    assert corrections([(-2, 4.0)]) == [2]


@pytest.mark.parametrize("engine", [nan, inf, -inf])
def test_an_engine_that_does_not_say_corrects_nothing(engine: float) -> None:
    assert not any(corrections([(5, engine)] * 60))
    assert corrections([(-1, engine)]) == [1]


@given(st.lists(st.tuples(st.integers(-5, 20), st.floats(0, 20)), max_size=80))
def test_a_correction_never_goes_past_zero_or_below_what_the_engine_has(pairs: list[tuple[int, float]]) -> None:
    for (own, engine), change in zip(pairs, corrections(pairs), strict=True):
        if change:
            assert own + change >= (0 if own < 0 else int(engine))
            assert own + change <= max(own, 0)


def test_tokens_of_a_charge_that_is_being_made_are_left() -> None:
    excess = Excess()
    assert excess.leftover(0, 500) == 0
    assert excess.leftover(1, 500) == 0
    assert excess.leftover(0, 500) == 0
    assert excess.leftover(0, 700) == -500
    assert excess.leftover(0, 200) == -200
    assert excess.leftover(0, 0) == 0
    assert excess.leftover(3, -900) == 0
    assert excess.leftover(3, -800) == 800
    assert excess.leftover(3, 100) == 0
