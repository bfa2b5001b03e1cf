"""One process's read-only view of the fleet: who serves a model and how those pods are.

Identity comes from the catalog (parsed when its version moves), health and engine metrics from the pod rows (copied
when their epoch moves), in-flight load from the ledger (which changes with each decision, and is summed whenever
somebody asks, or kept for a moment: `requests_now`). A `Candidates` object holds the pods that may take a request of
one model as parallel arrays; it is built once per epoch and model, so that a request between two polls finds
everything ready.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from state.catalog import PodRecord
from state.ledger import Entry
from state.pods import COLUMN, Floats, Health, Ints
from state.tables import Tables

_HEALTH: Final = COLUMN["health"]
_REQUESTS: Final = int(Entry.REQUESTS)  # plain integers: an enumeration member costs four times as much to look up
_TOKENS: Final = int(Entry.TOKENS)
_PROMISED: Final = int(Entry.PROMISED)
_CHOSEN: Final = int(Entry.CHOSEN)
_READY: Final = float(Health.READY)
_UNSEEN: Final = float(Health.UNSEEN)


class Pod:
    """A pod as the router knows it."""

    __slots__ = ("address", "generation", "host_ip", "name", "record", "slot")

    def __init__(self, record: PodRecord) -> None:
        self.record = record
        self.slot = record.slot
        self.generation = record.generation
        self.name = record.name
        self.address = record.address
        self.host_ip = record.address.rpartition(":")[0]


class Candidates:
    """The pods that may take a request: parallel arrays of length n, in the order of `pods`."""

    __slots__ = (
        "_rows",
        "_slots",
        "_tables",
        "_values",
        "derived",
        "ledger",
        "pods",
        "prefill",
        "slots",
        "span",
        "whole",
    )

    def __init__(self, tables: Tables, pods: Sequence[Pod], values: Floats, *, whole: bool = False) -> None:
        self._tables = tables
        self._values = values
        self.pods = pods
        self.slots: Ints = np.array([pod.slot for pod in pods], np.int64)
        self.whole = whole
        """Whether these are all candidates of their model, and not those that some requests are for."""
        self.prefill: Candidates | None = None
        """The pods that only prefill, for these; None where there are none."""
        self.derived: dict[Any, Any] = {}
        """What strategies have worked out from this epoch's pods and metrics, so that they do it once per epoch."""
        n = len(pods)
        self.span = int(self.slots.max()) + 1 if n else 0
        contiguous = bool((self.slots == np.arange(n)).all())
        self._rows: Ints | None = None if contiguous else self.slots
        self.ledger = tables.ledger
        self._slots: list[int] = self.slots.tolist()

    def __len__(self) -> int:
        return len(self.pods)

    def _of(self, entry: int) -> Ints:
        totals = self.ledger.totals(entry, self.span)
        return totals if self._rows is None else totals[self._rows]

    def requests(self) -> Ints:
        """Requests in flight now by the ledger: this replica's, and with Redis the other replicas'."""
        return self._of(_REQUESTS)

    def requests_now(self, now: float) -> list[int]:
        """The same, exact in what this process does and at most a millisecond old in what the others do."""
        counts = self.ledger.follow(now, self.span)
        if self._rows is None:
            return counts[: self.span]
        return [counts[slot] for slot in self._slots]

    def tokens(self) -> Ints:
        """Prompt tokens of the requests in flight now."""
        return self._of(_TOKENS)

    def promised(self) -> Ints:
        """Prompt tokens ever sent and not expected in the pod's cache. Differences over time are what matters."""
        return self._of(_PROMISED)

    def sent(self) -> Ints:
        """Requests ever sent. Differences over time are what matters."""
        return self._of(_CHOSEN)

    def busy_until(self) -> Floats:
        """When the pods will have done the prefills promised to them, in monotonic seconds."""
        latest = self.ledger.busy_until(self.span)
        return latest if self._rows is None else latest[self._rows]

    def occupy(self, index: int, until: float) -> None:
        """Say when pod `index` will have done the prefills promised to it, the newest included."""
        self.ledger.occupy(self.pods[index].slot, until)

    def loads(self) -> Ints:
        """requests(), tokens() and promised() in one: int64[3][n]."""
        totals = self.ledger.loads(self.span)
        return totals if self._rows is None else totals[:, self._rows]

    def metric(self, name: str) -> Floats:
        """One of `state.pods.FIELDS`, NaN where the engine does not publish it."""
        column: Floats = self._values[:, COLUMN[name]].take(self.slots)
        return column

    def requests_since_sample(self) -> Floats:
        """Requests sent since the pod was last polled and not finished: what its metrics cannot show yet."""
        return np.maximum(self.requests() - self.metric("tracked_requests_at_sample"), 0.0)

    def tokens_since_sample(self) -> Floats:
        """Their prompt tokens."""
        return np.maximum(self.tokens() - self.metric("tracked_tokens_at_sample"), 0.0)

    def subset(self, indices: Sequence[int]) -> "Candidates":
        """The same view of fewer pods, and of all those that prefill for them."""
        found = Candidates(self._tables, [self.pods[i] for i in indices], self._values)
        found.prefill = self.prefill
        return found


