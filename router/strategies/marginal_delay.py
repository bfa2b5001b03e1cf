"""The pod where a request adds the least delay to everybody."""

from typing import ClassVar

import numpy as np

from router.backlog import FIRST_STEPS
from router.fleet import Candidates
from router.rates import STALE_SECONDS
from router.request import RoutingRequest
from router.strategies.base import NEAR, Context, Scoring
from state.pods import Floats


class _Space:
    """Room for one epoch's arithmetic, so that it allocates little: `weights` times `loads` gives `terms`."""

    __slots__ = ("added", "half", "loads", "ones", "price", "step", "terms", "weights")

    def __init__(self, n: int) -> None:
        self.weights = np.zeros((3, 3))
        self.loads = np.zeros((3, n))
        self.terms = np.zeros((3, n))
        self.step, self.added, self.price = self.terms
        self.ones = np.ones(n)
        self.half = np.zeros(n)


MODES = ("full", "stale-metrics", "no-prefix", "requests-only")
"""What a decision could be made from, best first; `MarginalDelay.modes` says which, per model."""


class MarginalDelay(Scoring):
    """score = TTFT + M * s + (1 + N + n / 2 + free * w) * C' + free * n / 2 * W + n' * M * d. [seconds]

    W     prefill seconds promised to the pod and not yet done (`router.backlog`)
    C     seconds to prefill what the pod does not hold of this prompt: u tokens at its prefill speed
    TTFT  W, or where it is longer the time until the pod has room in its KV cache or a place for one request more (M
          steps free as much as there is), plus C, plus the share of decoding in the engine steps this takes (token
          budget 8192 each) at s; half a step more where no prompt is under way, since steps are not interrupted
    s     the pod's step: a0 + n' * per-request cost + context tokens of its requests * per-KV-token cost
    M     expected output tokens: the model's learnt mean, at most what the client allows
    C'    the same as C, but what has too few copies for its demand counts less (`LookUp.scarce`)
    n     requests in flight on the pod, whose answers a second of prefill interrupts; half, as some still wait and
          the others can be many
    n'    the mean of n and of what it was in the last seconds, which is nearer to what the answer will meet (and so
          for the context tokens)
    N     mean requests in flight per pod: those that it takes capacity from sooner or later, on whichever pod
    w     requests waiting for prefill on the pod, or as many as come during the wait: those that wait for it
    free  the share of the pods where nobody waits: the mean of c / (c + the pod's wait), c being the mean prompt's
          prefill
    d     seconds that this request adds to each of the pod's steps

    All terms are delays, this request's or others', in seconds; but for the halves they have weight one. That a
    request waits costs nobody else a second, and yet a pod where one waits has no slack for what comes next: without
    n / 2 * W whole answers come as soon, and first tokens later. Where requests wait on all pods there is no slack to
    keep: evening out the waits would only cost cache hits, and let the short prompts wait behind the long ones
    everywhere. So the long ones then come to wait on few pods (their p99 is what it costs). Speeds are learnt per pod
    (`router.rates`), load is the shared ledger's, so it is right to the last decision of any worker; engines' own
    counts add what other gateways sent. Source: our own, found by simulation (docs/routing.md).

    Cost: 30 µs for 64 pods, 35 for 256, beside hashing and look-up (`bench.decision_cost`).

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
            found = self._prefixes.look_up(request, candidates, now, speeds.output_tokens)
            prompt = found.prompt_tokens
            uncached = found.uncached()
            scarce = found.scarce(self._prefixes.index, now, uncached)
            if not found.chain.hashes:
                mode = "no-prefix"
        else:
            mode = "no-prefix"
            uncached = scarce = np.full(len(candidates.pods), prompt)
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
        requests = loads[0] + speeds.elsewhere
        np.add(loads[:2], speeds.usual, space.loads[:2])
        space.loads[:2] *= 0.5
        space.loads[0] += speeds.elsewhere
        space.loads[2] = todo
        weights = space.weights
        # Steps at factor 1; a running request has made half of its output, on average.
        weights[0, 0] = prior.decode_request_seconds + 0.5 * speeds.output_tokens * kv
        weights[0, 1] = kv
        weights[1, 0] = output * (prior.decode_request_seconds + prompt * kv)
        weights[2, 2] = 1.0 / max(self._backlog.mean_tokens, 1.0)
        np.dot(weights, space.loads, space.terms)
        step, added, price, half = space.step, space.added, space.price, space.half
        step += speeds.idle_step
        step *= speeds.decode
        added *= speeds.decode  # n * M * d
        np.minimum(price, requests, out=price)  # w
        served = requests
        if speeds.seats is not None:
            served = np.minimum(requests, 1.0 / np.maximum(speeds.seats, 1e-6))
        np.multiply(served, 0.5, out=half)
        prefills = todo * speeds.prefill_seconds
        wait = prefills
        filled = (loads[1] + prompt) * speeds.rooms if speeds.rooms is not None else None
        if speeds.seats is not None:
            places = (requests + 1.0) * speeds.seats
            filled = places if filled is None else np.maximum(filled, places, out=filled)
        if filled is not None and filled.max() > 1.0:
            filled -= 1.0
            filled *= step
            filled *= speeds.output_tokens
            wait = np.maximum(wait, filled)
        typical = self._backlog.mean_tokens * float(speeds.prefill_seconds[0])
        slack = float((typical / (typical + wait)).dot(space.ones)) / space.ones.size
        price *= slack
        price += half
        price += 1.0 + float(served.dot(space.ones)) / space.ones.size
        price *= scarce
        price += uncached
        price *= speeds.prefill_seconds
        price += wait
        half *= prefills
        half *= slack
        price += half
        steps = np.where(todo > 0.0, 0.0, FIRST_STEPS)
        steps += uncached / budget
        steps += output
        steps *= step  # own steps to the first token, and M, at s each
        price += steps
        price += added
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
        space = candidates.derived.get(_Space)
        step = float(space.step[index]) if space is not None else 0.0
        self._backlog.chose(candidates, index, request.uncached_tokens, speeds, now, step)
