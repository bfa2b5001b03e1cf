"""What consecutive samples of a pod say about its recent past.

Theory of operation. Engines export totals since their start. A rate or a mean "now" is a difference of two samples
divided by time or count. `Window` keeps a few samples of the last `seconds`, a twelfth of the window apart, and takes
each difference between the newest sample and the oldest kept, so its memory is bounded whatever the poll interval and
a figure covers between one and 13/12 windows once the window has filled.

No data. Rates need two samples. Quantiles and the hit ratio are NaN when the window saw no event that they could be
taken from: they speak of the present only. Means are what predictions are made from, and an old mean beats none: they
keep their last known value, and `observed_age_seconds` says how old the newest observation is. Until the window has
seen any, they hold the mean since the engine's start, and the age is NaN.

Busy time. No engine exports it (xLLM's own gauge apart). Three estimates offer themselves. Inference seconds per
second is the mean number of running requests, which says nothing of how they overlap, and arrives only as
requests finish. Steps times step duration fails where a step's duration does not stand on the page (prefill
alone, SGLang). What is left is sampling: was a request running at the time of the poll? Each poll interval is
charged by the mean of its two ends (the trapezoid rule), so where the polls do not follow the load the expected
value is exact, with a standard error of sqrt(p (1 - p) / polls): 0.06 at most for one poll a second and 60
seconds. But ours do follow it: an idle pod is polled rarely, and soon when it has got a request. So an interval over
which no token, step or request was counted and at whose end nothing runs is idle for certain and charged nothing; one
that begins idle and ends busy is charged no more than requests usually take; and between one poll that finds
nothing running and the next that does, the inference seconds that were added are all there were, unless requests were
aborted, of which engines tell none: the busy time is no more than their sum, and no less than if they overlapped by
chance, t (1 - exp(-sum / t)) of t seconds.

Restarts. When the engine's start time changes, or any of its totals falls, everything known is forgotten and the
sample is the first of a new life.

Cost of `add` by `python -m bench.page_cost`: 14 to 24 us.
"""

from bisect import bisect_left
from collections import deque
from math import expm1
from operator import lt, sub
from typing import NamedTuple

from workers.scrape.page import NAN, Histogram, Sample
from workers.scrape.plausibility import bounds, plausible

SLOTS = 12
"""Samples that a full window keeps, apart from the newest."""


class EngineState(NamedTuple):
    """One pod as its metrics show it: floats only, NaN = not known.

    `x_p50_seconds` and its like are percentiles of what `x_mean_seconds` is the mean of.
    """

    running: float = NAN
    """Requests in the engine's batches, at the time of the poll."""
    waiting: float = NAN
    """Requests in the engine's queue."""
    waiting_deferred: float = NAN
    """Requests in the queue that capacity would not help."""
    swapped: float = NAN
    """Requests swapped out, retracted or paused."""
    kv_usage: float = NAN
    """Share of the KV cache in use, 0 to 1, mean over data-parallel ranks."""
    awake: float = NAN
    """1 awake, 0 asleep, between them if only some data-parallel ranks are."""
    block_size: float = NAN
    """Tokens in a KV block."""
    num_gpu_blocks: float = NAN
    """KV blocks, summed over data-parallel ranks."""
    kv_cache_tokens: float = NAN
    """Tokens that the KV cache holds, summed over data-parallel ranks."""
    start_time_seconds: float = NAN
    """When the engine started, seconds since 1970."""
    restarts: float = 0.0
    """Engine restarts seen by this window."""
    window_seconds: float = 0.0
    """Time that the rates below cover."""
    busy_ratio: float = NAN
    """Share of the window in which a request was running, 0 to 1."""
    hit_ratio: float = NAN
    """Prompt tokens found in the prefix cache / prompt tokens looked up, 0 to 1."""
    prompt_tokens_per_second: float = NAN
    """Prompt tokens, cached ones included."""
    computed_prompt_tokens_per_second: float = NAN
    """Prompt tokens that were computed, not found in a cache."""
    generation_tokens_per_second: float = NAN
    """Tokens generated."""
    requests_per_second: float = NAN
    """Requests finished for whatever reason."""
    aborts_per_second: float = NAN
    """Requests aborted, a part of the above."""
    preemptions_per_second: float = NAN
    """Requests thrown out of a batch for want of KV blocks."""
    rejections_per_second: float = NAN
    """Requests that the engine refused because its queue was full."""
    steps_per_second: float = NAN
    """Engine steps, summed over data-parallel ranks."""
    tokens_per_step: float = NAN
    """Prompt and generated tokens per engine step."""
    observed_age_seconds: float = NAN
    """Time since the newest event behind the means; 0: in the last poll interval."""
    ttft_mean_seconds: float = NAN
    """Mean time to first token."""
    ttft_p50_seconds: float = NAN
    ttft_p90_seconds: float = NAN
    ttft_p99_seconds: float = NAN
    itl_mean_seconds: float = NAN
    """Mean time between two tokens of a request, which is the step time while decoding."""
    itl_p50_seconds: float = NAN
    itl_p90_seconds: float = NAN
    itl_p99_seconds: float = NAN
    e2e_mean_seconds: float = NAN
    """Mean time from a request's arrival at the engine to its end."""
    e2e_p50_seconds: float = NAN
    e2e_p90_seconds: float = NAN
    e2e_p99_seconds: float = NAN
    queue_mean_seconds: float = NAN
    """Mean time a request spent waiting in the engine before its first step."""
    queue_p50_seconds: float = NAN
    queue_p90_seconds: float = NAN
    queue_p99_seconds: float = NAN
    tpot_mean_seconds: float = NAN
    """Mean over requests of their time per output token after the first."""
    prefill_mean_seconds: float = NAN
    """Mean time from a request's first step to its first token."""
    decode_mean_seconds: float = NAN
    """Mean time from a request's first token to its last."""
    inference_mean_seconds: float = NAN
    """Mean time from a request's first step to its last token."""
    prompt_tokens_mean: float = NAN
    """Mean prompt tokens of a finished request."""
    generation_tokens_mean: float = NAN
    """Mean generated tokens of a finished request."""


