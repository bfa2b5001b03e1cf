"""A replay: a trace, N engines, and the production router between them, in virtual time.

What is real: the shared tables, the ledger, the fleet, the strategies, the scheduler, the prefix log and index, and
what is learnt from metrics, which come by the scraper's timetable and through its window. Each of the W workers of a
replica has its own fleet, index view and strategies, as its process would, over the tables of its replica; each of R
replicas has its own tables and polls the engines itself, and what one has routed and released reaches the others
with the next exchange. What is modelled: the engines (`bench.engine`), and prompts, whose block names come from the
trace instead of from hashing text. No strategy sees more than it would see in production: the index believes what was
routed, not what the engine holds, and no message says when a prefill is done.

Every request goes to a worker chosen at random, the same for every strategy. Latencies of the network and of the
decision are left out: they are a thousandth of the times compared here.

Cost: see `docs/routing.md`; for 12,000 requests of 12,000 tokens on 8 pods about 10 s of CPU.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.engine import Engine, EngineParams, EngineRequest
from bench.replay.scrape import Polls
from bench.replay.traces import TraceRequest
from router.mirror import Mirror
from router.prefix_hash import EMPTY, NOMINAL_BYTES_PER_TOKEN, Chain, PrefixHasher, pack
from router.prefix_index import PrefixIndex
from router.prefixes import Prefixes
from router.rates import Prior, Rates
from router.replies import Destination
from router.request import RoutingRequest
from router.scheduler import Scheduler
from router.strategies import Context
from state.catalog import CatalogDocument, PodRecord
from state.tables import FIRST_WORKER, REPLICATOR, Capacity, Tables

MODEL = "m"
START = 1000.0
"""The clock at the first arrival: monotonic clocks do not begin at 0."""
LOAD_SECONDS = 1.0
"""Between two looks at how evenly the load lies."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a replay runs on. Times are seconds."""

    params: EngineParams
    pods: int = 8
    speed: float = 1.0
    workers: int = 1
    replicas: int = 1
    metrics_interval: float = 1.0
    metrics_age: float = 0.0
    exchange_interval: float = 0.1
    index_blocks: int = 1 << 20
    prior: Prior | None = None
    learn: bool = True
    pod_speeds: tuple[float, ...] = (1.0,)
    """By how much each pod is faster than `params` says; they begin anew where there are more pods."""
    seed: int = 1


class Outcome(NamedTuple):
    """What became of one request."""

    request: EngineRequest
    pod: int
    expected_uncached: int
    """Tokens that the router expected the pod to compute."""


@dataclass(slots=True)
class Run:
    """What a replay gave."""

    outcomes: list[Outcome] = field(default_factory=list)
    clamped: int = 0
    """Requests that were cut to what an engine takes."""
    loads: list[tuple[float, float]] = field(default_factory=list)
    """(mean, standard deviation) over the pods of requests in flight, once a second."""
    seconds: float = 0.0
    """From the first arrival to the last token."""
    preemptions: int = 0


class NamedBlocks(PrefixHasher):
    """Gives the trace's names where the product hashes text. Set `request` before each decision."""

    def __init__(self) -> None:
        super().__init__()
        self.request: TraceRequest | None = None
        self.prompt_tokens = 0

    def chain(self, text: bytes, model: str, block_bytes: int = 256) -> Chain:
        """The names of the prompt's blocks, of as many tokens as the text's blocks would have."""
        assert self.request is not None
        names = self.request.block_names(int(block_bytes / NOMINAL_BYTES_PER_TOKEN), self.prompt_tokens)
        return Chain(pack(names), block_bytes) if names else EMPTY


