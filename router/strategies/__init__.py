"""The strategies by name. One file each; this one only lists them."""

import ast
import sys
from pathlib import Path

from router.strategies.aibrix_prefix_cache import AibrixPrefixCache
from router.strategies.base import Context, Scoring, Strategy
from router.strategies.consistent_hash_bounded import ConsistentHashBounded
from router.strategies.dynamo_kv import DynamoKv
from router.strategies.least_busy_time import LeastBusyTime
from router.strategies.least_kv_cache import LeastGpuCache, LeastKvCache
from router.strategies.least_latency import LeastLatency
from router.strategies.least_request import LeastRequest
from router.strategies.least_utilization import LeastUtilization
from router.strategies.llm_d_default import LlmDDefault
from router.strategies.lmetric import LMetric
from router.strategies.marginal_delay import MarginalDelay
from router.strategies.pd import Pd
from router.strategies.power_of_two import PowerOfTwo
from router.strategies.preble import Preble, PrefixCachePreble
from router.strategies.prefix_cache import PrefixCache
from router.strategies.random_choice import Random
from router.strategies.round_robin import RoundRobin
from router.strategies.session_affinity import SessionAffinity
from router.strategies.sglang_cache_aware import SglangCacheAware
from router.strategies.slo import Slo, SloLeastLoad, SloLeastLoadPulling, SloPackLoad
from router.strategies.throughput import Throughput
from router.strategies.vtc_basic import VtcBasic

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
        PrefixCache,
        PrefixCachePreble,
        VtcBasic,
        SessionAffinity,
        AibrixPrefixCache,
        ConsistentHashBounded,
        DynamoKv,
        LlmDDefault,
        LMetric,
        Preble,
        Pd,
        SglangCacheAware,
        Slo,
        SloPackLoad,
        SloLeastLoad,
        SloLeastLoadPulling,
    )
}


def formula(strategy: type[Strategy]) -> str:
    """The docstring of a strategy, from its source: a compiled class has none."""
    source = Path(sys.modules[strategy.__module__].__file__ or "")
    tree = ast.parse(source.with_name(source.name.partition(".")[0] + ".py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == strategy.__name__:
            return ast.get_docstring(node) or ""
    return ""


__all__ = ["STRATEGIES", "Context", "Scoring", "Strategy", "formula"]