FIELDS: tuple[str, ...] = EngineState._fields
"""The columns, in the order of an `EngineState`."""
_MOST = bounds(FIELDS)

_NO_QUANTILES = (NAN, NAN, NAN)
_MEANS = (
    "ttft",
    "itl",
    "e2e",
    "queue",
    "tpot",
    "prefill",
    "decode",
    "inference",
    "prompt_length",
    "generation_length",
    "step_tokens",
)

_NEVER = Sample(**dict.fromkeys(_MEANS, Histogram((), [], 0.0, 0.0)))  # type: ignore[arg-type]  # an engine's birth


def quantile(bounds: tuple[float, ...], counts: list[float], q: float) -> float:
    """The q-quantile of a histogram with cumulative `counts`, linear within a bucket as in Prometheus' definition.

    The lowest bucket is taken to begin at 0 if its bound is positive. What lies above the last finite bound is
    reported as that bound. NaN if there is no observation or no finite bound.
    """
    if not counts or not counts[-1] > 0:
        return NAN
    rank = q * counts[-1]
    at = min(bisect_left(counts, rank), len(counts) - 1)
    upper = bounds[at]
    if upper == float("inf"):
        return bounds[at - 1] if at else NAN
    below = counts[at - 1] if at else 0.0
    lower = bounds[at - 1] if at else min(0.0, upper)
    within = counts[at] - below
    return lower + (upper - lower) * (rank - below) / within if within > 0 else upper


def _mean_between(old: Histogram, new: Histogram) -> float:
    count = new.count - old.count
    return (new.sum - old.sum) / count if count > 0 else NAN


def _quantiles_between(old: Histogram, new: Histogram) -> tuple[float, float, float]:
    """50th, 90th and 99th percentile of what came between two samples."""
    bounds = new.bounds
    if not new.count > old.count or (bounds is not old.bounds and bounds != old.bounds):
        return _NO_QUANTILES
    counts = list(map(sub, new.counts, old.counts))
    return quantile(bounds, counts, 0.5), quantile(bounds, counts, 0.9), quantile(bounds, counts, 0.99)


def _totals(sample: Sample) -> tuple[float, ...]:
    """Numbers that never fall while an engine lives, and of which one rises when it does anything."""
    return (
        sample.prompt_tokens,
        sample.generation_tokens,
        sample.computed_prompt_tokens,
        sample.prefix_queries,
        sample.finished,
        sample.preemptions,
        sample.ttft.count,
        sample.itl.count,
        sample.e2e.count,
        sample.step_tokens.count,
    )


def _is_restart(old: Sample, new: Sample) -> bool:
    started, starts = old.start_time_seconds, new.start_time_seconds
    if started == started and starts == starts and started != starts:
        return True
    return any(map(lt, _totals(new), _totals(old)))


