"""The pod where a request adds the least delay to everybody."""

from typing import ClassVar, Final

import numpy as np

from router.fleet import Candidates
from router.prefixes import LookUp, Shares
from router.rates import STALE_SECONDS
from router.request import RoutingRequest
from router.strategies.base import Context, Scoring, smallest
from router.strategies.delays import Chance, Delays
from state.pods import Floats

MODES: Final = ("full", "stale-metrics", "no-prefix", "requests-only")
"""What a decision could be made from, best first; `MarginalDelay.modes` says which, per model."""


class MarginalDelay(Scoring):
    """Chooses the pod where the request adds the least delay to itself and to all others, in seconds.

    score = TTFT + (1 + N + n / 2 + slack * w) * C' + (1 + N) * L + slack * n / 2 * W + (M + F) * a. [seconds]

    Symbols, each with its unit and in brackets what carries it in `router.strategies.delays`: attributes of `PodTerms`,
    with an underscore of `Delays`. u are the tokens of this prompt that the pod does not hold, of P tokens in all.

    TTFT   [s] Time to this request's first token. It is the sum of four: the wait; C; the share of decoding in the
           engine steps that computing the prompt takes (token budget 8192 each), at s; and half a step where no prompt
           is under way, since steps are not interrupted. The wait is W or, where that is longer, the time until the pod
           has room in its KV cache and a slot for one request more: M tokens free as much as there is, at s or, where
           that is longer, at the time from token to token that the pod's own metrics give, in which it computes prompts
           too. (fixed, capacity_wait, prefill, step)
    W      [s] Prefill promised to the pod and not yet done, and the steps that takes (`router.backlog`). (wait)
    C      [s] Prefill of what the pod does not hold of this prompt: its last u tokens at the pod's prefill speed, times
           flat + slope * (P - u / 2), since attention makes a token dearer by those before it. flat and slope are
           learnt, such that the mean token of all prompts counts once (`router.attention`). (prefill)
    C'     [s] The same as C, but what has too few copies for its demand, or none on a pod that has room or where nobody
           waits, counts less (`LookUp.uncached_and_scarce`, with `Delays.worth`). (price, prefill)
    s      [s] The pod's step: a0 + n' * per-request cost + context tokens of its requests * per-KV-token cost. (step)
    a      [s per token] What one token of an answer costs, to itself and to others: s + x + n' * d.
           (step, prefill_interference, shared)
    d      [s] What this request adds to each of the pod's steps. (shared, times the prior's rates)
    x      [s] What others' prefills add to the mean step of the answer: slack / 2 * s * r / (1 - r), at most slack / 2
           times the prefill of a whole token budget. r is the share of its time that the prefills take which the pod
           was promised of late (a mean over 60 s). (prefill_interference; growth is r / (1 - r))
    M      [tokens] Expected output: the model's learnt mean, at most what the client allows. (_output, with F)
    F      [tokens] Output of the requests that will follow this one to where it goes: slack * b * (1 / tokens that the
           mean request has to compute - 1 / tokens of the mean prompt) * the mean output. b are the tokens that no pod
           holds, times their share of what the pod that holds least has to compute. (_per_new, for each token of b)
    L      [s] Prefilling again what the u tokens push out of the pod's full cache, at the pod's speed. For each of them
           it is so many tokens as have to be computed again for each token that was written there of late
           (`router.cache_turnover.Turnover`); times 1 - slack. (loss)
    n      [requests] In flight on the pod, as far as it has slots and room for them. (served)
    n'     [requests] The mean of n and of what it was in the last seconds; the context tokens in s are the same mean.
           (shared, times the pod's factor on the prior's decode rates)
    N      [requests] The mean in flight per pod. (_price_of_all is 1 + N)
    w      [requests] Waiting for prefill on the pod, or as many as come during the wait. (price)
    slack  [share] Of the pods, where nobody waits: the mean of c / (c + the pod's wait), c being the mean prompt's
           prefill. (slack)

    Why these terms. All are delays, this request's or others', in seconds; but for the halves they have weight one.

    TTFT is this request's own wait. That it waits costs nobody else a second.

    (1 + N + n / 2 + slack * w) * C' is what its prefill costs others. N are those that it takes capacity from sooner or
    later, on whichever pod. n are those whose answers a second of prefill interrupts; half of them, as some still wait
    and the others can be many. w are those that wait for it.

    (1 + N) * L is what it pushes out. It is much on a pod that just still keeps what comes back, and nothing on one
    with room to spare, nor where little is found anyway: so few pods lose their caches, and not all. While there is
    slack, computing it again costs little, hence 1 - slack.

    slack * n / 2 * W keeps slack for what comes next: a pod where one request waits has none. Without it whole answers
    come as soon, and first tokens later. Where requests wait on all pods there is no slack to keep: evening out the
    waits, the prefills or what comes later would only cost cache hits, and let the short prompts wait behind the long
    ones everywhere. So the long ones then come to wait on few pods (their p99 is what it costs).

    M * a is the answer, this one's and what it adds to the others' steps. n' is nearer than n to what the answer will
    meet. x is half of what it might be, since what pods are sent evens out.

    F * a is those that come later. Where a tenth of the mean prompt is computed, a token that is computed is found nine
    times, by as many requests as it takes to find a prompt's worth. Where others hold much of the prompt already, it is
    not these tokens that bind a request to the pod, hence b. Without F, prompts that nobody holds go where there is
    least to do at the moment, and pods that came by the prefixes most asked for fill up first.

    Speeds are learnt per pod (`router.rates`). Load is the shared ledger's, and what any worker sends is in it at the
    next decision of any other; engines' own counts add what other gateways sent. Equal pods are told apart by chance, a
    nanosecond at most. Source: our own, found by simulation (docs/routing.md).

    Where other replicas route without telling, as without Redis (engines count more requests than are known), or where
    the prefix index is too small for what the pods hold, what nobody is known to hold may be held all the same. It is
    always expected at the same pod, by all replicas, which no message has to say and nobody to remember
    (`LookUp.at_home`), and so it comes to be there.

    When it knows less: with old metrics it goes by its own account and the speeds it learnt before; without prefix
    knowledge C is the whole prompt on every pod; without a prompt length it is by requests in flight.
    """

    name: ClassVar[str] = "marginal-delay"
    promises: ClassVar[int] = 2  # with what attention and decoding add

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._prefixes = context.prefixes
        self._rates = context.rates
        self._backlog = context.backlog
        self._chance = Chance(context.random)
        self._scored: Delays | None = None
        self.modes: dict[str, str] = {}
        """What the last decision for a model was made from."""

    @property
    def forgotten(self) -> float:
        """Share of what pods hold for which the prefix index had no room."""
        return self._prefixes.index.forgotten() if self._prefixes is not None else 0.0

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """Seconds of delay."""
        return np.array(self._score(request, candidates, now).scores())

    def _score(self, request: RoutingRequest, candidates: Candidates, now: float) -> Delays:
        delays, prompt, output, full, uncached, scarce, others, new = self._weigh(request, candidates, now)
        delays.score(prompt, output, uncached, scarce, new)
        for indices, uncached, scarce in others:
            delays.score_others(indices, uncached, scarce)
        if full:
            delays.add_waits_for_room()
        return delays

    def terms(self, request: RoutingRequest, candidates: Candidates, now: float) -> dict[str, Floats]:
        """Seconds of delay: `queue`, until the pod begins with it and what that says of its slack; `prefill` and
        `answer`, its own; `others`, what it adds to those of others; `evicted`, what it pushes out of the cache;
        `followers`, the answers of those that will follow it, and what they add to others'."""
        delays, prompt, output, full, uncached, scarce, others, new = self._weigh(request, candidates, now)
        missing = np.full(len(candidates), uncached)
        counted = np.full(len(candidates), scarce)
        for indices, uncached, scarce in others:
            missing[indices], counted[indices] = uncached, scarce
        return delays.terms(prompt, output, full, missing, counted, new)

    def _weigh(
        self, request: RoutingRequest, candidates: Candidates, now: float
    ) -> tuple[Delays, float, float, int, float, float, Shares, float]:
        """The delays, prompt and output tokens, the pods without room for it, of most pods and then of the others what
        is uncached and what is scarce, and the tokens that bind others to the pod that computes them."""
        speeds = self._rates.speeds(candidates, now)
        prefixes = self._prefixes
        found: LookUp | None = None
        mode = "no-prefix"
        prompt = float(request.prompt_tokens)
        if prefixes is not None:
            found = prefixes.look_up(request, candidates, now, speeds.output_tokens)
            prompt = found.prompt_tokens
            if found.chain.packed:
                mode = "full"
        delays = self.delays(candidates, now)
        full = delays.wait_for_room(prompt) if delays.may_be_full(prompt) else 0
        uncached = scarce = prompt
        others: Shares = ()
        if prefixes is not None and found is not None:
            uncached, scarce, others = found.uncached_and_scarce(prefixes.index, now, full, delays.busy, delays.worth)
        new = most = uncached
        for _, other, _ in others:
            if other < new:
                new = other
            elif other > most:
                most = other
        new = new * new / most if most > 0.0 else 0.0
        if prefixes is not None and found is not None:
            unseen = max(delays.unseen if prefixes.homes else 0.0, delays.forgotten)
            if unseen > 0.0:
                home = found.at_home(uncached, scarce, others, prefixes.index, delays.keys(), unseen)
                if home is not None:
                    others = [*others, home]
        if now - speeds.sampled_at > STALE_SECONDS:
            mode = "stale-metrics" if prompt > 0 else "requests-only"
        self.modes[request.model] = mode

        output = speeds.output_tokens
        if 0 < request.max_tokens < output:
            output = float(request.max_tokens)
        return delays, prompt, output, full, uncached, scarce, others, new

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The lowest score; none of them is ever unknown."""
        self._scored = self._score(request, candidates, now)
        return self._scored.lowest()

    def prepare(self, candidates: Candidates, now: float) -> None:
        """Learn from the last polls."""
        self.up_to_date(candidates, now)

    def up_to_date(self, candidates: Candidates, now: float) -> Delays:
        """The pods' figures where no prompt was looked up before: the prefix index may not know of all pods yet."""
        if self._prefixes is not None:
            self._prefixes.index.follow(now)
        return self.delays(candidates, now)

    def next_best(
        self, request: RoutingRequest, candidates: Candidates, first: int, count: int, now: float
    ) -> list[int]:
        """The next lowest of the scores that `pick` went by."""
        assert self._scored is not None
        return smallest(self._scored.scores(), first, count)

    def delays(self, candidates: Candidates, now: float) -> Delays:
        """The pods' figures as they are now."""
        found: Delays | None = candidates.derived.get(Delays)
        if found is None:
            speeds = self._rates.speeds(candidates, now)
            found = candidates.derived[Delays] = Delays(candidates, speeds, self._backlog, self._chance)
        found.refresh(now, self._prefixes.index if self._prefixes is not None else None)
        return found

    def chosen(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """Remember where the prompt went, and what it has to compute there."""
        if self._prefixes is not None:
            self._prefixes.remember(request, candidates, index, now)
        elif request.uncached_tokens < 0:
            request.uncached_tokens = request.prompt_tokens
        delays: Delays = candidates.derived.get(Delays) or self.delays(candidates, now)
        prompt = request.prefix.prompt_tokens if request.prefix is not None else request.prompt_tokens
        delays.promise(index, prompt, request.uncached_tokens, now)
