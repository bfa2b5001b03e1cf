"""What an engine has counted since it started: the counters and histograms that vLLM publishes.

Times are whole picoseconds, as in `bench.engine`, so that adding them in runs or one by one gives the same sums.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

PICOSECONDS = 10**12


def _seconds(*edges: float) -> tuple[int, ...]:
    return tuple(round(edge * PICOSECONDS) for edge in edges)


# Bucket edges of vLLM 0.32, as it publishes them.
# fmt: off
TTFT_EDGES = _seconds(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
                      80, 160, 640, 2560)
TOKEN_TIME_EDGES = _seconds(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
                            40, 80)
REQUEST_TIME_EDGES = _seconds(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
                              7680)
ITERATION_EDGES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREEMPTION_EDGES = (1, 2, 3, 4, 5, 10, 20)
# fmt: on


def token_edges(max_model_len: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to the longest context, as vLLM draws them."""
    edges: list[int] = []
    decade = 1
    while True:
        for step in (1, 2, 5):
            if step * decade > max_model_len:
                return tuple(edges)
            edges.append(step * decade)
        decade *= 10


class Histogram:
    """A Prometheus histogram of whole numbers. `counts` has one entry per edge and one for what lies above."""

    __slots__ = ("counts", "edges", "total")

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(edges) + 1)
        self.total = 0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: int, times: int = 1) -> None:
        self.counts[bisect_left(self.edges, value)] += times
        self.total += value * times

    def observe_run(self, first: int, slope: int, length: int, times: int) -> None:
        """As `observe(first + slope * j, times)` for j in range(length), with slope >= 0."""
        edges, counts = self.edges, self.counts
        bucket = bisect_left(edges, first)
        last = bisect_left(edges, first + slope * (length - 1), bucket)
        below = 0
        for i in range(bucket, last):
            within = (edges[i] - first) // slope + 1
            counts[i] += (within - below) * times
            below = within
        counts[last] += (length - below) * times
        self.total += (first * length + slope * (length * (length - 1) // 2)) * times

    def cumulative(self) -> list[int]:
        return list(accumulate(self.counts))


class EngineStats:
    """Totals since the engine was made. Times in picoseconds."""

    def __init__(self, max_model_len: int) -> None:
        tokens = token_edges(max_model_len)
        self.steps = 0
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.generation_tokens = 0
        self.preemptions = 0
        self.finished_stop = 0
        self.finished_length = 0
        self.aborted = 0
        self.request_prompt_tokens = Histogram(tokens)
        self.request_generation_tokens = Histogram(tokens)
        self.request_max_tokens = Histogram(tokens)
        self.request_computed_tokens = Histogram(tokens)
        self.iteration_tokens = Histogram(ITERATION_EDGES)
        self.request_preemptions = Histogram(PREEMPTION_EDGES)
        self.time_to_first_token = Histogram(TTFT_EDGES)
        self.inter_token_latency = Histogram(TOKEN_TIME_EDGES)
        self.time_per_output_token = Histogram(TOKEN_TIME_EDGES)
        self.e2e_latency = Histogram(REQUEST_TIME_EDGES)
        self.queue_time = Histogram(REQUEST_TIME_EDGES)
        self.inference_time = Histogram(REQUEST_TIME_EDGES)
        self.prefill_time = Histogram(REQUEST_TIME_EDGES)
        self.decode_time = Histogram(REQUEST_TIME_EDGES)
