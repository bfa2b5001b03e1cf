"""The strategies by name. One file each; this one only lists them."""

from router.strategies.base import Context, Scoring, Strategy
from router.strategies.least_busy_time import LeastBusyTime
from router.strategies.least_kv_cache import LeastGpuCache, LeastKvCache
from router.strategies.least_latency import LeastLatency
from router.strategies.least_request import LeastRequest
from router.strategies.least_utilization import LeastUtilization
from router.strategies.marginal_delay import MarginalDelay
from router.strategies.power_of_two import PowerOfTwo
from router.strategies.random_choice import Random
from router.strategies.round_robin import RoundRobin
from router.strategies.throughput import Throughput

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        Random,
        RoundRobin,
        LeastRequest,
        PowerOfTwo,
        Throughput,
        LeastBusyTime,
        LeastKvCache,
        LeastGpuCache,
        LeastLatency,
        LeastUtilization,
        MarginalDelay,
    )
}

__all__ = ["STRATEGIES", "Context", "Scoring", "Strategy"]
