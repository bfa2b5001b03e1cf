"""Gives every pod a row in the shared tables, and takes it back when the pod is gone.

A pod is known by its resolved address. A pod that stays keeps its row, its generation and so all that is known about
it, whatever happens to the others. A pod that leaves first drains: it gets no new requests, and its row is given up
once nothing is in flight there (or after `drain_seconds`). If it comes back meanwhile it carries on as if nothing
had been. A row that was given up rests for a while before another pod gets it, and begins at a load of zero: what the
predecessor's requests still add or take is recognised by its generation and ignored.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from state.catalog import CatalogDocument, PodRecord
from state.ledger import Entry
from state.tables import Tables

REST_SECONDS = 30.0


class RegistryFull(Exception):
    """More pods than the tables have rows."""


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


@dataclass(slots=True)
class _Row:
    pod: FoundPod
    slot: int
    generation: int
    leaving_since: float | None = None


class Registry:
    """The owner of the catalog and of the pod rows. Lives in the scraper process."""

    def __init__(self, tables: Tables, *, drain_seconds: float = 600.0) -> None:
        self._tables = tables
        self._drain_seconds = drain_seconds
        self._rows: dict[str, _Row] = {}
        self._resting: dict[int, float] = {}
        self._settings: Mapping[str, Mapping[str, Any]] = {}
        self._generation = 0
        self._adopt()

    def _adopt(self) -> None:
        """Take over what a predecessor published, so that a restarted scraper disturbs nobody."""
        _, document = self._tables.catalog.read()
        self._settings = document.models
        for record in document.pods:
            pod = FoundPod(
                record.address, record.name, record.models, record.engine, record.namespace, record.host,
                record.metrics_address, record.role, record.roleset, record.labels,
            )  # fmt: skip
            leaving = 0.0 if record.draining else None
            self._rows[record.address] = _Row(pod, record.slot, record.generation, leaving)
        self._generation = int(self._tables.pods.generation.max(initial=0))

    @property
    def pods(self) -> dict[int, FoundPod]:
        """All pods that have a row, draining ones included, by slot."""
        return {row.slot: row.pod for row in self._rows.values()}

    def update(
        self, found: Sequence[FoundPod], settings: Mapping[str, Mapping[str, Any]], now: float
    ) -> tuple[list[int], list[int]]:
        """Make the tables say what `found` says. Returns the slots that are new and those that began to drain.

        Raises RegistryFull, and changes nothing, when there are more pods than rows.
        """
        wanted = {pod.address: pod for pod in found}
        staying = sum(1 for address in self._rows if address not in wanted)
        if len(wanted) + staying > self._tables.capacity.pods:
            raise RegistryFull(
                f"{len(wanted)} pods (and {staying} that drain) are more than the tables hold, which is "
                f"{self._tables.capacity.pods}: raise capacity.pods"
            )
        added: list[int] = []
        leaving: list[int] = []
        changed = settings != self._settings
        for address, row in self._rows.items():
            if address not in wanted and row.leaving_since is None:
                row.leaving_since = now
                leaving.append(row.slot)
                changed = True
        for address, pod in wanted.items():
            known = self._rows.get(address)
            if known is None:
                self._rows[address] = self._new_row(pod, now)
                added.append(self._rows[address].slot)
                changed = True
            elif known.pod != pod or known.leaving_since is not None:
                known.pod = pod
                known.leaving_since = None
                changed = True
        self._settings = settings
        if changed or self._tables.catalog.version == 0:
            self._publish()
        return added, leaving

    def sweep(self, now: float) -> list[int]:
        """Give up the rows of pods that have drained. Returns their slots."""
        gone = []
        in_flight = self._tables.ledger.totals(Entry.REQUESTS, self._tables.pods.high)
        for address, row in list(self._rows.items()):
            since = row.leaving_since
            if since is not None and (in_flight[row.slot] <= 0 or now - since > self._drain_seconds):
                del self._rows[address]
                self._tables.pods.vacate(row.slot)
                self._resting[row.slot] = now
                gone.append(row.slot)
        if gone:
            self._publish()
        return gone

    def _new_row(self, pod: FoundPod, now: float) -> _Row:
        slot = self._free_slot(now)
        self._resting.pop(slot, None)
        tables = self._tables
        self._generation += 1
        requests, tokens = tables.ledger.load(slot)
        tables.ledger.settle(slot, -requests, -tokens)
        tables.pods.claim(slot, self._generation)
        return _Row(pod, slot, self._generation)

    def _free_slot(self, now: float) -> int:
        used = {row.slot for row in self._rows.values()}
        rested = [
            slot
            for slot in range(self._tables.capacity.pods)
            if slot not in used and now - self._resting.get(slot, -REST_SECONDS) >= REST_SECONDS
        ]
        if rested:
            return rested[0]
        return min(self._resting, key=self._resting.__getitem__)

    def _publish(self) -> None:
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
                draining=row.leaving_since is not None,
                role=row.pod.role,
                roleset=row.pod.roleset,
                labels=row.pod.labels,
            )
            for row in sorted(self._rows.values(), key=lambda row: row.slot)
        ]
        self._tables.catalog.publish(CatalogDocument(tuple(records), self._settings))


def sanitised(text: str) -> str:
    """A model's name as part of a pod's name: lower case, everything but letters and digits a dash."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "model"