def _busy_seconds(seconds: float, old: Sample, new: Sample, usual: float) -> float:
    """Estimate of the time in which a request ran, in `seconds` between two samples. `usual` is how long requests run,
    NaN if that is not known. See the head of this file."""
    began, ends = old.running > 0, new.running > 0
    if not ends and _totals(new) == _totals(old):
        return 0.0
    charged = seconds * (began + ends) / 2
    return min(charged, usual) if ends and not began and usual == usual else charged


def _run_seconds(sample: Sample) -> tuple[float, float]:
    """Seconds that finished requests ran, added up, and how many they were; NaN where the engine does not say."""
    if sample.inference.sum == sample.inference.sum:
        return sample.inference.sum, sample.inference.count
    return sample.e2e.sum - sample.queue.sum, sample.e2e.count


def _bounded(sampled: float, seconds: float, old: Sample, new: Sample) -> float:
    """Busy seconds of the `seconds` between two samples at which nothing ran, of which so many were sampled."""
    (before, count), (after, counted) = _run_seconds(old), _run_seconds(new)
    ran = after - before
    if not (seconds > 0 and ran >= 0):
        return sampled
    most = seconds
    if counted - count >= new.ttft.count - old.ttft.count:  # else some were aborted, of which no time is told
        most = min(ran, seconds)
    return min(max(sampled, -seconds * expm1(-ran / seconds)), most)


class _Kept(NamedTuple):
    time: float
    busy_seconds: float
    """Busy time from the first sample of this life to this one."""
    sample: Sample


