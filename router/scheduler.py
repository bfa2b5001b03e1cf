"""From a parsed request to a pod: candidates, strategy, charge, count.

Selecting and charging are one step: nothing is awaited between reading the load and adding to it, so of a hundred
simultaneous requests of a worker each sees those before it. What other workers have added is seen a millisecond later
at most; `marginal-delay` hears of it at its next decision, through the prefix log.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

from router.bodies.base import Body
from router.errors import header_value, model_asleep, no_pods, not_selected, unknown_model
from router.fleet import Candidates, Fleet, Pod
from router.handover import Handover, Prefills
from router.receipts import Receipt
from router.replies import MAX_TOKENS, Destination, RoutedReplies, endpoints_in_order
from router.request import RoutingRequest
from router.rules import Rules, awake, filtered, rules_of
from router.strategies import STRATEGIES, Context, Strategy
from router.strategies.marginal_delay import MODES, MarginalDelay
from router.strategies.pd import Legs, Pd
from router.strategies.weighted import Strategies
from state.ledger import Charge
from state.series import Histogram
from state.tables import Tables

_MAX_REPLIES: Final = 8192
"""Templates kept; clients can ask for many combinations of strategies."""


class Decision:
    """Where a request goes. Release it exactly once: with `Scheduler.release`, or by handing it to the access log."""

    __slots__ = (
        "charge",
        "endpoints",
        "held",
        "legs",
        "model",
        "pod",
        "receipt",
        "replies",
        "strategy",
        "tokens",
        "tried",
    )

    def __init__(self, pod: Pod, model: str, strategy: str, charge: Charge, held: bool, replies: RoutedReplies) -> None:
        self.pod = pod
        self.model = model
        self.strategy = strategy
        self.charge = charge
        self.held = held
        self.tokens = charge.tokens
        self.replies = replies
        self.endpoints = b""
        """To be added to the reply: the pods for Envoy's retries, where it takes them from a list."""
        self.tried: tuple[str, ...] = ()
        """Their addresses, the pod's own first."""
        self.receipt: Receipt | None = None
        self.legs: Legs | None = None
        """While the prompt is prefilled on another pod."""


