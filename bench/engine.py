"""One inference engine, modelled iteration by iteration after vLLM's V1 scheduler. No clock, no I/O: time goes in.

    engine = Engine(PRESETS["h100-llama-3.1-8b"])
    engine.submit(EngineRequest(prompt_tokens=900, output_tokens=120, block_hashes=hashes), now)
    while (at := engine.next_event()) is not None:
        for event in engine.advance(at): ...

Theory of operation
-------------------
The engine works in steps. At the start of a step it decides what the step computes and takes the KV blocks for it:

1. every running request that decodes gets one token; one whose last block is full takes a block. If none is free, the
   request that began last is preempted: it gives up its blocks and goes to the head of the queue, to be recomputed;
2. a prompt that did not fit the token budget of the step before goes on (there is at most one, the last one running);
3. if nothing was preempted, requests are admitted from the queue in order of arrival while tokens and places are left
   and the whole prompt fits the free blocks. Leading blocks of the prompt that are still in the cache are not
   computed again, except that at least the last token is computed (and, whole blocks only, the last block).

The step then lasts

    base + prefill tokens * c1 + (prefill token, earlier token) pairs * c2 + decoding requests * c3
         + KV tokens read * c4                                                                      [seconds]

and at its end the decoding requests and the prompts that are complete have one more token. A request that arrives or
is aborted during a step is seen when the step ends. Prompt blocks can be matched once they are computed, that is, from
the end of the step (vLLM: already by requests admitted behind them in the same step; `share_within_step`).

Runs. While nobody is admitted and nobody finishes, steps differ only in that each reads one KV token more per request.
Such a run is one event: its length is known beforehand (first request to finish, or first block that cannot be had),
its duration is an arithmetic series, and an arrival cuts it at the end of the step under way. Times are whole
picoseconds inside, so that a run gives the same numbers, to the last digit, as its steps one by one (`step_by_step`).

Cost: 80 µs of CPU per request of 18,000 + 340 tokens in 512-token blocks, 1.2 ms in 16-token blocks (about 1 µs a
block); stepping through the runs would take four times that (`python -m bench.engine_cost`).
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from math import inf, isqrt, nextafter
from typing import Any, NamedTuple

from bench.engine_stats import PICOSECONDS, EngineStats
from bench.kv_blocks import BlockPool

_PRIVATE_HASHES = 1 << 64  # hashes from here up are the engine's own


@dataclass(frozen=True, slots=True)
class EngineParams:
    """Rates are seconds; see the head of this file for what they multiply."""

    step_seconds: float
    prefill_token_seconds: float
    decode_request_seconds: float
    kv_token_seconds: float
    prefill_pair_seconds: float = 0.0
    num_blocks: int = 8192
    block_tokens: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131072
    share_within_step: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_seconds"):
                if not 0 <= value < inf:
                    raise ValueError(f"{field.name} is {value}; a rate is a finite number of seconds, not below 0")
            elif value < 1 and field.name != "share_within_step":
                raise ValueError(f"{field.name} is {value}; must be at least 1")
        if round(self.step_seconds * PICOSECONDS) < 1:
            raise ValueError(f"step_seconds is {self.step_seconds}; a step takes at least a picosecond")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs"
                f" ({self.max_num_seqs}); every running request needs a token per step"
            )

    def faster(self, factor: float) -> "EngineParams":
        """The same engine with every duration divided by `factor`."""
        rates = {f.name: getattr(self, f.name) / factor for f in fields(self) if f.name.endswith("_seconds")}
        return replace(self, **rates)


class EventKind(Enum):
    FIRST_TOKEN = "first token"
    FINISHED = "finished"
    PREEMPTED = "preempted"


class Event(NamedTuple):
    kind: EventKind
    request: "EngineRequest"
    at: float  # seconds


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One request and, as it proceeds, what became of it. Belongs to one engine; submitted once.

    `block_hashes[i]` names the tokens up to the end of block i, chained: any integer below 2**64. Give one for each
    full block of the prompt; further ones, if any, name blocks that the answer will fill. `max_tokens` is what the
    client allowed, for the statistics only. `key` is the caller's own. `prefilled`: another engine has computed the
    prompt, and the KV cache of all but its last token is fetched from there, in no time.
    """

    prompt_tokens: int
    output_tokens: int
    block_hashes: Sequence[int] = ()
    key: Any = None
    max_tokens: int | None = None
    prefilled: bool = False

    cached_tokens: int = 0  # prompt tokens that were not computed, at the first admission
    preemptions: int = 0
    # Picoseconds on the engine's clock; -1 until it happened.
    arrived: int = -1
    scheduled: int = -1
    first_token: int = -1
    last_token: int = -1
    finished: int = -1

    _generated: int = 0  # up to date unless decoding, see Engine.generated
    _computed: int = 0  # tokens with KV, up to date unless decoding
    _target: int = 0  # tokens to compute before the next one can be sampled
    _joined: int = -1  # the step after which it began to decode; -1: it does not
    _order: int = -1  # place among the running; -1: not running
    _published: int = 0  # leading blocks that are matchable or need not be
    _blocks: list[int] | None = None
    _hashes_answer: bool = False

    @property
    def queue_seconds(self) -> float:
        return (self.scheduled - self.arrived) / PICOSECONDS

    @property
    def prefill_seconds(self) -> float:
        return (self.first_token - self.scheduled) / PICOSECONDS

    @property
    def ttft_seconds(self) -> float:
        return (self.first_token - self.arrived) / PICOSECONDS

    @property
    def decode_seconds(self) -> float:
        return (self.last_token - self.first_token) / PICOSECONDS

    @property
    def mean_itl_seconds(self) -> float:
        """Mean time between tokens; 0 for a single token."""
        return self.decode_seconds / max(1, self.output_tokens - 1)

    @property
    def e2e_seconds(self) -> float:
        return (self.finished - self.arrived) / PICOSECONDS


