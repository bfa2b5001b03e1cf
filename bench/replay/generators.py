"""Loads made up rather than recorded, by name.

Sessions arrive by a Poisson process; within a session the next request comes when the answer to the last one is
complete and somebody (or some tool) has thought. So a slow fleet slows its sessions down, as it does in life. Rates
are requests per second, all pods together; for sessions they are what comes about where answers take no time.
"""

import heapq
import random
from bisect import bisect
from collections.abc import Callable, Iterator
from itertools import accumulate

from bench.replay.traces import TraceRequest

GROUPS, PROMPTS_PER_GROUP = 150, 5
SHARED_TOKENS, OWN_TOKENS, ANSWER_TOKENS = 6000, 1200, 1000
LADDER = tuple(range(3, 61, 3))
"""Requests per second of the steps, which last equally long."""
SYSTEM_PROMPTS = (400, 900, 1500, 2400)
"""Tokens of the four applications' system prompts."""
TURNS_MEAN, TURNS_MOST = 6, 24
THINK_SECONDS = 15.0
ROOTS = (4000, 6500, 9000)
"""Tokens of the three agents' instructions and tool descriptions."""
STEPS_LEAST, STEPS_MOST = 8, 40
TOOL_SECONDS = 2.0
HOT_SECONDS, HOT_SHARE, HOT_TOKENS, OLD_PROMPTS = 30.0, 0.6, 12_000, 40
LONGEST = 100_000
BURST = 100


class _Ids:
    """Numbers for pieces."""

    def __init__(self) -> None:
        self.last = 0

    def __call__(self) -> int:
        self.last += 1
        return self.last


def _length(rng: random.Random, median: float, sigma: float, least: int = 8, most: int = 30_000) -> int:
    return min(max(round(rng.lognormvariate(0.0, sigma) * median), least), most)


