"""What other replicas have sent to the pods, entered in this replica's tables as if one more worker had sent it.

So nothing that decides needs to know of replicas: requests and tokens in flight are a row of the ledger like any
other, prompts are records in a ring of the prefix log. One process does this for the whole replica, and tells the
others what the workers here do. It speaks with nobody itself: updates come in and go out as bytes (`state.updates`).

- **Loads** are told whole. What all other replicas have in flight on a pod is one number here, set anew with each
  update; what a replica had that is heard of no more is taken off.
- **Promised prompt tokens** only ever go up. What was added since the last update lengthens the pod's wait here, at the
  prefill speed that this replica has learnt.
- **Prompts** are believed of the incarnation of the engine that they were sent to. Where an engine does not say when it
  started, of the incarnation that this replica knows of, and from when it was first seen.

Cost: `python -m bench.mirror_cost`.
"""

from typing import Final

import numpy as np

from router.fleet import Fleet, Pod
from router.rates import Prior, Rates
from state.pods import COLUMN, Floats, Ints
from state.prefix_log import REMOTE, ROUTED, LogReader, Routed, pod_tag
from state.tables import REPLICATOR, Tables
from state.updates import LOADS, PromptUpdate, pod_key, read_loads, read_routed, write_routed

LEARN_SECONDS: Final = 1.0
"""Between two looks at the prefill speeds of a model's pods."""
MAX_REQUESTS: Final = 1 << 24
MAX_TOKENS: Final = 1 << 40
"""More than anybody has in flight on a pod, or promises it in one exchange."""
MAX_WAIT_SECONDS: Final = 3600.0
_INCARNATION: Final = [COLUMN["incarnation"], COLUMN["start_time_seconds"]]
_POLLED: Final = [COLUMN["sampled_at"], COLUMN["failed_polls"]]


class _Incarnation:
    """A pod as it is now."""

    __slots__ = ("known", "pod", "promised", "since", "started", "tag")

    def __init__(self, pod: Pod, tag: int, started: int, since: float, known: bool, promised: int) -> None:
        self.pod = pod
        self.tag = tag
        self.started = started
        """As in `PromptUpdate.started`."""
        self.since = since
        """When this process first saw this incarnation, in monotonic seconds."""
        self.known = known
        """Whether a poll has succeeded, or failed."""
        self.promised = promised
        """What this replica had promised to pods in this row when this one was first seen in it."""


class _Other:
    """Another replica, as it was last heard of."""

    __slots__ = ("pods", "promised", "requests", "slots", "tokens")

    def __init__(self) -> None:
        self.pods: list[int] = []
        """The keys of the pods that it knows."""
        self.slots: Ints = np.empty(0, np.int64)
        """Their rows here; -1 for those that are unknown here."""
        self.requests: Floats = np.empty(0)
        self.tokens: Floats = np.empty(0)
        self.promised: dict[int, int] | None = None
        """By key, all in all. None before the first update."""


