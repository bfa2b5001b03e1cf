"""A fleet made by hand: real shared tables in this process, pods with the metrics a test gives them."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from router.fleet import Candidates, Fleet
from router.prefixes import Prefixes
from router.request import RoutingRequest
from router.strategies import STRATEGIES, Context, Strategy
from router.strategies.delays import KEPT_SECONDS
from state.catalog import CatalogDocument, PodRecord
from state.ledger import Charge, Entry, Ledger
from state.pods import COLUMN, Health
from state.tables import FIRST_WORKER, Capacity, Tables

WRITER = FIRST_WORKER
CAPACITY = Capacity(pods=64, writers=FIRST_WORKER + 3, catalog_bytes=1 << 16, series=64, prefix_ring_bytes=1 << 18)


class Lab:
    """One replica. `now` is its clock; `worker` gives the parts of one process."""

    def __init__(self, pods: int = 4, **metrics: float) -> None:
        self.tables = Tables.create(CAPACITY, WRITER)
        self.tables.ledger.admit(WRITER)
        self.now = 1000.0
        self.records: list[PodRecord] = []
        for slot in range(pods):
            self.add(slot, **metrics)
        self.workers: dict[int, tuple[Tables, Fleet, Context]] = {}
        self.strategies: dict[tuple[str, int], Strategy] = {}
        self.charges: list[tuple[Ledger, Charge]] = []

    def add(self, slot: int, generation: int = 0, **metrics: float) -> None:
        """A pod appears, or another one takes its row."""
        record = PodRecord(slot, generation or slot + 1, f"pod-{slot}", f"10.0.0.{slot}:8000", ("m",))
        self.records = [r for r in self.records if r.slot != slot] + [record]
        self.tables.pods.claim(slot, record.generation)
        self.poll(slot, **metrics)
        self.publish()

    def divide(self, **metrics: float) -> None:
        """All pods of now decode, and one more prefills for them."""
        self.add(max(r.slot for r in self.records) + 1, **metrics)
        roles = ["decode"] * (len(self.records) - 1) + ["prefill"]
        self.records = [replace(r, role=role, roleset="rs") for r, role in zip(self.records, roles, strict=True)]
        self.publish()

    def publish(self, *slots: int) -> None:
        """Discovery lists these pods, or all."""
        pods = tuple(r for r in self.records if not slots or r.slot in slots)
        self.tables.catalog.publish(CatalogDocument(pods))

    def poll(self, slot: int, **metrics: float) -> None:
        """The scraper has read a pod's metrics now."""
        row = self.tables.pods.row(slot)
        row[COLUMN["health"]] = Health.READY
        row[COLUMN["sampled_at"]] = self.now
        requests, tokens = self.tables.ledger.load(slot)
        row[COLUMN["tracked_requests_at_sample"]] = requests
        row[COLUMN["tracked_tokens_at_sample"]] = tokens
        row[COLUMN["tracked_promised_at_sample"]] = self.tables.ledger.total(Entry.PROMISED, slot)
        for name, value in metrics.items():
            row[COLUMN[name]] = value
        self.tables.pods.write(slot, row)

    def worker(self, number: int = 0) -> tuple[Tables, Fleet, Context]:
        """The parts of worker `number`, which has its own view and its own row."""
        if number not in self.workers:
            tables = Tables.attach(self.tables.segment.fd, WRITER + number)
            self.tables.ledger.admit(WRITER + number)
            self.workers[number] = tables, Fleet(tables), Context(Random(7), prefixes=Prefixes.of(tables))
        return self.workers[number]

    def strategy(self, name: str, worker: int = 0) -> Any:
        key = name, worker
        if key not in self.strategies:
            self.strategies[key] = STRATEGIES[name](self.worker(worker)[2])
        return self.strategies[key]

    def candidates(self, worker: int = 0) -> Candidates:
        found = self.worker(worker)[1].candidates("m")
        assert found is not None
        return found

    def request(self, text: bytes = b"", tokens: int = 0, **rest: Any) -> RoutingRequest:
        return RoutingRequest("m", text=text, prompt_tokens=tokens or len(text) // 4, **rest)

    def send(self, name: str, request: RoutingRequest, worker: int = 0) -> int:
        """Route one request and charge it. Returns the slot."""
        strategy, candidates = self.strategy(name, worker), self.candidates(worker)
        index = strategy.pick(request, candidates, self.now)
        strategy.chosen(request, candidates, index, self.now)
        slot: int = candidates.pods[index].slot
        uncached = request.uncached_tokens if request.uncached_tokens >= 0 else request.prompt_tokens
        ledger = self.worker(worker)[0].ledger
        self.charges.append((ledger, ledger.charge(slot, request.prompt_tokens, uncached, held=False)))
        return slot

    def finish(self) -> None:
        """All requests sent so far have been answered."""
        for ledger, charge in self.charges:
            ledger.release(charge, held=False)
        self.charges.clear()

    def promise(self, slot: int, tokens: int, worker: int = 0) -> None:
        """A worker sends a pod a prompt of which nothing is cached."""
        tables, _, context = self.worker(worker)
        candidates = self.candidates(worker)
        speeds = context.rates.speeds(candidates, self.now)
        index = [pod.slot for pod in candidates.pods].index(slot)
        context.backlog.promise(candidates, index, tokens, float(speeds.prefill_seconds[index]), self.now)
        tables.ledger.charge(slot, tokens, tokens, held=False)
        self.now += KEPT_SECONDS * 1.01

    def load(self, slot: int, requests: int, tokens: int = 400) -> None:
        """Requests that are in flight on a pod, all their prompts done."""
        for _ in range(requests):
            self.tables.ledger.charge(slot, tokens, 0, held=False)
        self.now += KEPT_SECONDS * 1.01  # so that all workers have seen it

    def scores(self, name: str, request: RoutingRequest) -> list[float]:
        scores: list[float] = self.strategy(name).scores(request, self.candidates(), self.now).tolist()
        return scores


def text(name: str, kilobytes: float) -> bytes:
    """A prompt unlike any other name's, from its first byte on."""
    return (f"{name}. ".encode() * 1024 * 16)[: int(kilobytes * 1024)]


@pytest.fixture
def lab() -> type[Lab]:
    return Lab


@pytest.fixture
def prompt() -> Any:
    return text