class Model:
    """One model name: its pods and the settings that discovery found for it."""

    __slots__ = ("candidates", "name", "pods", "prefill", "settings", "whole")

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.pods: list[Pod] = []
        self.whole: list[Pod] = []
        """Those that take whole requests: the decode pods where prefill and decode are apart."""
        self.prefill: list[Pod] = []
        """Those that only prefill."""
        self.settings = settings
        self.candidates: Candidates | None = None


class Fleet:
    """All models. `model` and `candidates` are cheap enough to be called for each request."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._pods = tables.pods
        self._catalog_versions = tables.catalog.versions
        self._version = -1
        self._epoch = self._urgent = -1
        self.ahead = False
        """Whether somebody calls `catch_up` between requests, so that none has to wait for what is not urgent."""
        self._values: Floats = np.empty((0, 0))
        self.models: dict[str, Model] = {}

    @property
    def version(self) -> int:
        """Of the catalog that was read last."""
        return self._version

    @property
    def loaded(self) -> bool:
        """Whether discovery has published anything yet."""
        return self._tables.catalog.version > 0

    def refresh(self) -> None:
        """Follow the catalog and the pod rows. Three integer comparisons when nothing changed."""
        pods = self._pods
        urgent = self._catalog_versions[0] != self._version or pods.urgent != self._urgent
        if urgent or (pods.epoch != self._epoch and not self.ahead):
            self._take_in()

    def catch_up(self) -> bool:
        """The same between requests: also what is not urgent. Returns whether anything changed."""
        if self._catalog_versions[0] == self._version and self._pods.epoch == self._epoch:
            return False
        self._take_in()
        return True

    def _take_in(self) -> None:
        if self._catalog_versions[0] != self._version:
            self._version, document = self._tables.catalog.read()
            models: dict[str, Model] = {}
            for record in document.pods:
                pod = Pod(record)
                for name in record.models:
                    model = models.get(name)
                    if model is None:
                        model = models[name] = Model(name, document.models.get(name, {}))
                    model.pods.append(pod)
            for model in models.values():
                model.pods.sort(key=lambda pod: pod.slot)
                model.prefill = [pod for pod in model.pods if pod.record.role == "prefill"]
                model.whole = [pod for pod in model.pods if pod.record.role != "prefill"] or model.pods
            self.models = models
        self._urgent = self._pods.urgent  # before the rows: what is written meanwhile is taken in again
        self._epoch, self._values = self._pods.snapshot()
        for model in self.models.values():
            model.candidates = None

    def pod_names(self) -> set[str]:
        """Of all pods in the catalog."""
        return {pod.name for model in self.models.values() for pod in model.pods}

    def by_address(self, address: str) -> Pod | None:
        """The pod with this address. Looked up by going through all of them: for what happens rarely."""
        self.refresh()
        for model in self.models.values():
            for pod in model.pods:
                if pod.address == address:
                    return pod
        return None

    def candidates(self, name: str) -> Candidates | None:
        """The pods that may take a request for model `name` now: the READY ones, or where there are none those that
        no poll has reached yet. Pods that only prefill take no whole request, unless the model has no others. Empty
        when all have failed; None when nobody serves the model."""
        self.refresh()
        model = self.models.get(name)
        if model is None:
            return None
        if model.candidates is None:
            model.candidates = Candidates(self._tables, self._eligible(model.whole), self._values, whole=True)
            if model.prefill:
                model.candidates.prefill = Candidates(self._tables, self._eligible(model.prefill), self._values)
        return model.candidates

    def _eligible(self, pods: list[Pod]) -> list[Pod]:
        values, tables = self._values, self._tables
        ready: list[Pod] = []
        unseen: list[Pod] = []
        healths, generations = values[:, _HEALTH].tolist(), tables.pods.generation[: len(values)].tolist()
        for pod in pods:
            slot = pod.slot
            if pod.record.draining or slot >= len(values) or generations[slot] != pod.generation:
                continue
            health = healths[slot]
            if health == _READY:
                ready.append(pod)
            elif health == _UNSEEN:
                unseen.append(pod)
        return ready or unseen