class _Worker:
    """One worker process."""

    def __init__(self, replica: "_Replica", number: int, strategy: str, settings: Settings) -> None:
        tables = replica.attach(FIRST_WORKER + number)
        self.replica = replica
        self.hasher = NamedBlocks()
        index = PrefixIndex(tables.prefix_log, tables.pods, max_blocks=settings.index_blocks)
        self.rates = Rates(settings.prior, learn=settings.learn)
        context = Context(
            random.Random(settings.seed * 1000 + replica.number * 100 + number),
            prefixes=Prefixes(index, self.hasher),
            rates=self.rates,
            user_tokens=tables.user_tokens,
        )
        self.scheduler = Scheduler(tables, strategy, replica.clock, context)


class _Replica:
    """One machine's tables, with its workers, its scraper, and its end of the exchange."""

    def __init__(
        self, number: int, strategy: str, settings: Settings, engines: list[Engine], clock: Callable[[], float]
    ) -> None:
        self.number = number
        self.clock = clock
        writers = FIRST_WORKER + settings.workers
        self.tables = Tables.create(Capacity(pods=settings.pods, writers=writers, catalog_bytes=1 << 20, series=1024))
        records = []
        for slot in range(settings.pods):
            name = f"pod-{slot}"
            records.append(PodRecord(slot, slot + 1, name, f"10.0.{slot >> 8}.{slot & 255}:8000", (MODEL,)))
            self.tables.pods.claim(slot, slot + 1)
        self.tables.catalog.publish(CatalogDocument(tuple(records)))
        self.polls = Polls(self.tables, engines, settings.metrics_interval, settings.metrics_age, clock())
        self.workers = [_Worker(self, worker, strategy, settings) for worker in range(settings.workers)]
        self.mirror = Mirror(self.attach(REPLICATOR), settings.prior, learn=settings.learn)

    def attach(self, writer: int) -> Tables:
        """The tables as the process with this writer row sees them."""
        self.tables.ledger.admit(writer)
        return Tables.attach(self.tables.segment.fd, writer)

    def exchange(self, others: "list[_Replica]") -> None:
        """Tell the others what there is to tell, as `workers.replicator` does."""
        now = self.clock()
        loads, routed = self.mirror.loads(now), self.mirror.routed(now, 1 << 30)
        for other in others:
            other.mirror.apply_loads(str(self.number), loads, now)
            other.mirror.apply_routed(routed, 0.0, now)
            other.mirror.enter(now)