def shared_prefix(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """150 groups of 5 prompts: 6000 tokens that the group shares and 1200 of its own, 1000 tokens of answer. All
    prompts in random order, over and over; Poisson arrivals, at `rate` or up the ladder 3, 6, ... 60 per second."""
    new = _Ids()
    prompts = [(group, new()) for group in (new() for _ in range(GROUPS)) for _ in range(PROMPTS_PER_GROUP)]
    step_seconds = requests / sum(LADDER)
    ends = list(accumulate(step_seconds for _ in LADDER))
    out: list[TraceRequest] = []
    at = 0.0
    while len(out) < requests:
        rng.shuffle(prompts)
        for group, own in prompts[: requests - len(out)]:
            at += rng.expovariate(rate or LADDER[min(bisect(ends, at), len(LADDER) - 1)])
            tokens = [SHARED_TOKENS, OWN_TOKENS]
            out.append(TraceRequest(at, SHARED_TOKENS + OWN_TOKENS, ANSWER_TOKENS, [group, own], tokens))
    return out


def multi_turn(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """Chats: one of four system prompts, 6 turns in the mean (geometric, at most 24); the first message has 800 tokens
    in the median with a long tail (documents), the others 120, answers 300; 15 s of thought. Answers are part of the
    next prompt."""
    rate = rate or 40.0

    def turns(new: _Ids) -> list[tuple[int, int]]:
        count = 1
        while count < TURNS_MOST and rng.random() > 1 / TURNS_MEAN:
            count += 1
        first = _length(rng, 800, 1.4)
        return [(_length(rng, 120, 1.0) if i else first, _length(rng, 300, 0.7, 1, 2000)) for i in range(count)]

    return _sessions(requests, rate / TURNS_MEAN, rng, SYSTEM_PROMPTS, turns, THINK_SECONDS)


def agents(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """Agents with tools: one of three long roots, a task of 800 tokens, then 8 to 40 calls, each answered by 600
    tokens of tool output in the median (long tail); 90 tokens of answer, 2 s for the tool. Deep chains."""
    rate = rate or 30.0

    def turns(new: _Ids) -> list[tuple[int, int]]:
        count = rng.randint(STEPS_LEAST, STEPS_MOST)
        first = _length(rng, 800, 0.8)
        return [(_length(rng, 600, 1.1) if i else first, _length(rng, 90, 0.8, 1, 1500)) for i in range(count)]

    return _sessions(requests, rate / ((STEPS_LEAST + STEPS_MOST) / 2), rng, ROOTS, turns, TOOL_SECONDS)


def _sessions(
    requests: int,
    rate: float,
    rng: random.Random,
    roots: tuple[int, ...],
    turns: Callable[[_Ids], list[tuple[int, int]]],
    pause_seconds: float,
) -> list[TraceRequest]:
    new = _Ids()
    root_ids = [new() for _ in roots]
    out: list[TraceRequest] = []
    at = 0.0
    session = 0
    while len(out) < requests:
        at += rng.expovariate(rate)
        session += 1
        root = rng.randrange(len(roots))
        ids, lengths = [root_ids[root]], [roots[root]]
        after = -1
        for asked, answered in turns(new):
            prompt = sum(lengths) + asked
            if prompt + answered > LONGEST or len(out) == requests:
                break
            # One piece for the message and one for the answer, which is a part of the next prompt.
            ids = [*ids, new(), new()]
            lengths = [*lengths, asked, answered]
            when = at if after < 0 else rng.expovariate(1 / pause_seconds)
            out.append(TraceRequest(when, prompt, answered, ids, lengths, after=after, session=f"s{session}"))
            after = len(out) - 1
    return out


def no_prefix(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """Prompts with nothing in common: 1200 tokens in the median (long tail), 200 tokens of answer, Poisson."""
    rate = rate or 35.0
    new = _Ids()
    out: list[TraceRequest] = []
    at = 0.0
    for _ in range(requests):
        at += rng.expovariate(rate)
        prompt = _length(rng, 1200, 1.1)
        out.append(TraceRequest(at, prompt, _length(rng, 200, 0.9, 1, 4000), [new()], [prompt]))
    return out


def hot_shift(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """Every 30 s another system prompt of 12,000 tokens comes up, which 60 % of all requests begin with until the next
    one does; the others begin with one of 40 that stay. 400 tokens of their own, 150 of answer (medians); Poisson."""
    rate = rate or 20.0
    new = _Ids()
    old = [new() for _ in range(OLD_PROMPTS)]
    hot: list[int] = []
    out: list[TraceRequest] = []
    at = 0.0
    for _ in range(requests):
        at += rng.expovariate(rate)
        while len(hot) <= at // HOT_SECONDS:
            hot.append(new())
        root = hot[-1] if rng.random() < HOT_SHARE else rng.choice(old)
        own, answer = _length(rng, 400, 0.8), _length(rng, 150, 0.7, 1, 2000)
        out.append(TraceRequest(at, HOT_TOKENS + own, answer, [root, new()], [HOT_TOKENS, own]))
    return out


def tools(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """40 sets of instructions and tool descriptions (3,600 tokens, median), asked for by Zipf's law; 1,700 tokens of
    each request's own, 130 of answer. 45 % have one to three steps more, some 20 s later whether or not the answer is
    there; Poisson."""
    rate = rate or 14.0
    new, begin = _Ids(), _beginnings(40, 1.1)
    roots = [(new(), _length(rng, 3600, 0.5, 1000, 15_000)) for _ in range(40)]
    waiting: list[tuple[float, int, list[int], list[int], int]] = []
    out: list[TraceRequest] = []
    fresh = rng.expovariate(rate)
    while len(out) < requests:
        if waiting and waiting[0][0] <= fresh:
            at, _, pieces, tokens, left = heapq.heappop(waiting)
        else:
            root, length = roots[begin(rng)]
            at, pieces, tokens, left = fresh, [root], [length], 0 if rng.random() < 0.55 else rng.randint(1, 3)
            fresh += rng.expovariate(rate)
        own, answer = _length(rng, 1700, 0.9), _length(rng, 130, 0.8, 1, 2000)
        pieces, tokens = [*pieces, new(), new()], [*tokens, own, answer]
        out.append(TraceRequest(at, sum(tokens) - answer, answer, pieces, tokens))
        if left:
            heapq.heappush(waiting, (at + 2.0 + rng.expovariate(1 / 20.0), new(), pieces, tokens, left - 1))
    return out


def documents(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """400 documents of 29,500 tokens, asked about by Zipf's law: 500 tokens of question, 50 of answer (medians);
    Poisson."""
    return _beginning_alike(requests, _poisson(rate or 7.0, rng), rng, 400, 29_500, (500, 0.5), (50, 0.4))


def short_answers(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """Ten instructions of 1,500 tokens, by Zipf's law, 400 tokens of text, five of answer (medians); Poisson."""
    return _beginning_alike(requests, _poisson(rate or 120.0, rng), rng, 10, 1500, (400, 0.6), (5, 0.3))


def bursts(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """100 beginnings of 3,000 tokens, by Zipf's law, 500 tokens of each request's own, 250 of answer (medians). The
    times between arrivals are gamma-distributed, their standard deviation three times their mean."""
    return _beginning_alike(requests, _gamma(rate or 35.0, 3.0, rng), rng, 100, 3000, (500, 0.8), (250, 0.7))


def _poisson(rate: float, rng: random.Random) -> Iterator[float]:
    return accumulate(iter(lambda: rng.expovariate(rate), None))


def _gamma(rate: float, variation: float, rng: random.Random) -> Iterator[float]:
    shape = variation**-2
    return accumulate(iter(lambda: rng.gammavariate(shape, 1 / (shape * rate)), None))


def _beginnings(count: int, exponent: float) -> Callable[[random.Random], int]:
    """Draws one of so many, the k-th 1 / k^exponent times as often as the first."""
    ends = list(accumulate((place + 1) ** -exponent for place in range(count)))
    return lambda rng: bisect(ends, rng.random() * ends[-1])


def _beginning_alike(
    requests: int,
    arrivals: Iterator[float],
    rng: random.Random,
    count: int,
    shared: int,
    own: tuple[float, float],
    answer: tuple[float, float],
) -> list[TraceRequest]:
    """Prompts that begin with one of `count` pieces of `shared` tokens, by Zipf's law; `own` and `answer`: median and
    sigma of their tokens."""
    new, begin = _Ids(), _beginnings(count, 1.0)
    roots = [new() for _ in range(count)]
    out: list[TraceRequest] = []
    for _ in range(requests):
        tokens = [shared, _length(rng, *own)]
        pieces = [roots[begin(rng)], new()]
        out.append(TraceRequest(next(arrivals), sum(tokens), _length(rng, *answer, 1, 12_000), pieces, tokens))
    return out


def burst_identical(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """The same prompt of 4000 tokens at the same instant, 100 times unless told otherwise; 200 tokens of answer."""
    return [TraceRequest(5.0, 4000, 200, [1], [4000]) for _ in range(requests)]


def burst_distinct(requests: int, rate: float, rng: random.Random) -> list[TraceRequest]:
    """As `burst-identical`, but each prompt another one."""
    return [TraceRequest(5.0, 4000, 200, [i + 1], [4000]) for i in range(requests)]


Generator = Callable[[int, float, random.Random], list[TraceRequest]]
GENERATORS: dict[str, tuple[Generator, int]] = {
    "shared-prefix": (shared_prefix, 6300),
    "multi-turn": (multi_turn, 12_000),
    "agents": (agents, 8000),
    "no-prefix": (no_prefix, 6000),
    "hot-shift": (hot_shift, 6000),
    "tools": (tools, 4000),
    "documents": (documents, 2500),
    "short-answers": (short_answers, 8000),
    "bursts": (bursts, 4000),
    "burst-identical": (burst_identical, BURST),
    "burst-distinct": (burst_distinct, BURST),
}
"""By name: the generator and how many requests it makes if not told."""


def generate(name: str, seed: int, requests: int = 0, rate: float = 0.0) -> list[TraceRequest]:
    """`requests` and `rate` 0: the generator's own. The same seed gives the same load."""
    generator, usual = GENERATORS[name]
    return generator(requests or usual, rate, random.Random(f"{name} {seed}"))
