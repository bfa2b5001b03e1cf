"""The scraper process: finds the pods, polls their metrics, judges their health, and is the only writer of their rows.

Every pod has one task at most: the poll under way. `Pace` says whose turn it is, so polls are spread evenly over the
interval and a fleet of pods never delivers its pages in one burst; reading a page costs some 0.1 ms.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import structlog

from router.rules import CONFIG
from state.ledger import Entry
from state.pods import COLUMN, FIELDS, Floats, Health
from state.tables import REPLICATOR, Tables
from workers.address import parse_address
from workers.config import Config
from workers.discovery.model_config import usable
from workers.discovery.registry import FoundPod, Registry, RegistryFull, Settings
from workers.discovery.source import source_of
from workers.envoy_pods import PodsFile
from workers.process import until_stopped
from workers.scrape.engines import engine_named
from workers.scrape.health import Peer, Peers, PodHealth
from workers.scrape.pace import Pace
from workers.scrape.page import KnownLines, PageReader, Sample
from workers.scrape.poll import Poller, PollError
from workers.scrape.settle import Excess
from workers.scrape.window import EngineState, Window

log = structlog.get_logger()

LOOK_SECONDS = 1.0
"""Between two looks at the source of pods."""
RESOLVE_SECONDS = 10.0
"""Between two lists of the pods when nothing has changed: host names are resolved again."""
NICENESS = 5
"""A page read half a millisecond later harms nobody; a decision that waits for one does, where cores are few."""
ANNOUNCE_SECONDS = 0.05
"""For which samples are gathered before readers are told of them. Of a pod's health they are told at once."""
OFTEN_SECONDS = 30.0
"""An engine does not restart that soon, let alone again and again: then there are several behind one address, or its
counters are wrong."""
OFTEN = 3
JUDGE_SECONDS = 0.1
"""Between two looks at what the workers saw of the pods' answers."""

_HEALTH = COLUMN["health"]
_FROM_STATE = tuple((COLUMN[name], EngineState._fields.index(name)) for name in FIELDS if name in EngineState._fields)
_COLUMNS = np.array([column for column, _ in _FROM_STATE])
_PLACES = [place for _, place in _FROM_STATE]


@dataclass(eq=False, slots=True)
class _Watched:
    """A pod that is polled."""

    pod: FoundPod
    slot: int
    poller: Poller
    reader: PageReader
    window: Window
    health: PodHealth
    row: Floats
    excess: Excess = field(default_factory=Excess)
    incarnation: int = 0
    restarted_at: float = -math.inf
    often: int = 0
    """Restarts that each came soon after the one before."""
    told_incarnation: int = 0
    restarts: float = 0.0
    started: float = math.nan
    """When the engine started, by a predecessor's last poll."""
    good: int = 0
    bad: int = 0
    implausible: tuple[str, ...] = ()
    task: asyncio.Task[None] | None = None


