"""When to poll which pod. Pure: time is passed in, in seconds on any clock that does not go back.

Theory of operation. Each pod has an interval: `interval_min` while it is busy, growing step by step to
`interval_max` while it is idle, and doubling to `failing_max` while its polls fail. A pod's next poll becomes *due*
one interval after its last. If every pod were polled the moment it is due, pods that were added together, or became
busy together, would be polled together ever after. So polls leave through a gate: whatever is due waits in order of
its due time, and the gate lets one pass every `1 / (HEADROOM * rate)` seconds, where `rate` is the sum of 1 / interval
over all pods. Pods that leave the gate apart are due apart the next time, so the polls stay spread over the interval
by themselves, whatever mix of intervals there is, and without phases to keep.

What follows from it: in any stretch of s seconds with constant intervals no more than 1 + s * HEADROOM * rate polls
are let through (the evenest possible is s * rate), provided `due` is called when `next_due` says. A call that comes
late gets what has piled up, but no more than BURST. The headroom is what the gate catches up with: n pods added at
once have all been polled after interval_min / HEADROOM.

A poll on its own finds the processor's caches full of other programs' data and costs two to three times the CPU of
one that follows another at once (64 pods, one 51 KB page a second each, beside a busy core: 1.07 ms alone, 0.62 in
twos, 0.45 in fours, 0.38 in eights; `python -m bench.page_cost --pods 64 --batch 4`). So up to `batch` polls leave
together, those after the first at most AHEAD_SECONDS before their time; the timetable behind them stays as even as
with a batch of one.

A pod that `due` has named is not named again before `polled` has been called for it.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

HEADROOM = 1.1
"""How much faster polls may leave than they become due."""

BURST = 4
"""Polls that may leave together when `due` is called late."""

AHEAD_SECONDS = 0.05
"""How much before its time a poll may leave to make up a batch."""

IDLE_GROWTH = 1.5
"""By which an idle pod's interval grows with each poll."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Pod:
    interval: float
    due: float
    turn: int
    """Number of the heap entry that counts; entries of earlier turns are void."""
    polling: bool = False
    failing: bool = False


class Pace(Generic[Key]):
    """The timetable of all pods of one scraper. Every call costs O(log n)."""

    def __init__(
        self, interval_min: float = 1.0, interval_max: float = 5.0, failing_max: float = 30.0, batch: int = 4
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch {batch}: at least one poll must leave at a time")
        if not 0 < interval_min <= interval_max or failing_max < interval_min:
            raise ValueError(
                f"intervals {interval_min}, {interval_max}, {failing_max}: wanted 0 < interval_min <= interval_max "
                "and interval_min <= failing_max"
            )
        self._interval_min = interval_min
        self._interval_max = interval_max
        self._failing_max = failing_max
        self._batch = batch
        self._pods: dict[Key, _Pod] = {}
        self._queue: list[tuple[float, int, Key]] = []
        self._turns = count()
        self._rate = 0.0
        self._rate_changes = 0
        self._last_passed = float("-inf")

    def __len__(self) -> int:
        return len(self._pods)

    def interval(self, key: Key) -> float:
        """Seconds between this pod's polls as they stand now. KeyError if it is not known."""
        return self._pods[key].interval

    def add(self, key: Key, now: float) -> None:
        """A new pod, to be polled as soon as the gate allows. Without effect if it is known."""
        if key in self._pods:
            return
        pod = self._pods[key] = _Pod(self._interval_min, now, 0)
        self._change_rate(1.0 / pod.interval)
        self._enqueue(key, pod)

    def remove(self, key: Key) -> None:
        """Forget a pod, also while it is being polled. Without effect if it is not known."""
        pod = self._pods.pop(key, None)
        if pod is not None:
            self._change_rate(-1.0 / pod.interval)

    def due(self, now: float) -> list[Key]:
        """The pods to poll now. Each stays out of the timetable until `polled` is called for it."""
        keys: list[Key] = []
        if not self._pods:
            return keys
        spacing = self._spacing()
        # Time in which nothing left is not saved up, beyond what a late call may be forgiven.
        gate_opens = max(self._last_passed + spacing, now - (BURST - 1) * spacing)
        until = now
        while (head := self._head()) is not None and max(head[0], gate_opens) <= until:
            # A batch is begun by a poll whose time has come, and filled with those whose time is near.
            until = now + min((self._batch - 0.5) * spacing, AHEAD_SECONDS) if self._batch > 1 else now
            heappop(self._queue)
            key = head[2]
            pod = self._pods[key]
            pod.polling = True
            # The gate's own time and not `now`, so that late calls do not stretch the intervals.
            pod.due = self._last_passed = max(gate_opens, pod.due)
            gate_opens = self._last_passed + spacing
            keys.append(key)
        return keys

    def next_due(self) -> float | None:
        """When `due` will next give anything; None: never, as things are."""
        head = self._head()
        return None if head is None else max(head[0], self._last_passed + self._spacing())

    def polled(self, key: Key, now: float, busy: bool, ok: bool) -> None:
        """The outcome of a poll: `ok` if it gave a page, `busy` if the pod has requests or did something lately.

        Without effect if the pod has been removed meanwhile.
        """
        pod = self._pods.get(key)
        if pod is None or not pod.polling:
            return
        if not ok:
            self._set_interval(pod, min(pod.interval * 2, self._failing_max) if pod.failing else self._interval_min)
        elif busy or pod.failing:
            self._set_interval(pod, self._interval_min)
        else:
            self._set_interval(pod, min(pod.interval * IDLE_GROWTH, self._interval_max))
        pod.failing = not ok
        pod.polling = False
        pod.due = max(pod.due + pod.interval, now)
        self._enqueue(key, pod)

    def hurry(self, key: Key, now: float) -> None:
        """The pod has been given work: an idle one is treated as busy at once. Failing ones keep their distance."""
        pod = self._pods.get(key)
        if pod is None or pod.failing or pod.interval == self._interval_min:
            return
        last = pod.due - pod.interval
        self._set_interval(pod, self._interval_min)
        if not pod.polling:
            pod.due = max(now, last + self._interval_min)
            self._enqueue(key, pod)

    def _enqueue(self, key: Key, pod: _Pod) -> None:
        pod.turn = next(self._turns)
        heappush(self._queue, (pod.due, pod.turn, key))
        if len(self._queue) > 2 * len(self._pods) + 16:  # void entries of removed and hurried pods
            self._queue = [entry for entry in self._queue if self._counts(entry)]
            heapify(self._queue)

    def _counts(self, entry: tuple[float, int, Key]) -> bool:
        pod = self._pods.get(entry[2])
        return pod is not None and pod.turn == entry[1]

    def _head(self) -> tuple[float, int, Key] | None:
        queue = self._queue
        while queue:
            if self._counts(queue[0]):
                return queue[0]
            heappop(queue)
        return None

    def _spacing(self) -> float:
        return 1.0 / (HEADROOM * self._rate)

    def _set_interval(self, pod: _Pod, interval: float) -> None:
        if interval != pod.interval:
            old, pod.interval = pod.interval, interval
            self._change_rate(1.0 / interval - 1.0 / old)

    def _change_rate(self, change: float) -> None:
        self._rate += change
        self._rate_changes += 1
        if self._rate_changes >= 1_000 + len(self._pods):  # rounding errors must not pile up
            self._rate_changes = 0
            self._rate = sum(1.0 / pod.interval for pod in self._pods.values())
