"""What the router learns of engines that start with it, as they and their metrics really behave."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bench.engine_presets import PRESETS
from bench.replay.generators import shared_prefix
from bench.replay.simulation import MODEL, START, Settings, Simulation
from router.rates import Prior

PODS = 16


@dataclass(frozen=True)
class Seen:
    """Factors on the prior, a number for each pod."""

    seconds: float
    prefill: np.ndarray[Any, np.dtype[np.float64]]
    decode: np.ndarray[Any, np.dtype[np.float64]]


class Watched(Simulation):
    """Notes what its worker knows after each poll."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[Seen] = []

    def _poll(self, replica: Any) -> None:
        super()._poll(replica)
        worker = self._workers[0]
        candidates = worker.scheduler.fleet.candidates(MODEL)
        assert candidates is not None
        known = worker.rates.speeds(candidates, self.clock())
        prefill = known.prefill_seconds / Prior().prefill_token_seconds
        self.seen.append(Seen(self.clock() - START, prefill, known.decode.copy()))


def watched(speed: float = 1.0, pod_speeds: tuple[float, ...] = (1.0,)) -> list[Seen]:
    """Half a minute of a fleet that has done nothing before: prefixes that are all new, and soon hardly any."""
    rate = 56.0 * speed
    trace = shared_prefix(int(30 * rate), rate, random.Random(3))
    engine = PRESETS["round-figures"].faster(speed)
    simulation = Watched(trace, "marginal-delay", Settings(engine, pods=PODS, pod_speeds=pod_speeds))
    simulation.run()
    return simulation.seen


def test_engines_that_are_all_alike_seem_so_from_the_first_poll_on() -> None:
    for seen in watched():
        for factors in (seen.prefill, seen.decode):
            assert factors.max() < 1.25 * factors.min(), f"after {seen.seconds:.1f} s"


@pytest.mark.parametrize("speed", [0.4, 1.0, 2.5])
def test_how_fast_engines_are_is_known_within_seconds(speed: float) -> None:
    """However far off the prior. Slow ones take longer: what an engine has begun and not yet done is missing."""
    for seen in watched(speed):
        if 5.0 < min(seen.seconds, seen.seconds * speed) < 30.0:
            for factors in (seen.prefill, seen.decode):
                assert factors.mean() * speed == pytest.approx(1.0, rel=0.25), f"after {seen.seconds:.1f} s"


def test_engines_of_two_speeds_are_told_apart_within_seconds() -> None:
    for seen in watched(pod_speeds=(1.0,) * (PODS // 2) + (2.0,) * (PODS // 2)):
        slow, fast = seen.prefill[: PODS // 2], seen.prefill[PODS // 2 :]
        if 6.0 < seen.seconds < 30.0:
            assert slow.min() > 1.3 * fast.max(), f"after {seen.seconds:.1f} s"
        if 15.0 < seen.seconds < 30.0:
            assert slow.mean() == pytest.approx(2.0 * fast.mean(), rel=0.15), f"after {seen.seconds:.1f} s"