class Scraper:
    """See the head of this file."""

    def __init__(self, config: Config, tables: Tables, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._tables = tables
        self._clock = clock
        self._series = tables.series()
        self._source = source_of(config)
        self._registry = Registry(tables, clock())
        if self._source is not None:
            self._source.remember(self._registry.pods.values())
        scrape = config.scrape
        self._pace: Pace[int] = Pace(
            scrape.interval_min_seconds, scrape.interval_max_seconds, max(scrape.interval_max_seconds, 10.0)
        )
        self._known_lines: dict[str, KnownLines] = {}
        self._pods: dict[int, _Watched] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf
        self._announcing: asyncio.TimerHandle | None = None
        self._seen: tuple[list[int], list[int]] = ([], [])
        self._pods_file = PodsFile(config.envoy.pods_file) if config.envoy.pods_file is not None else None
        self._without = False

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Until cancelled. `ready` is called after the first discovery; a predecessor's pods are polled before it."""
        for slot, pod in self._registry.pods.items():
            if slot not in self._pods:
                self._watch(slot, pod)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._judge_forever())
                group.create_task(self._discover_forever(ready))
        finally:
            if self._source is not None:
                await self._source.stop()

    async def discover(self) -> None:
        """Follow the source once."""
        if self._source is None:
            self._take_over([], {})
            return
        self._source.reload()
        self._series.put(float(self._source.usable), "discovery_usable")
        if self._source.loaded:
            self._take_over(*await self._source.resolve())

    def _take_over(self, found: list[FoundPod], settings: Settings) -> None:
        complete = self._source is None or self._source.complete
        if not found and not complete and self._tables.catalog.version == 0:
            return  # not a word of any pod yet: discovery has not loaded
        found = [_with_usable_profiles(pod) for pod in found]
        try:
            added, leaving = self._registry.update(found, settings, self._clock(), complete=complete)
        except RegistryFull as error:
            log.error("pods not added, the others stay as they are", error=str(error))
            return
        if self._registry.waiting:
            log.warning("pods wait until rows are free: raise capacity.pods", waiting=self._registry.waiting)
        pods = self._registry.pods
        self._tell_envoy()
        for slot in added:
            self._watch(slot, pods[slot])
        for slot, pod in pods.items():
            watched = self._pods.get(slot)
            if watched is not None and watched.pod != pod:
                if (watched.pod.metrics_address, watched.pod.engine) != (pod.metrics_address, pod.engine):
                    self._unwatch(slot)
                    self._watch(slot, pod)
                watched.pod = pod
        if complete and not found and not self._without:
            cure = "set `endpoints` or `kubernetes`" if self._source is None else self._source.cure()
            log.warning("there are no pods, every request will be refused", cure=cure)
        self._without = complete and not found
        if added or leaving:
            self._series.reclaim({pod.name for pod in pods.values()})
            log.info("pods changed", added=len(added), leaving=len(leaving), pods=len(pods))

    def _tell_envoy(self) -> None:
        if self._pods_file is not None:
            self._pods_file.write({pod.address: pod.name for pod in self._registry.pods.values()})

    # -- loops

    async def _discover_forever(self, ready: Callable[[], None]) -> None:
        resolved = self._clock()
        await self.discover()
        ready()
        source = self._source
        freed: list[int] = []
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = self._clock()
            if now - resolved >= RESOLVE_SECONDS or (source is not None and source.changed()):
                resolved = now
                await self.discover()
            elif source is not None and source.loaded and (source.news or (freed and self._registry.waiting)):
                self._take_over(*source.listed())
            freed = self._registry.sweep(now)
            for slot in freed:
                gone = self._pods.get(slot)
                self._unwatch(slot)
                self._tell_envoy()
                if gone is not None:
                    log.info("a pod is gone", pod=gone.pod.name, address=gone.pod.address)

    async def _judge_forever(self) -> None:
        while True:
            await asyncio.sleep(JUDGE_SECONDS)
            self._judge()

    # -- one pod

    def _start_due(self) -> None:
        """Start the polls whose turn it is, and come back for the next."""
        self._timer_due = math.inf
        for slot in self._pace.due(self._clock()):
            watched = self._pods[slot]
            watched.task = asyncio.ensure_future(self._poll(watched))
        self._plan()

    def _plan(self) -> None:
        """Set the timer to the next poll, if that is sooner than what it is set to."""
        due = self._pace.next_due()
        if due is None or due >= self._timer_due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        loop = asyncio.get_running_loop()
        # Timers have a resolution of a millisecond and may be early by as much.
        self._timer = loop.call_later(max(due - self._clock(), 0.0) + 0.001, self._start_due)

    def _watch(self, slot: int, pod: FoundPod) -> None:
        engine = engine_named(pod.engine)
        _, host, port = parse_address(pod.metrics_address)
        known = self._known_lines.setdefault(engine.name, KnownLines(engine))
        scrape = self._config.scrape
        row = self._tables.pods.row(slot)
        watched = _Watched(
            pod,
            slot,
            Poller(host, port, engine.path, scrape.timeout_seconds),
            PageReader(known),
            Window(scrape.window_seconds),
            PodHealth.resumed(
                scrape.failures,
                Health(int(row[_HEALTH])),
                seen=bool(row[COLUMN["sampled_at"]] > 0),
                failed_polls=int(row[COLUMN["failed_polls"]]),
                now=self._clock(),
            ),
            row,
            incarnation=int(row[COLUMN["incarnation"]]),
            started=float(row[COLUMN["start_time_seconds"]]),
        )
        watched.told_incarnation = watched.incarnation
        watched.good, watched.bad = self._answers(slot)
        self._pods[slot] = watched
        self._pace.add(slot, self._clock())
        self._plan()

    def _unwatch(self, slot: int) -> None:
        watched = self._pods.pop(slot, None)
        if watched is None:
            return
        self._pace.remove(slot)
        if watched.task is not None:
            watched.task.cancel()
        watched.poller.close()

    async def _poll(self, watched: _Watched) -> None:
        try:
            page = await watched.poller.poll()
        except PollError as error:
            self._count_poll(watched, error.reason)
            self._failed(watched, str(error))
            return
        try:
            started = time.process_time()
            sample = watched.reader.read(page)
            if sample.found:
                self._count_poll(watched, "ok")
                self._take(watched, sample, self._clock())
            else:
                self._count_poll(watched, "no-metrics")
                self._failed(watched, f"the page has no metrics of engine {watched.pod.engine}")
            self._series.add(time.process_time() - started, "page_cpu_seconds")
        except Exception:  # a page must not end the polls of its pod
            log.exception("a metrics page could not be processed", pod=watched.pod.name)
            self._failed(watched, "its page could not be processed")

    def _count_poll(self, watched: _Watched, result: str) -> None:
        self._series.add(1.0, "polls", watched.pod.name, result)

    def _failed(self, watched: _Watched, why: str) -> None:
        health = watched.health
        before = health.state(self._clock())
        health.polled(ok=False)
        now = self._clock()
        after = health.state(now)
        if after is not before or (not health.seen and health.failed_polls == health.failures):
            log.warning("a pod is not ready", pod=watched.pod.name, address=watched.pod.metrics_address, why=why)
        watched.row[COLUMN["failed_polls"]] = health.failed_polls
        self._write(watched, now)
        self._pace.polled(watched.slot, now, busy=after is not Health.FAILED, ok=False)
        self._plan()

    def _take(self, watched: _Watched, sample: Sample, now: float) -> None:
        """A good page: its figures go into the pod's row."""
        health = watched.health
        before = health.state(now)
        health.polled(ok=True, asleep=sample.awake == 0.0)
        state = watched.window.add(now, sample)
        started, starts = watched.started, sample.start_time_seconds
        watched.started = math.nan  # from now on the window sees it
        if state.restarts > watched.restarts or (started == started and starts == starts and started != starts):
            watched.restarts = state.restarts
            watched.incarnation += 1
            self._tell_restart(watched, now)
        if sample.implausible != watched.implausible:
            watched.implausible = sample.implausible
            if sample.implausible:
                log.warning("implausible metrics are ignored", pod=watched.pod.name, of=", ".join(sample.implausible))
        row, slot = watched.row, watched.slot
        row[_COLUMNS] = [state[place] for place in _PLACES]
        row[COLUMN["utilization"]] = sample.utilization
        row[COLUMN["sampled_at"]] = now
        row[COLUMN["incarnation"]] = watched.incarnation
        row[COLUMN["failed_polls"]] = 0
        ledger = self._tables.ledger
        own, tokens = ledger.load(slot)
        # What an engine says wrongly is not what it does not have.
        engine = math.nan if sample.implausible else sample.running + _or_zero(sample.waiting)
        mine, my_tokens = own, tokens
        if any(ledger.held_by(REPLICATOR, slot)):
            mine, my_tokens = max(self._of_this_replica(slot), self._of_this_replica(slot))
        correction = watched.excess.correction(mine, engine, now)
        if correction:
            watched.excess.stray = 0
            # Tokens go with requests, in the same proportion.
            ledger.settle(slot, correction, -my_tokens if mine <= 0 else round(my_tokens * correction / mine))
            self._series.add(abs(correction), "settled", watched.pod.name)
            own, tokens = ledger.load(slot)
        elif stray := watched.excess.leftover(mine, my_tokens):
            ledger.settle(slot, 0, stray)
            own, tokens = ledger.load(slot)
        row[COLUMN["tracked_requests_at_sample"]] = own
        row[COLUMN["tracked_tokens_at_sample"]] = tokens
        row[COLUMN["tracked_promised_at_sample"]] = ledger.total(Entry.PROMISED, slot)
        self._write(watched, now)
        busy = own > 0 or sample.running > 0 or sample.waiting > 0
        self._pace.polled(slot, now, busy=busy, ok=True)
        self._plan()
        if before is not Health.READY and health.state(now) is Health.READY:
            log.info("a pod is ready", pod=watched.pod.name, address=watched.pod.address)

    @staticmethod
    def _tell_restart(watched: _Watched, now: float) -> None:
        soon = now - watched.restarted_at < OFTEN_SECONDS
        watched.restarted_at, watched.often = now, watched.often + 1 if soon else 0
        pod = watched.pod
        if watched.often < OFTEN:
            log.info("an engine has restarted", pod=pod.name)
        elif watched.often == OFTEN:
            log.warning(
                "an engine seems to restart all the time, so that nothing of it stays known: list each engine by an "
                "address of its own",
                pod=pod.name, address=pod.metrics_address,
            )  # fmt: skip

    def _of_this_replica(self, slot: int) -> tuple[int, int]:
        """(requests, tokens) that this replica has in flight: what others have is theirs to put right. Read between two
        steps of the replicator's it may be too low, which would be put right at once: so look twice."""
        ledger = self._tables.ledger
        requests, tokens = ledger.load(slot)
        of_others, their_tokens = ledger.held_by(REPLICATOR, slot)
        return requests - of_others, tokens - their_tokens

    def _write(self, watched: _Watched, now: float) -> None:
        row = watched.row
        before, row[_HEALTH] = row[_HEALTH], watched.health.state(now)
        urgent = bool(before != row[_HEALTH]) or watched.incarnation != watched.told_incarnation
        watched.told_incarnation = watched.incarnation
        self._tables.pods.write(watched.slot, row, announce=urgent)
        if not urgent and self._announcing is None:
            self._announcing = asyncio.get_running_loop().call_later(ANNOUNCE_SECONDS, self._announce)

    def _announce(self) -> None:
        self._announcing = None
        self._tables.pods.announce()

    # -- passive health

    def _answers(self, slot: int) -> tuple[int, int]:
        ledger = self._tables.ledger
        return ledger.total(Entry.SUCCEEDED, slot), ledger.total(Entry.FAILED, slot)

    def _judge(self) -> None:
        """Look at what the workers saw of the pods' answers; also wake pods that have got work, and end ejections."""
        now = self._clock()
        high = self._tables.pods.high
        ledger = self._tables.ledger
        in_flight = ledger.totals(Entry.REQUESTS, high)
        for slot in in_flight.nonzero()[0].tolist():
            self._pace.hurry(slot, now)
        self._plan()
        seen = ledger.totals(Entry.SUCCEEDED, high).tolist(), ledger.totals(Entry.FAILED, high).tolist()
        if seen != self._seen:
            self._seen = seen
            peers = Peers(self._peers, now)
            for slot, watched in self._pods.items():
                self._look_at_answers(watched, seen[0][slot], seen[1][slot], now, peers)
        for watched in self._pods.values():
            if watched.health.ejected_until and watched.health.state(now) != watched.row[_HEALTH]:
                self._write(watched, now)

    def _look_at_answers(self, watched: _Watched, good: int, bad: int, now: float, peers: Peers) -> None:
        more_good, more_bad = good - watched.good, bad - watched.bad
        if not more_good and not more_bad:
            return
        watched.good, watched.bad = good, bad
        health = watched.health
        if health.answered(more_good, more_bad, now, lambda: peers.spare(self._peer(watched))):
            self._series.add(1.0, "ejections", watched.pod.name)
            log.warning(
                "a pod's responses fail, it is ejected for a while",
                pod=watched.pod.name, seconds=round(health.ejected_until - now, 1),
            )  # fmt: skip

    def _peers(self) -> list[Peer]:
        draining = self._registry.draining
        return [Peer(watched.pod.models, watched.health, slot in draining) for slot, watched in self._pods.items()]

    def _peer(self, watched: _Watched) -> Peer:
        return Peer(watched.pod.models, watched.health, watched.slot in self._registry.draining)


def _with_usable_profiles(pod: FoundPod) -> FoundPod:
    """An annotation is not ours to refuse: what cannot be followed is left out, lest it fail the model's requests."""
    annotation = pod.labels.get(CONFIG)
    if not annotation:
        return pod
    return replace(pod, labels={**pod.labels, CONFIG: usable(annotation, pod.name)})


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


async def run_scraper(config: Config, tables: Tables, ready: Callable[[], None]) -> None:
    """The scraper process, until told to stop."""
    os.nice(NICENESS)
    await until_stopped(Scraper(config, tables).run(ready))
