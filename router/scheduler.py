"""From a parsed request to a pod: candidates, strategy, charge, count.

Selecting and charging are one step: nothing is awaited between reading the load and adding to it, so of a hundred
simultaneous requests each sees those before it. (Two workers that decide within the same few microseconds may still
pick the same pod; what each adds is visible to the other at its next decision.)
"""

from collections.abc import Callable
from typing import Any

from router.errors import bad_strategy, no_pods, unknown_model
from router.fleet import Fleet, Pod
from router.replies import MOST_TOKENS, Destination, RoutedReplies
from router.request import RoutingRequest
from router.strategies import STRATEGIES, Context, Strategy
from state.ledger import Charge
from state.series import Histogram
from state.tables import Tables


class Decision:
    """Where a request goes. Release it exactly once: with `Scheduler.release`, or by handing it to the access log."""

    __slots__ = ("charge", "held", "model", "pod", "replies", "strategy", "tokens")

    def __init__(self, pod: Pod, model: str, strategy: str, charge: Charge, held: bool, replies: RoutedReplies) -> None:
        self.pod = pod
        self.model = model
        self.strategy = strategy
        self.charge = charge
        self.held = held
        self.tokens = charge.tokens
        self.replies = replies


class Scheduler:
    """One process's decisions. `clock` gives monotonic seconds."""

    def __init__(
        self,
        tables: Tables,
        default_strategy: str,
        clock: Callable[[], float],
        *,
        seed: int | None = None,
        **parts: Any,
    ) -> None:
        self.tables = tables
        self.fleet = Fleet(tables)
        self.default_strategy = default_strategy
        self.clock = clock
        self.series = tables.series()
        self._ledger = tables.ledger
        self._context = Context(seed, **parts)
        self._strategies: dict[str, Strategy] = {}
        self._latency = Histogram(self.series, "decision_seconds")
        self._decision_cells: dict[tuple[str, int, int, str], int] = {}
        self._replies: dict[tuple[int, int, str, Destination, bool, bool], RoutedReplies] = {}
        self._catalog_version = -1

    def strategy(self, name: str) -> Strategy:
        """The strategy of that name. Raises RequestError 400 when there is none."""
        found = self._strategies.get(name)
        if found is None:
            kind = STRATEGIES.get(name)
            if kind is None:
                raise bad_strategy(name)
            found = self._strategies[name] = kind(self._context)
        return found

    def decide(
        self, request: RoutingRequest, strategy_name: str, *, destination: Destination, held: bool, duplex: bool
    ) -> Decision:
        """Choose a pod and charge it. Raises RequestError when the model is unknown or nobody can serve it."""
        started = self.clock()
        candidates = self.fleet.candidates(request.model)
        if self._catalog_version != self.fleet.version:
            # Pods came, went or changed their names: forget what was made for them.
            self._catalog_version = self.fleet.version
            self._replies.clear()
            self._decision_cells.clear()
        if candidates is None:
            raise unknown_model(request.model)
        strategy = self.strategy(strategy_name)
        if not candidates.pods:
            raise no_pods(request.model)
        index = strategy.pick(request, candidates, started)
        if strategy.fallbacks:
            self.series.add(strategy.fallbacks, "fallbacks", strategy_name)
            strategy.fallbacks = 0
        strategy.chosen(request, candidates, index, started)
        pod = candidates.pods[index]
        # What is charged is what the ticket can say, or the access log would not give all of it back.
        tokens = min(request.prompt_tokens, MOST_TOKENS)
        uncached = min(request.uncached_tokens, tokens) if request.uncached_tokens >= 0 else tokens
        charge = self._ledger.charge(pod.slot, tokens, uncached, held=held)
        replies = self._routed_replies(pod, strategy_name, destination, not held, duplex)
        self._count(request.model, pod, strategy_name)
        self._latency.observe(self.clock() - started)
        return Decision(pod, request.model, strategy_name, charge, held, replies)

    def release(self, decision: Decision) -> None:
        """The request is over. Only for held charges: the others are released by the access log."""
        if decision.held:
            self._ledger.release(decision.charge, held=True)

    def outcome(self, charge: Charge, *, ok: bool) -> None:
        """How a request ended, for passive health."""
        self._ledger.outcome(charge, ok=ok)

    def _count(self, model: str, pod: Pod, strategy: str) -> None:
        key = (model, pod.slot, pod.generation, strategy)
        cell = self._decision_cells.get(key)
        if cell is None:
            cell = self._decision_cells[key] = self.series.cell("decisions", model, pod.name, strategy)
        self.series.values[cell] += 1.0

    def _routed_replies(
        self, pod: Pod, strategy: str, destination: Destination, to_log: bool, duplex: bool
    ) -> RoutedReplies:
        key = (pod.slot, pod.generation, strategy, destination, to_log, duplex)
        found = self._replies.get(key)
        if found is None:
            found = self._replies[key] = RoutedReplies(
                name=pod.name,
                address=pod.address,
                strategy=strategy,
                destination=destination,
                ticket=f"{pod.slot}.{pod.generation}" if to_log else None,
                duplex=duplex,
            )
        return found