class Window:
    """The recent past of one pod. `add` takes its samples in order of time."""

    def __init__(self, seconds: float = 60.0) -> None:
        if not seconds > 0:
            raise ValueError(f"a window of {seconds} seconds: it must be longer than 0")
        self._seconds = seconds
        self._kept: deque[_Kept] = deque()
        self._newest: _Kept | None = None
        self._idle: _Kept | None = None
        """The last at which nothing ran."""
        self._observed_at = NAN
        self._means = dict.fromkeys(_MEANS, NAN)
        self._restarts = 0

    def add(self, now: float, sample: Sample) -> EngineState:
        """What is known after `sample`, taken at `now` (seconds on any clock that does not go back).

        A truncated sample, or one that is not later than the last, gives its gauges but is not remembered.
        """
        newest = self._newest
        if sample.truncated or (newest is not None and now <= newest.time):
            return self._state(now, sample)
        if newest is not None and _is_restart(newest.sample, sample):
            self._restarts += 1
            self._kept.clear()
            self._idle = None
            self._means = dict.fromkeys(_MEANS, NAN)
            self._observed_at = NAN
            newest = None
        busy_seconds = 0.0
        if newest is not None:
            old = newest.sample
            usual = self._means["inference"]
            busy_seconds = newest.busy_seconds + _busy_seconds(now - newest.time, old, sample, usual)
            if (
                sample.itl.count > old.itl.count
                or sample.ttft.count > old.ttft.count
                or sample.e2e.count > old.e2e.count
            ):
                self._observed_at = now
        if not sample.running > 0:
            busy_seconds = self._put_right(now, busy_seconds, sample)
        self._newest = newest = _Kept(now, busy_seconds, sample)
        if not sample.running > 0:
            self._idle = newest
        self._keep(now, newest)
        base = self._kept[0]
        self._learn_means(_NEVER if base is newest else base.sample, sample)
        return self._state(now, sample)

    def _put_right(self, now: float, busy_seconds: float, sample: Sample) -> float:
        """Nothing runs: what was estimated since that was last so can be held against the time that requests ran."""
        idle = self._idle
        if idle is None:
            return busy_seconds
        sampled = busy_seconds - idle.busy_seconds
        busy = _bounded(sampled, now - idle.time, idle.sample, sample)
        if sampled > 0:
            for place, kept in enumerate(self._kept):
                if kept.time > idle.time:
                    part = (kept.busy_seconds - idle.busy_seconds) / sampled
                    self._kept[place] = kept._replace(busy_seconds=idle.busy_seconds + part * busy)
        return idle.busy_seconds + busy

    def _keep(self, now: float, newest: _Kept) -> None:
        kept = self._kept
        # A little less than the exact distance, so that jitter of the polls does not double it.
        if not kept or now - kept[-1].time >= 0.95 * self._seconds / SLOTS:
            kept.append(newest)
        while len(kept) > 1 and kept[1] is not newest:
            # After a gap in the polls the oldest may lie far back, with nothing between it and the recent ones.
            if now - kept[1].time < self._seconds and now - kept[0].time < 1.25 * self._seconds:
                break
            kept.popleft()

    def _learn_means(self, old: Sample, new: Sample) -> None:
        means = self._means
        for name in _MEANS:
            mean = _mean_between(getattr(old, name), getattr(new, name))
            if mean == mean:
                means[name] = mean

    def _state(self, now: float, sample: Sample) -> EngineState:
        newest = self._newest
        if newest is None or not self._kept:  # truncated pages alone so far
            newest = base = _Kept(now, 0.0, sample)
        else:
            base = self._kept[0]
        old, new = base.sample, newest.sample
        seconds = newest.time - base.time
        per_second = 1.0 / seconds if seconds > 0 else NAN

        prompt = (new.prompt_tokens - old.prompt_tokens) * per_second
        generation = (new.generation_tokens - old.generation_tokens) * per_second
        queries, hits = new.prefix_queries - old.prefix_queries, new.prefix_hits - old.prefix_hits
        computed = (new.computed_prompt_tokens - old.computed_prompt_tokens) * per_second
        if computed != computed:
            computed = max(prompt - hits * per_second, 0.0)
        finished = (new.finished - old.finished) * per_second
        if finished != finished:
            finished = (new.e2e.count - old.e2e.count) * per_second
        hit_ratio = hits / queries if queries > 0 else NAN
        if new.prefix_queries != new.prefix_queries or new.prefix_hits != new.prefix_hits:
            hit_ratio = sample.prefix_hit_ratio
        busy = (newest.busy_seconds - base.busy_seconds) * per_second
        kv_cache_tokens = sample.kv_cache_tokens
        if kv_cache_tokens != kv_cache_tokens:
            kv_cache_tokens = sample.num_gpu_blocks * sample.block_size
        means = self._means
        ttft_p50, ttft_p90, ttft_p99 = _quantiles_between(old.ttft, new.ttft)
        itl_p50, itl_p90, itl_p99 = _quantiles_between(old.itl, new.itl)
        e2e_p50, e2e_p90, e2e_p99 = _quantiles_between(old.e2e, new.e2e)
        queue_p50, queue_p90, queue_p99 = _quantiles_between(old.queue, new.queue)
        state = EngineState(
            running=sample.running,
            waiting=sample.waiting,
            waiting_deferred=sample.waiting_deferred,
            swapped=sample.swapped,
            kv_usage=sample.kv_usage,
            awake=sample.awake,
            block_size=sample.block_size,
            num_gpu_blocks=sample.num_gpu_blocks,
            kv_cache_tokens=kv_cache_tokens,
            start_time_seconds=sample.start_time_seconds,
            restarts=float(self._restarts),
            window_seconds=seconds,
            busy_ratio=busy if sample.running == sample.running else sample.utilization,
            hit_ratio=hit_ratio,
            prompt_tokens_per_second=prompt if prompt == prompt else sample.prompt_throughput,
            computed_prompt_tokens_per_second=computed,
            generation_tokens_per_second=generation if generation == generation else sample.generation_throughput,
            requests_per_second=finished,
            aborts_per_second=(new.finished_abort - old.finished_abort) * per_second,
            preemptions_per_second=(new.preemptions - old.preemptions) * per_second,
            rejections_per_second=(new.rejections - old.rejections) * per_second,
            steps_per_second=(new.step_tokens.count - old.step_tokens.count) * per_second,
            tokens_per_step=means["step_tokens"],
            observed_age_seconds=now - self._observed_at,
            ttft_mean_seconds=means["ttft"],
            ttft_p50_seconds=ttft_p50,
            ttft_p90_seconds=ttft_p90,
            ttft_p99_seconds=ttft_p99,
            itl_mean_seconds=means["itl"],
            itl_p50_seconds=itl_p50,
            itl_p90_seconds=itl_p90,
            itl_p99_seconds=itl_p99,
            e2e_mean_seconds=means["e2e"],
            e2e_p50_seconds=e2e_p50,
            e2e_p90_seconds=e2e_p90,
            e2e_p99_seconds=e2e_p99,
            queue_mean_seconds=means["queue"],
            queue_p50_seconds=queue_p50,
            queue_p90_seconds=queue_p90,
            queue_p99_seconds=queue_p99,
            tpot_mean_seconds=means["tpot"],
            prefill_mean_seconds=means["prefill"],
            decode_mean_seconds=means["decode"],
            inference_mean_seconds=means["inference"],
            prompt_tokens_mean=means["prompt_length"],
            generation_tokens_mean=means["generation_length"],
        )
        return EngineState._make(plausible(state, _MOST))  # a counter may have leapt
