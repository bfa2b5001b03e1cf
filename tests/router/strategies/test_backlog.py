"""How long prompts take that pods were promised, engine steps included."""

from typing import Any

import pytest

from router.backlog import FIRST_STEPS
from router.rates import Prior

STEP = 0.01
TOKEN = 1 / 14_000
BUDGET = Prior().step_tokens


def promise(fleet: Any, tokens: float, prompts_per_step: float = 1.0) -> float:
    """Seconds from now until pod 0 has done it."""
    _, _, context = fleet.worker()
    until: float = context.backlog.promise(
        fleet.candidates(), 0, tokens, TOKEN, fleet.now, step_seconds=STEP, prompts_per_step=prompts_per_step
    )
    return until - fleet.now


@pytest.mark.parametrize("tokens", [0, 100, 40_000])
def test_a_prompt_alone_waits_for_the_step_under_way_and_takes_its_own(lab: Any, tokens: float) -> None:
    assert promise(lab(1), tokens) == pytest.approx(tokens * TOKEN + (FIRST_STEPS + tokens / BUDGET) * STEP)


@pytest.mark.parametrize(("prompts_per_step", "steps"), [(0.0, 1.0), (1.0, 1.0), (4.0, 0.25), (1e9, 100 / BUDGET)])
def test_behind_others_it_takes_a_step_or_shares_it(lab: Any, prompts_per_step: float, steps: float) -> None:
    fleet = lab(1)
    before = promise(fleet, 10_000)
    after = promise(fleet, 100, prompts_per_step)
    assert after - before == pytest.approx(100 * TOKEN + steps * STEP)


def test_a_long_one_takes_several_steps_whoever_comes_meanwhile(lab: Any) -> None:
    fleet = lab(1)
    before = promise(fleet, 10_000)
    assert promise(fleet, 3 * BUDGET, 2.0) - before == pytest.approx(3 * (BUDGET * TOKEN + STEP))


def test_the_busier_the_pod_the_more_prompts_share_a_step(lab: Any) -> None:
    """With marginal-delay, by what the pod was sent in the last minute."""
    longer = []
    for tokens_per_second in (0, 5_000, 13_500):
        fleet = lab(2)
        _, _, context = fleet.worker()
        context.rates.speeds(fleet.candidates(), fleet.now).sent[0].add(0.0, 60.0 * tokens_per_second)
        delays = fleet.strategy("marginal-delay").up_to_date(fleet.candidates(), fleet.now)
        untils = []
        for _ in range(2):
            delays.promise(0, 100.0, 100.0, fleet.now)
            untils.append(float(fleet.candidates().busy_until()[0]))
        longer.append(untils[1] - untils[0] - 100 * TOKEN)
    nothing, some, much = longer
    assert nothing == some == pytest.approx(Prior().step_seconds, rel=0.01)
    assert much == pytest.approx(some / 3, rel=0.2)
