"""Gives every pod a row in the shared tables, and takes it back when the pod is gone.

A pod is known by its resolved address. A pod that stays keeps its row, its generation and so all that is known about
it, whatever happens to the others. A pod that leaves first drains: it gets no new requests, and its row is given up
once nothing is in flight there (or after `drain_seconds`). If it comes back meanwhile it carries on as if nothing
had been. A row that was given up rests for a while before another pod gets it, and begins at a load of zero: what the
predecessor's requests still add or take is recognised by its generation and ignored.

The catalog never names a row that is not its pod's: a row is claimed before the catalog with its pod is published, and
vacated after one without it. A successor of a scraper that was killed in between finishes what that had begun.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from state.catalog import CatalogDocument, CatalogFull, PodRecord
from state.tables import REPLICATOR, Tables

REST_SECONDS = 30.0

Settings = Mapping[str, Mapping[str, Any]]
"""Of models, as their source gives them."""


class RegistryFull(Exception):
    """More pods than the tables have rows, or a longer description than the catalog has room for."""


@dataclass(frozen=True, slots=True)
class FoundPod:
    """A pod as a source lists it, its host name resolved to one address."""

    address: str
    name: str
    models: tuple[str, ...]
    engine: str = "vllm"
    namespace: str = "standalone"
    host: str = ""
    metrics_address: str = ""
    role: str = ""
    roleset: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False
    """Its source wants no new requests sent there."""


@dataclass(slots=True)
class _Row:
    pod: FoundPod
    slot: int
    generation: int
    leaving_since: float | None = None

    @property
    def draining(self) -> bool:
        return self.leaving_since is not None or self.pod.draining


class Registry:
    """The owner of the catalog and of the pod rows. Lives in the scraper process."""

    def __init__(self, tables: Tables, now: float = 0.0, *, drain_seconds: float = 600.0) -> None:
        self._tables = tables
        self._drain_seconds = drain_seconds
        self._rows: dict[str, _Row] = {}
        self._resting: dict[int, float] = {}
        self._settings: Settings = {}
        self.waiting = 0
        """Pods that are listed and will get their rows from those that drain."""
        self._adopt(now)

    def _adopt(self, now: float) -> None:
        """Take over what a predecessor published, so that a restarted scraper disturbs nobody."""
        tables = self._tables
        _, document = tables.catalog.read()
        self._settings = document.models
        lost = []
        for record in document.pods:
            pod = FoundPod(
                record.address, record.name, record.models, record.engine, record.namespace, record.host,
                record.metrics_address, record.role, record.roleset, record.labels,
            )  # fmt: skip
            leaving = now if record.draining else None
            row = self._rows[record.address] = _Row(pod, record.slot, record.generation, leaving)
            if tables.pods.generation[row.slot] != row.generation:
                lost.append(row)
        used = {row.slot for row in self._rows.values()}
        for slot in range(tables.pods.high):
            if slot not in used:
                if tables.pods.generation[slot]:
                    self._resting[slot] = now
                tables.pods.vacate(slot)  # also one that is vacated, but perhaps half written
        for row in lost:  # nobody would ever send a request there
            row.generation = tables.pods.last_generation + 1
            self._claim(row)
        if lost:
            tables.catalog.publish(_document(self._rows, self._settings))

    @property
    def pods(self) -> dict[int, FoundPod]:
        """All pods that have a row, draining ones included, by slot."""
        return {row.slot: row.pod for row in self._rows.values()}

    @property
    def draining(self) -> set[int]:
        """The slots of the pods that get no new requests: they are about to go, or their source wants it so."""
        return {row.slot for row in self._rows.values() if row.draining}

    def update(
        self,
        found: Sequence[FoundPod],
        settings: Settings,
        now: float,
        *,
        complete: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Make the tables say what `found` says. Returns the slots that are new and those that began to drain. Unless
        `found` is complete, pods that are missing there stay as they are. Where those that drain have still the rows of
        some of the new ones, these are `waiting`: they get them with a later call.

        Raises RegistryFull, and changes nothing, when there are more pods than rows or they take more room to
        describe than the catalog has.
        """
        wanted = {pod.address: pod for pod in found}
        room = self._tables.capacity.pods
        if len(wanted) > room:
            raise RegistryFull(
                f"{len(wanted)} pods are more than the tables hold, which is {room}: raise capacity.pods"
            )
        # Those that are gone must begin to drain, or the others would never have room.
        new = [address for address in wanted if address not in self._rows]
        late = new[max(room - len(self._rows), 0) :]
        for address in late:
            del wanted[address]
        rows: dict[str, _Row] = {}
        added: list[int] = []
        leaving: list[int] = []
        names = {pod.name for pod in found}
        for address, row in self._rows.items():
            pod = wanted.get(address)
            if pod is not None:
                rows[address] = _Row(pod, row.slot, row.generation)
                continue
            pod, since = _called_apart(row.pod, names), row.leaving_since
            if since is None and complete:
                since = now
                leaving.append(row.slot)
            rows[address] = _Row(pod, row.slot, row.generation, since)
        free = self._free_slots(now)
        generation = self._tables.pods.last_generation
        for address, pod in wanted.items():
            if address not in rows:
                generation += 1
                rows[address] = _Row(pod, next(free), generation)
                added.append(rows[address].slot)
        if rows == self._rows and settings == self._settings and self._tables.catalog.version > 0:
            self.waiting = len(late)
            return [], []
        document = _document(rows, settings)
        try:
            self._tables.catalog.check(document)
        except CatalogFull as error:
            raise RegistryFull(str(error)) from None
        for address, row in rows.items():
            if address not in self._rows:
                self._claim(row)
        self._rows, self._settings = rows, settings
        self.waiting = len(late)
        self._tables.catalog.publish(document)
        return added, leaving

    def sweep(self, now: float) -> list[int]:
        """Give up the rows of pods that have drained. Returns their slots."""
        gone: list[int] = []
        ledger, high = self._tables.ledger, self._tables.pods.high
        looks = [ledger.of_this_replica(high, REPLICATOR)[0] for _ in range(2)]  # one may be too low, see the scraper
        in_flight = np.maximum(*looks)
        for address, row in list(self._rows.items()):
            since = row.leaving_since
            if since is not None and (in_flight[row.slot] <= 0 or now - since > self._drain_seconds):
                del self._rows[address]
                self._resting[row.slot] = now
                gone.append(row.slot)
        if gone:
            self._tables.catalog.publish(_document(self._rows, self._settings))
        for slot in gone:
            self._tables.pods.vacate(slot)
        return gone

    def _claim(self, row: _Row) -> None:
        """Begin at a load of zero: what a predecessor left behind is taken off."""
        self._resting.pop(row.slot, None)
        tables = self._tables
        requests, tokens = tables.ledger.load(row.slot)
        tables.ledger.settle(row.slot, -requests, -tokens)
        tables.pods.claim(row.slot, row.generation)

    def _free_slots(self, now: float) -> Iterator[int]:
        """Rows that nobody has, those that have rested enough first, then by the time they have rested."""
        used = {row.slot for row in self._rows.values()}
        free = [slot for slot in range(self._tables.capacity.pods) if slot not in used]
        resting = {slot: since for slot, since in self._resting.items() if now - since < REST_SECONDS}
        return iter(sorted(free, key=lambda slot: resting.get(slot, -1.0)))


def _called_apart(pod: FoundPod, names: set[str]) -> FoundPod:
    """A pod that its source lists no more, by a name that no listed one has: names have their number in the file."""
    name = pod.name
    while name in names:
        name = f"{name}-{pod.address}"
    return pod if name == pod.name else replace(pod, name=name)


def _document(rows: Mapping[str, _Row], settings: Settings) -> CatalogDocument:
    records = [
        PodRecord(
            slot=row.slot,
            generation=row.generation,
            name=row.pod.name,
            address=row.pod.address,
            models=row.pod.models,
            namespace=row.pod.namespace,
            engine=row.pod.engine,
            host=row.pod.host,
            metrics_address=row.pod.metrics_address,
            draining=row.draining,
            role=row.pod.role,
            roleset=row.pod.roleset,
            labels=row.pod.labels,
        )
        for row in sorted(rows.values(), key=lambda row: row.slot)
    ]
    return CatalogDocument(tuple(records), settings)