class Scheduler:
    """One process's decisions. `clock` gives monotonic seconds; `default_strategy` may be empty, for requests that
    Envoy shall balance by itself unless they name a strategy."""

    def __init__(
        self,
        tables: Tables,
        default_strategy: str,
        clock: Callable[[], float],
        context: Context,
        *,
        retry_candidates: int = 2,
    ) -> None:
        self.tables = tables
        self.fleet = Fleet(tables)
        self.default_strategy = default_strategy
        self.clock = clock
        self.series = tables.series()
        self._ledger = tables.ledger
        self._retry_candidates = retry_candidates
        self._strategies = Strategies(STRATEGIES, context)
        self.wake: Callable[[Pod, str], None] | None = None
        """Asks a pod to wake a model; does not wait."""
        self.prefills: Prefills | None = None
        """Sends what pods shall only prefill; without it `pd` has no pods."""
        self.passes_on = False
        """Whether somebody brings log entries on other replicas' requests to them."""
        self._recent: dict[str, Strategy] = {}
        """By model, the strategy that decided last among all of its pods, since the last `catch_up`."""
        self._latency = Histogram(self.series, "decision_seconds")
        self._decision_cells: dict[tuple[str, int, int, str], int] = {}
        self._replies: dict[tuple[int, int, str, Destination, bool, bool, int], RoutedReplies] = {}
        self._endpoints: dict[tuple[bool, tuple[int, ...]], bytes] = {}
        self._rules: dict[str, Rules | None] = {}
        self._catalog_version = -1

    def strategy(self, value: str) -> Strategy:
        """The strategy, or the combination of several, for a `routing-strategy`. Raises RequestError 400."""
        return self._strategies.get(value)

    def serving(self, model: str) -> tuple[Candidates, Rules | None]:
        """The pods that can take a request of this model now, at least one, and the model's rules if it has any.
        Raises RequestError when the model is unknown, asleep, or nobody can serve it."""
        candidates = self.fleet.candidates(model)
        if self._catalog_version != self.fleet.version:
            # Pods came, went or changed their names: forget what was made for them.
            self._catalog_version = self.fleet.version
            self._replies.clear()
            self._endpoints.clear()
            self._decision_cells.clear()
            self._rules.clear()
            self.series.reclaim(self.fleet.pod_names())
        if candidates is None:
            raise unknown_model(model)
        if model in self._rules:
            rules = self._rules[model]
        else:
            rules = self._rules[model] = rules_of(self.fleet.models[model], self.fleet)
        if rules is not None:
            if rules.asleep:
                if rules.sleeper is not None and self.wake is not None:
                    self.wake(rules.sleeper, model)
                raise model_asleep(model, rules.asleep)
            candidates = awake(candidates, rules)
        if not candidates.pods:
            raise no_pods(model)
        return candidates, rules

    @staticmethod
    def select(candidates: Candidates, selector: str) -> Candidates:
        """The candidates whose labels fit. Raises RequestError 503 when there are none, or it is no selector."""
        found = filtered(candidates, selector)
        if found is None or not found.pods:
            raise not_selected()
        return found

    def decide(
        self,
        request: RoutingRequest,
        strategy_name: str,
        candidates: Candidates | None = None,
        *,
        destination: Destination,
        held: bool,
        duplex: bool,
        started: float | None = None,
        explain: bool = False,
        id_bytes: int = 36,
    ) -> Decision:
        """Choose a pod and charge it. `candidates` are those of `serving`, or fewer; `held` says that the charge is
        held until `release`, and not left to the access log; `id_bytes` is the length of the request's id, 36 or 32.
        Raises RequestError."""
        if started is None:
            started = self.clock()
        if candidates is None:
            candidates, _ = self.serving(request.model)
        strategy = self._strategies.get(strategy_name)
        if candidates.whole:
            self._recent[request.model] = strategy
        index = strategy.pick(request, candidates, started)
        label = strategy.name
        if strategy.fallbacks:
            self.series.add(strategy.fallbacks, "fallbacks", label)
            strategy.fallbacks = 0
        retries = destination is Destination.OVERRIDE_HOST and self._retry_candidates > 0
        order: tuple[int, ...] = ()
        if retries and len(candidates) > 1:
            order = (index, *strategy.next_best(request, candidates, index, self._retry_candidates, started))
        receipt = Receipt(strategy_name, strategy, request, candidates, index, started) if explain else None
        strategy.chosen(request, candidates, index, started)
        pod = candidates.pods[index]
        # What is charged is what the ticket can say, or the access log would not give all of it back.
        tokens = min(request.prompt_tokens, MAX_TOKENS)
        uncached = min(request.uncached_tokens, tokens) if request.uncached_tokens >= 0 else tokens
        charge = self._ledger.charge(pod.slot, tokens, uncached, held=held)
        replies = self._routed_replies(pod, strategy_name, destination, held, duplex, id_bytes)
        self._count(request.model, pod, label)
        self._latency.observe(self.clock() - started)
        decision = Decision(pod, request.model, strategy_name, charge, held, replies)
        if order:
            decision.endpoints = self._in_order(candidates, order, duplex)
            decision.tried = tuple([candidates.pods[place].address for place in order])
        decision.receipt = receipt
        return decision

    def catch_up(self) -> None:
        """Between requests: take in what the last polls say, and let the strategies that have decided since the last
        call work out what the next decision needs of it, lest that takes the time. Where nobody asks nothing is done:
        the next request then takes it in itself."""
        recent, fleet = self._recent, self.fleet
        fleet.ahead = bool(recent)
        if recent:
            self._recent = {}
            if fleet.catch_up():
                for model, strategy in recent.items():
                    candidates = fleet.candidates(model)
                    if candidates is not None and candidates.pods:
                        strategy.prepare(candidates, self.clock())

    def explain(self, request: RoutingRequest, strategy_name: str, candidates: Candidates) -> Receipt:
        """The decision that would be made, without making it."""
        now = self.clock()
        strategy = self._strategies.get(strategy_name)
        index = strategy.pick(request, candidates, now)
        strategy.fallbacks = 0
        return Receipt(strategy_name, strategy, request, candidates, index, now)

    def _in_order(self, candidates: Candidates, order: tuple[int, ...], duplex: bool) -> bytes:
        pods = [candidates.pods[index] for index in order]
        key = (duplex, tuple([pod.slot for pod in pods]))
        found = self._endpoints.get(key)
        if found is None:
            if len(self._endpoints) >= _MAX_REPLIES:
                self._endpoints.clear()
            found = endpoints_in_order(",".join(pod.address for pod in pods), duplex=duplex)
            self._endpoints[key] = found
        return found

    def response_of(self, decision: Decision, pod: Pod, id_bytes: int) -> RoutedReplies:
        """The replies to a response of another pod than the one decided on."""
        return self._routed_replies(pod, decision.strategy, Destination.OVERRIDE_HOST, decision.held, False, id_bytes)

    def release(self, decision: Decision) -> None:
        """The request is over. Only for held charges: the others are released by the access log."""
        if decision.held:
            self._ledger.release(decision.charge, held=True)
            if decision.legs is not None:
                decision.legs.release()

    def hold_for(self, decision: Decision, legs: Legs) -> None:
        """While its prompt is prefilled a request is held, whoever will tell of its end."""
        decision.legs = legs
        if not decision.held:
            decision.held = True
            self._ledger.take_hold(decision.charge)

    def hand_over(
        self, decision: Decision, legs: Legs, parsed: Body, body: bytes, path: str, headers: Mapping[str, str]
    ) -> Awaitable[bytes | None]:
        """Have the prompt prefilled: the body for the decode pod, None for the client's own. `path` and `headers` are
        for the prefill pod. Raises RequestError, at once or later."""
        strategy = self._strategies.get(decision.strategy)
        if self.prefills is None or not isinstance(strategy, Pd):
            raise not_selected()
        return Handover(
            self.prefills,
            strategy,
            legs,
            decision.pod,
            series=self.series,
            clock=self.clock,
            candidates=partial(self.fleet.candidates, decision.model),
            body=body,
            parsed=parsed,
            path=path,
            headers=headers,
        )

    def prefilled(self, decision: Decision, *, held: bool) -> None:
        """That is over: the request goes to its pod, and its end is told by its stream (`held`) or the access log."""
        decision.legs = None
        if not held:
            decision.held = False
            self._ledger.let_go(decision.charge)

    def abandon(self, decision: Decision, request_id: bytes) -> None:
        """Nobody seems to have taken the decision, so the access log will hardly tell of it."""
        if not decision.held and not self.tables.abandoned.has(request_id, decision.charge, logged=True):
            self._ledger.release(decision.charge, held=False)
            self.tables.abandoned.add(request_id, decision.charge, self.clock(), logged=False)
            self.finished(decision.pod, 499)

    def show_modes(self) -> None:
        """Put into the series what `marginal-delay` last had to go by, for each model, and what it has forgotten."""
        for strategy in self._strategies.made:
            if isinstance(strategy, MarginalDelay):
                self.series.put(strategy.forgotten, "prefix_forgotten", str(self.tables.writer))
                for model, mode in strategy.modes.items():
                    for name in MODES:
                        self.series.put(float(name == mode), "mode", model, name)

    def outcome(self, charge: Charge, *, ok: bool) -> None:
        """How a request ended, for passive health."""
        self._ledger.outcome(charge, ok=ok)

    def used(self, decision: Decision, user: str, input_tokens: int, output_tokens: int) -> None:
        """What a user's request took, by its answer: for strategies that count that."""
        strategy = self._strategies.get(decision.strategy)
        strategy.used(user, decision.tokens, input_tokens, output_tokens, self.clock())

    def finished(self, pod: Pod, status: int) -> None:
        """Count a request that has ended."""
        self.series.add(1.0, "finished", pod.name, str(status))

    def _count(self, model: str, pod: Pod, strategy: str) -> None:
        key = (model, pod.slot, pod.generation, strategy)
        cell = self._decision_cells.get(key)
        if cell is None:
            cell = self._decision_cells[key] = self.series.cell("decisions", model, pod.name, strategy)
        self.series.values[cell] += 1.0

    def _routed_replies(
        self, pod: Pod, strategy: str, destination: Destination, held: bool, duplex: bool, id_bytes: int
    ) -> RoutedReplies:
        key = (pod.slot, pod.generation, strategy, destination, held, duplex, id_bytes)
        found = self._replies.get(key)
        if found is None:
            if len(self._replies) >= _MAX_REPLIES:
                self._replies.clear()
            plain = strategy.isascii() and strategy.isprintable()
            found = self._replies[key] = RoutedReplies(
                name=pod.name,
                address=pod.address,
                strategy=strategy if plain else header_value(strategy).decode(),
                destination=destination,
                ticket=None if held else f"{self.tables.replica}.{pod.slot}.{pod.generation}",
                duplex=duplex,
                id_bytes=id_bytes,
                told_as=self._strategies.get(strategy).told_as,
            )
        return found