class Mirror:
    """See the head of this file. `tables` must have been opened for the writer row REPLICATOR. All times `now` are
    monotonic seconds."""

    def __init__(self, tables: Tables, prior: Prior | None = None, *, learn: bool = True) -> None:
        self._tables = tables
        self._ledger = tables.ledger
        self._fleet = Fleet(tables)
        self._rates = Rates(prior, learn=learn)
        self._reader = LogReader(tables.prefix_log, own=REPLICATOR)
        self._reader.skip()
        self._untold: list[Routed] = []
        self._last_told: list[Routed] = []
        self._others: dict[str, _Other] = {}
        self._version = self._epoch = -1
        self._rows = b""
        self._pods: list[Pod] = []
        self._incarnations: dict[int, _Incarnation] = {}
        """By row."""
        self._slots: dict[int, int] = {}
        """Rows, by key."""
        pods = tables.capacity.pods
        self._held: Ints = np.zeros((3, pods), np.int64)
        """Requests and tokens that are entered for others, by row, and the generation for which they are."""
        self._seconds: Floats = np.full(pods, self._rates.prior.prefill_token_seconds)
        """Of prefill, per token, by row."""
        self._learnt: dict[str, float] = {}
        self.more = False
        """Whether `routed` left something for the next time."""
        self.told = 0
        """Prompts that were told to others,"""
        self.heard = 0
        """were heard of,"""
        self.unknown = 0
        """and heard of, but for pods or lives of pods that this replica does not know."""
        for slot in range(tables.pods.high):  # what a predecessor may have left
            self._ledger.hold(slot, 0, 0)

    @property
    def others(self) -> list[str]:
        """The replicas that are heard of."""
        return list(self._others)

    def ready(self, now: float) -> bool:
        """Whether there are pods, and each has been polled, so that it is known which incarnation is meant by what
        others tell of it. Those that do not answer are not waited for."""
        self._follow(now)
        return bool(self._incarnations) and all(
            one.known or one.pod.record.draining for one in self._incarnations.values()
        )

    # -- what is told

    def loads(self, now: float) -> bytes:
        """What this replica has in flight."""
        self._follow(now)
        high = self._tables.pods.high
        own = self._ledger.of_this_replica(high, REPLICATOR)
        slots = [slot for slot in np.flatnonzero(own.any(axis=0)).tolist() if slot in self._incarnations]
        rows = np.zeros(len(slots), LOADS)
        rows["pod"] = [pod_key(self._incarnations[slot].pod.address) for slot in slots]
        requests, tokens, promised = own[:, slots]
        rows["requests"] = np.clip(requests, 0, MAX_REQUESTS)
        rows["tokens"] = np.clip(tokens, 0, MAX_TOKENS)
        rows["promised"] = [
            total - self._incarnations[slot].promised for slot, total in zip(slots, promised.tolist(), strict=True)
        ]
        rows["wait"] = np.clip(self._ledger.busy_until(high)[slots] - now, 0.0, MAX_WAIT_SECONDS)
        return rows.tobytes()

    def routed(self, now: float, most_bytes: int) -> bytes:
        """Prompts that the workers here have sent since the last time, of about `most_bytes`. What is left, which is
        no more than the prefix log holds, comes next time."""
        self._follow(now)
        out: list[bytes] = []
        self._last_told = []
        size = 0
        while size < most_bytes:
            if not self._untold:
                self._untold = self._reader.read(256)[::-1]
                if not self._untold:
                    break
            record = self._untold.pop()
            if record.kind != ROUTED:
                continue
            incarnation = self._incarnations.get(record.slot)
            if incarnation is None or incarnation.tag != record.pod:
                continue
            age = max(now - record.at, 0.0)
            prompt = PromptUpdate(
                pod_key(incarnation.pod.address), incarnation.started, age, record.block_bytes, record.hashes
            )
            out.append(write_routed(prompt))
            self._last_told.append(record)
            size += len(out[-1])
        self.told += len(out)
        self.more = size >= most_bytes
        return b"".join(out)

    def take_back(self) -> None:
        """It is not known whether what `routed` gave last has arrived: it comes again next time."""
        self._untold += reversed(self._last_told)
        self.told -= len(self._last_told)
        self._last_told = []

    # -- what is heard

    def apply_loads(self, replica: str, update: bytes, now: float) -> None:
        """All that another replica has in flight. Takes effect with `enter`. Raises UpdateError."""
        rows = read_loads(update)
        self._follow(now)
        other = self._others.get(replica)
        if other is None:
            other = self._others[replica] = _Other()
        pods = rows["pod"].tolist()
        if pods != other.pods:
            other.pods = pods
            self._place(other)
        other.requests = np.clip(rows["requests"], 0, MAX_REQUESTS).astype(float)
        other.tokens = np.clip(rows["tokens"], 0, MAX_TOKENS).astype(float)
        promised = dict(zip(pods, rows["promised"].tolist(), strict=True))
        slots = other.slots.tolist()
        if other.promised is None:
            self._wait(slots, rows["wait"].tolist(), now)
        else:
            before = other.promised
            more = [min(total - before.get(pod, 0), MAX_TOKENS) for pod, total in promised.items()]
            self._promise(slots, more, now)
        other.promised = promised

    def apply_routed(self, update: bytes, age: float, now: float) -> None:
        """Prompts that another replica has sent, told `age` seconds ago. Raises UpdateError, having taken in what came
        before what is wrong."""
        self._follow(now)
        append = self._tables.prefix_log.append
        for prompt in read_routed(update):
            slot = self._slots.get(prompt.pod, -1)
            incarnation = self._incarnations.get(slot)
            at = now - prompt.age - age
            if incarnation is None or not _same(prompt.started, incarnation, at):
                self.unknown += 1
                continue
            append(slot, incarnation.tag, at, prompt.block_bytes, prompt.hashes, REMOTE)
            self.heard += 1

    def forget(self, replica: str) -> None:
        """It is heard of no more. Takes effect with `enter`."""
        self._others.pop(replica, None)

    def enter(self, now: float) -> None:
        """Bring the ledger's row to what the others are known to have in flight."""
        self._follow(now)
        generations = self._tables.pods.generation
        wanted = np.zeros_like(self._held)
        wanted[2] = generations
        for other in self._others.values():
            known = other.slots >= 0
            slots = other.slots[known]
            np.add.at(wanted[0], slots, other.requests[known].astype(np.int64))
            np.add.at(wanted[1], slots, other.tokens[known].astype(np.int64))
        wanted[:2, generations == 0] = 0
        changed = (wanted[:2] != self._held[:2]).any(axis=0)
        changed |= (wanted[2] != self._held[2]) & wanted[:2].any(axis=0)
        for slot in np.flatnonzero(changed).tolist():
            self._ledger.hold(slot, int(wanted[0, slot]), int(wanted[1, slot]))
        self._held = wanted

    # -- the pods

    def _follow(self, now: float) -> None:
        """See which pods there are, and which incarnation each has."""
        tables = self._tables
        moved = tables.catalog.version != self._version
        if not moved and tables.pods.epoch == self._epoch:
            return
        if moved:
            self._fleet.refresh()
            self._version = self._fleet.version
            models = self._fleet.models.values()
            self._pods = list({pod.slot: pod for model in models for pod in model.pods}.values())
        self._epoch, values = tables.pods.snapshot()
        rows = np.column_stack([tables.pods.generation[: len(values)], values[:, _INCARNATION], values[:, _POLLED] > 0])
        seen = rows.tobytes()
        if seen == self._rows and not moved:
            return
        self._rows = seen
        incarnations: dict[int, _Incarnation] = {}
        listed = rows.tolist()
        promised = self._ledger.of_this_replica(len(values), REPLICATOR)[2].tolist()
        for pod in self._pods:
            slot = pod.slot
            if slot >= len(listed) or listed[slot][0] != pod.generation:
                continue
            _, number, start, sampled, failed = listed[slot]
            tag = pod_tag(pod.generation, int(number))
            before = self._incarnations.get(slot)
            since = before.since if before is not None and before.tag == tag else now
            same = before is not None and before.pod.generation == pod.generation
            base = before.promised if before is not None and same else promised[slot]
            started = round(start * 1000) if 0 < start < 1e15 else 0
            incarnations[slot] = _Incarnation(pod, tag, started, since, bool(sampled or failed), base)
        self._incarnations = incarnations
        if moved:
            self._slots = {pod_key(one.pod.address): slot for slot, one in incarnations.items()}
            for other in self._others.values():
                self._place(other)

    def _place(self, other: _Other) -> None:
        other.slots = np.array([self._slots.get(pod, -1) for pod in other.pods], np.int64)

    # -- waits

    def _wait(self, slots: list[int], waits: list[float], now: float) -> None:
        """What a replica that is heard of for the first time knows of the pods' waits."""
        until = self._ledger.busy_until(self._tables.pods.high)
        for slot, wait in zip(slots, waits, strict=True):
            if slot >= 0 and now + wait > until[slot] and wait > 0:
                self._ledger.occupy(slot, now + min(wait, MAX_WAIT_SECONDS))

    def _promise(self, slots: list[int], more: list[int], now: float) -> None:
        """Another replica has promised pods so many tokens more."""
        until: Floats | None = None
        for slot, tokens in zip(slots, more, strict=True):
            if slot < 0 or tokens <= 0 or slot not in self._incarnations:
                continue
            if until is None:
                until = self._ledger.busy_until(self._tables.pods.high)
            self._learn(self._incarnations[slot].pod.record.models[0], now)
            wait = max(float(until[slot]) - now, 0.0) + tokens * float(self._seconds[slot])
            self._ledger.occupy(slot, now + min(wait, MAX_WAIT_SECONDS))
            self._ledger.promise(slot, tokens)

    def _learn(self, model: str, now: float) -> None:
        """Follow the prefill speeds of a model's pods."""
        if now - self._learnt.get(model, -LEARN_SECONDS) < LEARN_SECONDS:
            return
        self._learnt[model] = now
        candidates = self._fleet.candidates(model)
        if candidates is not None and len(candidates):
            self._seconds[candidates.slots] = self._rates.speeds(candidates, now).prefill_seconds


def _same(started: int, incarnation: _Incarnation, at: float) -> bool:
    """Whether what was told of a pod, as of monotonic seconds `at`, is about the incarnation that it has now."""
    return started == incarnation.started if started and incarnation.started else at >= incarnation.since
