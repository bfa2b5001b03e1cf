"""Whether a pod may be sent requests, from what its polls and its answers say. Pure: time is passed in.

Polls: `failures` bad ones in a row and the pod is FAILED; the first good one brings it back. Answers: the workers
count connect failures, resets and 5xx per pod; when three or more come in a row, the pod is EJECTED although its
metrics answer (or though none has yet): for 5 s, then twice as long each time, up to five minutes; a good answer after
its return makes the next ejection short again. The counts are looked at some ten times a second, so the order within
one look is not known: if good and bad came together, the bad ones begin a new row when they are the majority and are
forgiven otherwise. What still comes in while the pod is out says nothing about its return. However bad it looks, at
most half of the pods that could serve are ejected at a time: when everything fails, the fault is elsewhere.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from state.pods import Health

EJECT_AFTER = 3
"""Failed answers in a row."""
EJECT_SECONDS = 5.0
EJECT_SECONDS_MAX = 300.0


@dataclass(slots=True)
class PodHealth:
    """One pod's record."""

    failures: int
    """Bad polls in a row that make a pod FAILED."""
    seen: bool = False
    failed_polls: int = 0
    asleep: bool = False
    bad_answers: int = 0
    ejections: int = 0
    ejected_until: float = 0.0

    @classmethod
    def resumed(cls, failures: int, last: Health, *, seen: bool, failed_polls: int, now: float) -> "PodHealth":
        """Carry on from a predecessor's last verdict, so that a restarted scraper makes no dead pod ready."""
        return cls(
            failures,
            seen=seen,
            failed_polls=failed_polls,
            asleep=last is Health.ASLEEP,
            ejected_until=now + EJECT_SECONDS if last is Health.EJECTED else 0.0,
        )

    def polled(self, *, ok: bool, asleep: bool = False) -> None:
        """A poll ended."""
        if ok:
            self.seen = True
            self.failed_polls = 0
            self.asleep = asleep
        else:
            self.failed_polls += 1

    def answered(self, good: int, bad: int, now: float, may_eject: Callable[[], bool]) -> bool:
        """Answers counted since the last call. Returns whether the pod is ejected now for them. `may_eject` is asked
        when it should be."""
        if now < self.ejected_until:
            return False
        if good:
            self.bad_answers = 0
            self.ejections = 0
        if bad > good:
            self.bad_answers += bad
        if self.bad_answers < EJECT_AFTER or not may_eject():
            return False
        self.bad_answers = 0
        self.ejected_until = now + min(EJECT_SECONDS * 2 ** min(self.ejections, 16), EJECT_SECONDS_MAX)
        self.ejections += 1
        return True

    @property
    def able(self) -> bool:
        """Whether the pod could serve if it were not ejected."""
        return not self.asleep and not (self.seen and self.failed_polls >= self.failures)

    def state(self, now: float) -> Health:
        """The verdict."""
        if self.failed_polls >= self.failures and self.seen:
            return Health.FAILED
        if now < self.ejected_until:
            return Health.EJECTED
        if not self.seen:
            return Health.UNSEEN
        if self.asleep:
            return Health.ASLEEP
        return Health.READY


class Peer(NamedTuple):
    """A pod among those that serve the same models."""

    models: Sequence[str]
    health: PodHealth
    draining: bool
    """It gets no new requests, so it could not take over from another."""


class Peers:
    """How many pods could serve each model, and how many of them are out, as of one look at the answers. They are
    counted when somebody is to be ejected, that is hardly ever: looks are frequent and pods may be many."""

    def __init__(self, pods: Callable[[], Iterable[Peer]], now: float) -> None:
        self._pods = pods
        self._now = now
        self._able: Counter[str] | None = None
        self._out: Counter[str] = Counter()

    def spare(self, peer: Peer) -> bool:
        """Whether at least half of the pods that could serve each of its models stay in when this one goes. If so, it
        is taken to go."""
        able, out = self._count(), self._out
        serves = peer.health.able
        extra = serves and peer.draining
        if any((out[model] + 1) * 2 > able[model] + extra for model in peer.models):
            return False
        if serves and not peer.draining:
            out.update(peer.models)
        return True

    def _count(self) -> Counter[str]:
        able = self._able
        if able is None:
            able = self._able = Counter()
            for models, health, draining in self._pods():
                if health.able and not draining:
                    able.update(models)
                    if self._now < health.ejected_until:
                        self._out.update(models)
        return able