class Simulation:
    """One replay of one strategy. `run` once."""

    def __init__(self, trace: Sequence[TraceRequest], strategy: str, settings: Settings) -> None:
        self._trace = trace
        self._strategy = strategy
        self._settings = settings
        self._now = START - 1.0
        speeds = itertools.islice(itertools.cycle(settings.pod_speeds), settings.pods)
        self._engines = [Engine(settings.params.faster(speed)) for speed in speeds]
        self._planned: list[float | None] = [None] * settings.pods
        self._in_flight = [0] * settings.pods
        self._replicas = [
            _Replica(number, strategy, settings, self._engines, self.clock) for number in range(settings.replicas)
        ]
        self._workers = [worker for replica in self._replicas for worker in replica.workers]
        self._spread = random.Random(settings.seed)
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = 0
        self._waiting: dict[int, list[int]] = {}
        self._left = len(trace)
        self._result = Run()
        self._limit = min(settings.params.num_blocks * settings.params.block_tokens, settings.params.max_model_len)

    def clock(self) -> float:
        """The virtual time."""
        return self._now

    def run(self, progress: Callable[[int], None] = lambda done: None) -> Run:
        """Replay to the last token. `progress` is told how many requests have been answered."""
        for index, request in enumerate(self._trace):
            if request.after < 0:
                self._at(START + request.at / self._settings.speed, self._arrive, index)
            else:
                self._waiting.setdefault(request.after, []).append(index)
        for replica in self._replicas:
            self._at(replica.polls.next_due(), self._poll, replica)
        if len(self._replicas) > 1:
            self._at(START + self._settings.exchange_interval, self._exchange, None)
        self._at(START, self._look, None)
        events = self._events
        reported = 0
        while self._left:
            self._now, _, handle, what = heapq.heappop(events)
            handle(what)
            done = len(self._result.outcomes)
            if done - reported >= 100:
                reported = done
                progress(done)
        progress(len(self._result.outcomes))
        self._result.seconds = self._now - START
        self._result.preemptions = sum(engine.stats.preemptions for engine in self._engines)
        return self._result

    def _at(self, when: float, handle: Callable[[Any], None], what: Any) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, self._order, handle, what))

    def _arrive(self, index: int) -> None:
        traced = self._trace[index]
        prompt = min(traced.prompt_tokens, self._limit - 1)
        output = min(traced.output_tokens, self._limit - prompt)
        if prompt != traced.prompt_tokens or output != traced.output_tokens:
            self._result.clamped += 1
        worker = self._workers[int(self._spread.random() * len(self._workers))]
        worker.hasher.request, worker.hasher.prompt_tokens = traced, prompt
        request = RoutingRequest(
            MODEL,
            read_text=lambda: _text(traced, prompt),
            prompt_tokens=prompt,
            session_key=traced.session,
        )
        decision = worker.scheduler.decide(
            request, self._strategy, destination=Destination.HEADER, held=True, duplex=False
        )
        uncached = request.uncached_tokens if request.uncached_tokens >= 0 else prompt
        slot = decision.pod.slot
        worker.replica.polls.sent(slot, self._now)
        named = traced.named_tokens
        names = traced.block_names(
            self._settings.params.block_tokens, prompt + output if named >= prompt + output else prompt
        )
        engine = self._engines[slot]
        self._in_flight[slot] += 1
        engine.submit(EngineRequest(prompt, output, names, key=(index, slot, worker, decision, uncached)), self._now)
        self._plan(slot)

    def _plan(self, slot: int) -> None:
        when = self._engines[slot].next_event()
        if when != self._planned[slot]:
            self._planned[slot] = when
            if when is not None:
                self._at(when, self._wake, (slot, when))

    def _wake(self, what: tuple[int, float]) -> None:
        slot, when = what
        if self._planned[slot] == when:
            self._planned[slot] = None
            self._advance(slot)

    def _advance(self, slot: int) -> None:
        """Bring an engine up to now and hear what happened."""
        for event in self._engines[slot].advance(self._now):
            request = event.request
            if request.finished >= 0 and request.key is not None:
                self._end(request)
        self._plan(slot)

    def _end(self, request: EngineRequest) -> None:
        index, slot, worker, decision, uncached = request.key
        request.key = None
        request.block_hashes = ()
        worker.scheduler.release(decision)
        self._in_flight[slot] -= 1
        self._left -= 1
        self._result.outcomes.append(Outcome(request, slot, uncached))
        for follower in self._waiting.pop(index, ()):
            self._at(self._now + self._trace[follower].at, self._arrive, follower)

    def _poll(self, replica: _Replica) -> None:
        replica.polls.run(self._now, self._advance)
        self._at(replica.polls.next_due(), self._poll, replica)

    def _exchange(self, _: None) -> None:
        for replica in self._replicas:
            replica.exchange([other for other in self._replicas if other is not replica])
        self._at(self._now + self._settings.exchange_interval, self._exchange, None)

    def _look(self, _: None) -> None:
        n = len(self._in_flight)
        mean = sum(self._in_flight) / n
        deviation = (sum((x - mean) ** 2 for x in self._in_flight) / n) ** 0.5
        self._result.loads.append((mean, deviation))
        self._at(self._now + LOAD_SECONDS, self._look, None)


def _text(request: TraceRequest, prompt_tokens: int) -> bytes:
    """Text of the prompt's size, which begins with the name of its first block: no strategy reads more of it."""
    length = int(prompt_tokens * NOMINAL_BYTES_PER_TOKEN)
    size = min(64, prompt_tokens)
    begin = b"".join(name.to_bytes(8, "little") * 128 for name in request.block_names(size, size))[:length]
    return begin + bytes(length - len(begin))
