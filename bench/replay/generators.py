"""Loads made up rather than recorded, by name.

Sessions arrive by a Poisson process; within a session the next request comes when the answer to the last one is
complete and somebody (or some tool) has thought. So a slow fleet slows its sessions down, as it does in life. Rates
are requests per second, all pods together; for sessions they are what comes about where answers take no time.
"""

import random
from bisect import bisect
from collections.abc import Callable
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
    "burst-identical": (burst_identical, BURST),
    "burst-distinct": (burst_distinct, BURST),
}
"""By name: the generator and how many requests it makes if not told."""


def generate(name: str, seed: int, requests: int = 0, rate: float = 0.0) -> list[TraceRequest]:
    """`requests` and `rate` 0: the generator's own. The same seed gives the same load."""
    generator, usual = GENERATORS[name]
    return generator(requests or usual, rate, random.Random(f"{name} {seed}"))