class Engine:
    def __init__(self, params: EngineParams, *, step_by_step: bool = False) -> None:
        self.params = params
        self.stats = EngineStats(params.max_model_len)
        self.pool = BlockPool(params.num_blocks)
        self._step_by_step = step_by_step
        self._base = round(params.step_seconds * PICOSECONDS)
        self._per_prefill_token = round(params.prefill_token_seconds * PICOSECONDS)
        self._per_prefill_pair = round(params.prefill_pair_seconds * PICOSECONDS)
        self._per_decode = round(params.decode_request_seconds * PICOSECONDS)
        self._per_kv_token = round(params.kv_token_seconds * PICOSECONDS)

        self._waiting: deque[EngineRequest] = deque()
        self._running: dict[EngineRequest, None] = {}  # in order of admission
        self._orders = 0
        self._private_hashes = _PRIVATE_HASHES
        self._decoding = 0  # how many of the running decode, and the sum of their computed tokens
        self._decoding_kv = 0
        self._answer_hashing = 0  # how many of these may publish blocks of their answer
        self._finishes: list[tuple[int, int, EngineRequest]] = []  # (step, order, request); stale ones are skipped
        self._growths: list[tuple[int, int, EngineRequest]] = []  # (step that needs one more block, order, request)
        self._partial: EngineRequest | None = None  # running, its prompt not complete
        self._head_lacks_blocks = False  # the head of the queue does not fit, and nothing was freed or published since

        self._now = 0
        self._step = 0  # steps completed
        # The step under way began at _begun, lasts _duration, and is followed by _steps - 1 more of a run, each
        # longer by _slope. _steps == 0: idle.
        self._steps = 0
        self._begun = 0
        self._duration = 0
        self._slope = 0
        self._chunks: list[tuple[EngineRequest, int]] = []  # prompts in this step, and their tokens
        self._aborts: list[EngineRequest] = []
        self._events: list[Event] = []

    # What a caller sees

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that requests hold, 0 to 1."""
        return 1 - self.pool.free / self.pool.num_blocks

    def generated(self, request: EngineRequest) -> int:
        """Tokens generated for this request by the time of the last `advance`."""
        return request._generated + (self._step - request._joined if request._joined >= 0 else 0)

    def next_step(self) -> float | None:
        """When the step under way ends; None when idle. Tokens come out at these times."""
        return _not_before(self._begun + self._duration) if self._steps else None

    def next_event(self) -> float | None:
        """When `advance` has something to tell at the earliest, unless somebody arrives; None when idle.

        At that time there may still be nothing to tell (a prompt in several chunks).
        """
        return _not_before(self._end()) if self._steps else None

    def submit(self, request: EngineRequest, now: float) -> None:
        """Queue a request. ValueError if it could never be served, or if it was submitted before."""
        if request.arrived >= 0:
            raise ValueError("the request was submitted before")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(
                f"{request.prompt_tokens} prompt and {request.output_tokens} output tokens; both are at least 1"
            )
        tokens = request.prompt_tokens + request.output_tokens
        capacity = self.params.num_blocks * self.params.block_tokens
        if tokens > min(capacity, self.params.max_model_len):
            raise ValueError(
                f"{tokens} tokens of prompt and answer exceed max_model_len ({self.params.max_model_len})"
                f" or the KV cache ({capacity})"
            )
        at = _picoseconds(now)
        self._run_to(at)
        request.arrived = at
        request._target = request.prompt_tokens
        self._waiting.append(request)
        if not self._steps:
            self._begin_step(at)
        elif len(self._waiting) == 1 and len(self._running) < self.params.max_num_seqs:
            self._steps = 1  # it may be admitted at the end of the step under way

    def abort(self, request: EngineRequest, now: float) -> None:
        """Take a request back, at the end of the step under way. Nothing happens if it has finished."""
        self._run_to(_picoseconds(now))
        if request.arrived < 0 or request.finished >= 0:
            return
        self._aborts.append(request)
        self._steps = 1

    def advance(self, now: float) -> list[Event]:
        """Work until `now` (seconds, any epoch, never backwards); what happened since the last call, in order."""
        self._run_to(_picoseconds(now))
        events, self._events = self._events, []
        return events

    # Time

    def _end(self) -> int:
        k = self._steps
        return self._begun + k * self._duration + self._slope * (k * (k - 1) // 2)

    def _run_to(self, now: int) -> None:
        if now < self._now:
            raise ValueError(f"time runs backwards: {now / PICOSECONDS} after {self._now / PICOSECONDS} seconds")
        self._now = now
        while self._steps:
            end = self._end()
            if end > now:
                if self._steps > 1 and self._begun + self._duration <= now:
                    self._pass_steps(self._steps_until(now))
                return
            self._end_step(end)

    def _steps_until(self, now: int) -> int:
        """How many steps of the run end by `now`: the largest k with k * d + slope * k * (k - 1) / 2 <= now - begun."""
        spent, d, slope = now - self._begun, self._duration, self._slope
        if not slope:
            return spent // d
        b = 2 * d - slope
        return (isqrt(b * b + 8 * slope * spent) - b) // (2 * slope)

    def _pass_steps(self, k: int) -> None:
        """The first k steps of a run are over, others follow."""
        self._count_decodes(k)
        self._begun += k * self._duration + self._slope * (k * (k - 1) // 2)
        self._duration += k * self._slope
        self._steps -= k
        self._grow()

    def _count_decodes(self, k: int) -> None:
        n = self._decoding
        self._step += k
        stats = self.stats
        stats.steps += k
        if not self._chunks:
            stats.iteration_tokens.observe(n, k)
        if not n:
            return
        self._decoding_kv += n * k
        stats.generation_tokens += n * k
        if k == 1:
            stats.inter_token_latency.observe(self._duration, n)
        else:
            stats.inter_token_latency.observe_run(self._duration, self._slope, k, n)

    # The start of a step

    def _begin_step(self, now: int) -> None:
        for request in self._aborts:
            self._drop(request, now)
        self._aborts.clear()
        preempted = self._grow(now)
        params = self.params
        budget = params.max_num_batched_tokens - self._decoding
        chunks = self._chunks = []
        partial = self._partial
        if partial is not None:
            count = min(budget, partial._target - partial._computed)
            if self._take_for(partial, partial._computed + count):
                chunks.append((partial, count))
                budget -= count
            else:
                self._preempt(now)
                preempted = True
        if not preempted and not self._head_lacks_blocks:
            while self._waiting and budget and len(self._running) < params.max_num_seqs:
                count = self._admit(self._waiting[0], budget, now)
                if not count:
                    self._head_lacks_blocks = True
                    break
                chunks.append((self._waiting.popleft(), count))
                budget -= count

        n = self._decoding
        if not n and not chunks:
            self._steps = 0
            return
        kv_tokens = self._decoding_kv + n
        duration = self._base + n * self._per_decode
        for request, count in chunks:
            start = request._computed
            duration += count * self._per_prefill_token
            duration += (count * start + count * (count + 1) // 2) * self._per_prefill_pair
            kv_tokens += start + count
        self._begun = now
        self._duration = duration + kv_tokens * self._per_kv_token
        self._slope = n * self._per_kv_token
        self._steps = 1 if chunks or self._step_by_step else self._run_length()

    def _run_length(self) -> int:
        """How many steps from here on, this one included, differ in nothing but the KV tokens they read."""
        full = len(self._running) == self.params.max_num_seqs
        if self._waiting and not (self._head_lacks_blocks or full):
            return 1
        finishes = self._finishes
        while finishes[0][1] != finishes[0][2]._order:
            heapq.heappop(finishes)
        length = finishes[0][0] - self._step
        if length == 1:
            return 1
        block, n, free = self.params.block_tokens, self._decoding, self.pool.free
        if n * ((length - 2) // block + 1) > free:
            # Each request takes one block every `block` steps, and all that are due next are due within `block`
            # steps, so the one that finds no block free can be told from their order.
            due = sorted(step for step, order, request in self._growths if order == request._order)
            rounds, place = divmod(free, n)
            length = min(length, due[place] + rounds * block - 1 - self._step)
        if self._answer_hashing and self._waiting and not full:
            # A block of an answer may be what the head of the queue waits for; it is published with a growth.
            growths = self._growths
            while growths[0][1] != growths[0][2]._order:
                heapq.heappop(growths)
            length = min(length, growths[0][0] - 1 - self._step)
        return length

    def _grow(self, now: int | None = None) -> bool:
        """Give a block to each request that needs one for the next step; True if somebody had to be preempted.

        Without `now` the caller knows that there are enough.
        """
        growths, pool, preempted = self._growths, self.pool, False
        next_step = self._step + 1
        while growths and growths[0][0] <= next_step:
            due, order, request = heapq.heappop(growths)
            if order != request._order:
                continue
            if request._hashes_answer:
                self._publish(request, request._computed + due - 1 - request._joined)
            if now is not None:
                while not pool.free and request._order >= 0:
                    self._preempt(now)
                    preempted = True
                if request._order < 0:
                    continue
            assert request._blocks is not None
            request._blocks += pool.take(1)
            heapq.heappush(growths, (due + self.params.block_tokens, order, request))
        return preempted

    def _take_for(self, request: EngineRequest, tokens: int) -> bool:
        blocks = request._blocks
        assert blocks is not None
        missing = -(-tokens // self.params.block_tokens) - len(blocks)
        if missing > self.pool.free:
            return False
        blocks += self.pool.take(missing)
        if self.params.share_within_step:
            self._publish(request, tokens)
        return True

    def _admit(self, request: EngineRequest, budget: int, now: int) -> int:
        """Let the head of the queue run. The tokens it computes in this step; 0 if its prompt does not fit."""
        target, block, pool = request._target, self.params.block_tokens, self.pool
        blocks = pool.match(request.block_hashes, (target - 1) // block)
        if -(-target // block) - len(blocks) + pool.count_free(blocks) > pool.free:
            return 0
        pool.hold(blocks)
        request._blocks = blocks
        request._published = len(blocks)
        request._computed = cached = len(blocks) * block
        if request.prefilled and not request.preemptions:
            request._computed = target - 1
        request._order = self._orders
        self._orders += 1
        self._running[request] = None
        if request.scheduled < 0:
            request.scheduled = now
        if not request.preemptions:
            request.cached_tokens = request._computed
            self.stats.prefix_queries_tokens += target
            self.stats.prefix_hits_tokens += cached
        count = min(budget, target - request._computed)
        self._take_for(request, request._computed + count)
        return count

    # The end of a step

    def _end_step(self, now: int) -> None:
        n, k, chunks = self._decoding, self._steps, self._chunks
        self._count_decodes(k)
        if k > 1:
            self._step -= 1  # the last step of the run took its blocks when it began
            self._grow()
            self._step += 1
        finishes = self._finishes
        while finishes and finishes[0][0] <= self._step:
            _, order, request = heapq.heappop(finishes)
            if order == request._order:
                self._finish(request, now)
        self._partial = None
        tokens = n
        for request, count in chunks:
            tokens += count
            request._computed += count
            self._publish(request, request._computed)
            if request._computed < request._target:
                self._partial = request
            else:
                tokens += 1
                self._sample_first(request, now)
        if chunks:
            self.stats.iteration_tokens.observe(tokens)
        self._begin_step(now)

    def _sample_first(self, request: EngineRequest, now: int) -> None:
        """The first token after a prefill, or after the recomputation that followed a preemption."""
        stats = self.stats
        stats.generation_tokens += 1
        request._generated += 1
        if request.first_token < 0:
            request.first_token = now
            stats.prompt_tokens += request.prompt_tokens
            stats.prompt_tokens_cached += request.cached_tokens
            stats.time_to_first_token.observe(now - request.arrived)
            self._events.append(Event(EventKind.FIRST_TOKEN, request, now / PICOSECONDS))
        else:
            stats.inter_token_latency.observe(now - request.last_token)
        request.last_token = now
        left = request.output_tokens - request._generated
        if not left:
            self._finish(request, now)
            return
        step, block = self._step, self.params.block_tokens
        request._joined = step
        request._hashes_answer = len(request.block_hashes) > request._published
        self._answer_hashing += request._hashes_answer
        self._decoding += 1
        self._decoding_kv += request._computed
        heapq.heappush(self._finishes, (step + left, request._order, request))
        heapq.heappush(self._growths, (step + 1 + -request._computed % block, request._order, request))

    def _finish(self, request: EngineRequest, now: int) -> None:
        self._stop(request)
        request.finished = request.last_token = now
        stats, output = self.stats, request.output_tokens
        if request.max_tokens is None or output >= request.max_tokens:
            stats.finished_length += 1
        else:
            stats.finished_stop += 1
        decode = now - request.first_token
        stats.request_prompt_tokens.observe(request.prompt_tokens)
        stats.request_generation_tokens.observe(output)
        stats.request_max_tokens.observe(request.max_tokens or output)
        stats.request_computed_tokens.observe(request.prompt_tokens - request.cached_tokens)
        stats.request_preemptions.observe(request.preemptions)
        stats.e2e_latency.observe(now - request.arrived)
        stats.queue_time.observe(request.scheduled - request.arrived)
        stats.prefill_time.observe(request.first_token - request.scheduled)
        stats.inference_time.observe(now - request.scheduled)
        stats.decode_time.observe(decode)
        stats.time_per_output_token.observe(decode // (output - 1) if output > 1 else 0)
        self._events.append(Event(EventKind.FINISHED, request, now / PICOSECONDS))

    # Leaving

    def _stop(self, request: EngineRequest) -> None:
        """Take a request out of the running; its blocks stay in the cache until they are needed."""
        if request._joined >= 0:
            steps = self._step - request._joined
            request._computed += steps
            request._generated += steps
            request._joined = -1
            self._decoding -= 1
            self._decoding_kv -= request._computed
            self._answer_hashing -= request._hashes_answer
        self._publish(request, request._computed)
        del self._running[request]
        if request is self._partial:
            self._partial = None
        assert request._blocks is not None
        self.pool.release(request._blocks)
        request._blocks = None
        request._order = -1
        self._head_lacks_blocks = False

    def _preempt(self, now: int) -> None:
        """Send the request that began last back to the head of the queue."""
        request = next(reversed(self._running))
        decoding = request._joined >= 0
        if decoding:
            # Blocks of the answer without a name get one of their own, so that this request finds them again.
            full = (request._computed + self._step - request._joined) // self.params.block_tokens
            hashes = list(request.block_hashes)
            while len(hashes) < full:
                hashes.append(self._private_hashes)
                self._private_hashes += 1
            request.block_hashes = hashes
        self._stop(request)
        if decoding:
            request.last_token = now
        request._target = request.prompt_tokens + request._generated
        request._computed = 0
        request.preemptions += 1
        self.stats.preemptions += 1
        self._waiting.appendleft(request)
        self._events.append(Event(EventKind.PREEMPTED, request, now / PICOSECONDS))

    def _drop(self, request: EngineRequest, now: int) -> None:
        if request.finished >= 0:
            return
        if request._order >= 0:
            self._stop(request)
        else:
            self._waiting.remove(request)
            self._head_lacks_blocks = False
        request.finished = now
        self.stats.aborted += 1

    def _publish(self, request: EngineRequest, computed: int) -> None:
        """Make the blocks matchable that are full with `computed` tokens computed."""
        hashes, blocks = request.block_hashes, request._blocks
        assert blocks is not None
        first = request._published
        last = min(computed // self.params.block_tokens, len(hashes))
        publish = self.pool.publish
        for i in range(first, last):
            if publish(blocks[i], hashes[i]):
                self._head_lacks_blocks = False
        if last > first:
            request._published = last


def _picoseconds(now: float) -> int:
    """The last whole picosecond that is not after `now`."""
    numerator, denominator = now.as_integer_ratio()
    return numerator * PICOSECONDS // denominator


def _not_before(picoseconds: int) -> float:
    """The first float that `_picoseconds` does not put before `picoseconds`."""
    now = picoseconds / PICOSECONDS
    return now if _picoseconds(now) >= picoseconds else nextafter(now, inf)
