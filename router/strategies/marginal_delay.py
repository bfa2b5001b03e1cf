"""The pod where a request adds the least delay to everybody."""

from typing import ClassVar

import numpy as np

from router.fleet import Candidates
from router.rates import STALE_SECONDS
from router.request import RoutingRequest
from router.strategies.base import NEAR, Context, Scoring
from state.pods import Floats


class _Space:
    """Room for one epoch's arithmetic, so that it allocates little: `weights` times `loads` gives `terms`."""

    __slots__ = ("added", "loads", "ones", "price", "requests", "step", "terms", "weights")

    def __init__(self, n: int) -> None:
        self.weights = np.zeros((3, 3))
        self.loads = np.zeros((3, n))
        self.terms = np.zeros((3, n))
        self.requests = self.loads[0]
        self.step, self.added, self.price = self.terms
        self.ones = np.ones(n)


MODES = ("full", "stale-metrics", "no-prefix", "requests-only")
"""What a decision could be made from, best first; `MarginalDelay.modes` says which, per model."""


class MarginalDelay(Scoring):
    """score = TTFT + M * s + (1 + N + w) * C + n * M * d. [seconds of delay, summed over all requests]

    C     seconds to prefill what the pod does not hold of this prompt: u tokens at its prefill speed
    TTFT  time to its first token there: prefill seconds promised to the pod and not yet done (`router.backlog`),
          plus C, plus the engine steps this takes (token budget 8192 each) at s
    s     the pod's step now: a0 + n * per-request cost + context tokens of its requests * per-KV-token cost
    M     expected output tokens: the model's learnt mean, at most what the client allows
    N     mean requests in flight per pod: those that a second of needless prefill delays sooner or later
    w     requests waiting for prefill on the pod: those that it delays at once
    n     requests in flight on the pod, d seconds that this request adds to each of its steps

    Every term is a delay in seconds and has weight one. Speeds are learnt per pod (`router.rates`), load is the
    shared ledger's, so it is right to the last decision of any worker; engines' own counts add what other
    gateways sent. Source: our own, found by simulation on public traces (docs/routing.md).

    Cost: 20 µs for 64 pods, 25 for 256, beside hashing and look-up (`bench.decision_cost`).

    It needs little to work: with old metrics it goes by its own account and the speeds it learnt before; without
    prefix knowledge C is the whole prompt on every pod; without a prompt length it is by requests in flight.
    """

    name: ClassVar[str] = "marginal-delay"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._prefixes = context.prefixes
        self._rates = context.rates
        self._backlog = context.backlog
        self.modes: dict[str, str] = {}
        """What the last decision for a model was made from."""

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Seconds of delay. The array is written over by the next call for the same candidates."""
        prior = self._rates.prior
        speeds = self._rates.speeds(candidates, now)
        loads = candidates.loads()
        todo = self._backlog.follow(candidates, speeds, now)

        prompt = float(request.prompt_tokens)
        uncached: Floats | None = None
        mode = "full"
        if self._prefixes is not None:
            found = self._prefixes.look_up(request, candidates, now)
            prompt = found.prompt_tokens
            uncached = found.uncached()
            if not found.chain.hashes:
                mode = "no-prefix"
        else:
            mode = "no-prefix"
            uncached = np.full(len(candidates.pods), prompt)
        if now - speeds.sampled_at > STALE_SECONDS:
            mode = "stale-metrics" if prompt > 0 else "requests-only"
        self.modes[request.model] = mode

        output = speeds.output_tokens
        if 0 < request.max_tokens < output:
            output = float(request.max_tokens)
        kv, budget = prior.kv_token_seconds, prior.step_tokens
        space = candidates.derived.get(_Space)
        if space is None:
            space = candidates.derived[_Space] = _Space(len(candidates.pods))
        requests = space.requests
        np.add(loads[0], speeds.elsewhere, requests)
        space.loads[1] = loads[1]
        space.loads[2] = todo
        weights = space.weights
        # Steps at factor 1; a running request has made half of its output, on average.
        weights[0, 0] = prior.decode_request_seconds + 0.5 * speeds.output_tokens * kv
        weights[0, 1] = kv
        weights[1, 0] = budget * output * (prior.decode_request_seconds + prompt * kv)
        weights[2, 2] = 1.0 / max(self._backlog.mean_tokens, 1.0)
        np.dot(weights, space.loads, space.terms)
        step, added, price = space.step, space.added, space.price
        step += speeds.idle_step
        work = todo + uncached
        steps = np.maximum(work, budget)
        steps += output * budget
        step *= steps  # budget times: own steps to the first token, and M, at s each
        step += added  # n * M * d
        step *= speeds.decode_per_budget
        np.minimum(price, requests, out=price)  # w
        price += 1.0 + float(requests.dot(space.ones)) / space.ones.size
        price *= uncached
        price += work
        price *= speeds.prefill_seconds
        price += step
        return price

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The lowest score; none of them is ever unknown."""
        scores = self.scores(request, candidates, now)
        best = int(scores.argmin())
        near = scores <= scores[best] * (1.0 + NEAR)
        ties = int(np.count_nonzero(near))
        if ties > 1:
            best = int(near.nonzero()[0][int(self.context.random.random() * ties)])
        return best

    def chosen(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """Remember where the prompt went, and what it has to compute there."""
        if self._prefixes is not None:
            self._prefixes.remember(request, candidates, index, now)
        elif request.uncached_tokens < 0:
            request.uncached_tokens = request.prompt_tokens
        speeds = self._rates.speeds(candidates, now)
        self._backlog.chose(candidates, index, request.uncached_tokens, speeds, now)
