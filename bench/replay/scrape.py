"""The scraper's part of a replay: the engines' counters into the pod rows, by the product's own timetable and window.

Only the page of text between them is left out: a `Sample` is filled from the engine's statistics as the reader
fills it from the page of a vLLM. The histograms' buckets are left out too, which no strategy looks at.
"""

from collections import deque
from collections.abc import Callable

import numpy as np

from bench.engine import Engine
from bench.engine_stats import PICOSECONDS, Histogram
from state.ledger import Entry
from state.pods import COLUMN, FIELDS, Floats, Health
from state.tables import Tables
from workers.scrape import page
from workers.scrape.pace import Pace
from workers.scrape.page import Sample
from workers.scrape.window import EngineState, Window

IDLE_SECONDS = 5.0
"""Between two polls of an idle pod, at most."""
_SHARED = [name for name in FIELDS if name in EngineState._fields]
_COLUMNS = np.array([COLUMN[name] for name in _SHARED])
_PLACES = [EngineState._fields.index(name) for name in _SHARED]


def sample_of(engine: Engine) -> Sample:
    """What a page of this engine says. Bring the engine up to date first."""
    stats, params = engine.stats, engine.params
    return Sample(
        running=engine.running,
        waiting=engine.waiting,
        waiting_deferred=0,
        kv_usage=engine.kv_usage,
        prompt_tokens=stats.prompt_tokens,
        computed_prompt_tokens=stats.prompt_tokens - stats.prompt_tokens_cached,
        generation_tokens=stats.generation_tokens,
        prefix_queries=stats.prefix_queries_tokens,
        prefix_hits=stats.prefix_hits_tokens,
        preemptions=stats.preemptions,
        finished=stats.finished_stop + stats.finished_length + stats.aborted,
        awake=1.0,
        block_size=params.block_tokens,
        num_gpu_blocks=params.num_blocks,
        start_time_seconds=1.0,
        ttft=_histogram(stats.time_to_first_token, PICOSECONDS),
        itl=_histogram(stats.inter_token_latency, PICOSECONDS),
        e2e=_histogram(stats.e2e_latency, PICOSECONDS),
        queue=_histogram(stats.queue_time, PICOSECONDS),
        tpot=_histogram(stats.time_per_output_token, PICOSECONDS),
        prefill=_histogram(stats.prefill_time, PICOSECONDS),
        decode=_histogram(stats.decode_time, PICOSECONDS),
        inference=_histogram(stats.inference_time, PICOSECONDS),
        prompt_length=_histogram(stats.request_prompt_tokens),
        generation_length=_histogram(stats.request_generation_tokens),
        step_tokens=_histogram(stats.iteration_tokens),
        found=1,
    )


def _histogram(histogram: Histogram, unit: int = 1) -> page.Histogram:
    return page.Histogram((), [], histogram.total / unit, histogram.count)


class Polls:
    """One replica's polls of all engines. `age_seconds` is how much later than taken a sample is seen."""

    def __init__(self, tables: Tables, engines: list[Engine], interval: float, age_seconds: float, now: float) -> None:
        self._tables = tables
        self._engines = engines
        self._age = age_seconds
        self._pace: Pace[int] = Pace(interval, max(interval, IDLE_SECONDS))
        self._windows = [Window() for _ in engines]
        self._rows = [tables.pods.row(slot) for slot in range(len(engines))]
        self._late: deque[tuple[float, int, Floats]] = deque()
        for slot in range(len(engines)):
            self._take(slot, now)
            self._tables.pods.write(slot, self._rows[slot])
            self._pace.add(slot, now + interval * slot / len(engines))

    def next_due(self) -> float:
        """When `run` has something to do."""
        due = self._pace.next_due()
        assert due is not None
        return min(due, self._late[0][0]) if self._late else due

    def sent(self, slot: int, now: float) -> None:
        """A request went to a pod: an idle one is polled often from now on."""
        self._pace.hurry(slot, now)

    def run(self, now: float, advance: Callable[[int], None]) -> None:
        """Poll those whose turn it is, once `advance` has brought them up to date."""
        write = self._tables.pods.write
        while self._late and self._late[0][0] <= now:
            _, slot, row = self._late.popleft()
            write(slot, row)
        for slot in self._pace.due(now):
            engine = self._engines[slot]
            advance(slot)
            self._take(slot, now)
            if self._age:
                self._late.append((now + self._age, slot, self._rows[slot].copy()))
            else:
                write(slot, self._rows[slot])
            self._pace.polled(slot, now, busy=engine.running > 0 or engine.waiting > 0, ok=True)

    def _take(self, slot: int, now: float) -> None:
        engine = self._engines[slot]
        row = self._rows[slot]
        state = self._windows[slot].add(now, sample_of(engine))
        row[_COLUMNS] = [state[place] for place in _PLACES]
        row[COLUMN["health"]] = Health.READY
        row[COLUMN["sampled_at"]] = now
        row[COLUMN["incarnation"]] = 0
        row[COLUMN["failed_polls"]] = 0
        ledger = self._tables.ledger
        row[COLUMN["tracked_requests_at_sample"]] = ledger.total(Entry.REQUESTS, slot)
        row[COLUMN["tracked_tokens_at_sample"]] = ledger.total(Entry.TOKENS, slot)
        row[COLUMN["tracked_promised_at_sample"]] = ledger.total(Entry.PROMISED, slot)
