"""How fast each pod is: learnt from its own metrics, with a stated prior.

An engine's step is taken to last

    a0 + (decoding requests) * per_request + (context tokens read) * per_kv_token + (prompt tokens computed) * per_token

seconds. The four rates of the prior were measured on nobody's machine: they are round figures of an 8B model on a
current GPU. What is learnt is two factors on them, one for prefill (per_token) and one for decode (the other three):
the least squares solution of

    measured seconds = decode factor * decode seconds by the prior + prefill factor * prefill seconds by the prior

over samples, weighed so that a large factor and a small one count alike. A sample gives
- where the engine counts its steps: busy seconds per step, with the requests and tokens of a mean step;
- else the mean time between tokens, in which the pod also computes other requests' prompts; and the mean prefill
  phase, in which it computes this prompt's uncached tokens and whatever comes in meanwhile.

All pods of a model are one fleet until they prove different: a pod's own samples (the last ten, in effect) stand
against FLEET_SAMPLES of the fleet's, and of how far its prefills are off the others' only that share counts which has
lasted for LASTING_SAMPLES. Where pods are of several speeds, each one's samples are first divided by how fast it is in
all: a fast pod computes more prompts, and without that it would say that prompts cost next to nothing. Prompt tokens
are those of the mean cost: of a long prompt they cost more (`router.attention`). Where the samples do not tell decode
from prefill, both get the factor that fits the sum. A pod that joins a running fleet is taken to be half as fast for
prefills at first, and at full speed after WARM_UP_SECONDS: engines compile, capture graphs and fill their own caches
during their first requests.

What an engine has counted since it was first polled begins and ends within prompts, each counted whole or not at all.
So a sample of few seconds weighs less than one of a minute. A fleet's first samples are believed as to how fast it is
in all, but not yet as to what of that is decode and what prefill. And how much faster one pod is than the others is
half believed once it has been watched for EDGE_SECONDS. Otherwise pods that are all alike seem to be of many speeds
until they have been watched for minutes, and a router that starts with them piles prompts on those that seem fastest.

It does not take more: with rates wrong by a factor of 2 (prefill) or 3 (decode) `marginal-delay` decides almost
as well.

Cost: 0.3 ms per poll of any of 64 pods, between requests (`Scheduler.catch_up`) or, where nobody calls that, in the
next decision; nothing per request (`bench.decision_cost`, `poll`, counts what else such a decision finds changed too:
0.6 ms).
"""

from dataclasses import dataclass
from math import exp, isfinite
from typing import Any, Final

import numpy as np

from router.attention import SENT_SECONDS, Attention, Sent
from router.fleet import Candidates
from state.pods import Floats, Ints

WARM_UP_SECONDS: Final = 30.0
STALE_SECONDS: Final = 15.0
"""Metrics older than this say nothing about the present load; speeds are kept."""
_KEEP: Final = 0.9
"""What is left of the weight of a pod's samples after the next one."""
FLEET_SAMPLES: Final = 3.0
FIRST_SAMPLES: Final = 3.0
"""With so many samples of a minute for each pod, the doubt which of them is decode and which prefill falls to 1 / e."""
_UNSEEN_SAMPLES: Final = 0.01
"""Of the fleet's, for how fast a pod is in all: only for one that has none of its own."""
_TOGETHER: Final = 0.002
"""How much the two factors are drawn together, as a share of a full sample's weight: a kind of work that takes a
twentieth of the time says little of its own factor, since all errors of the other would be put down to it."""
EDGE_SECONDS: Final = 5.0
"""Of how far a pod is off the others in all, half is believed once it has been watched for so long."""
USUAL_SPREAD: Final = 0.15
"""So far (as a logarithm) pods of one kind may be off each other in all, and for long, by what they happen to do. Of a
pod's distance half counts where it is as much, nearly all where it is twice that, next to nothing where it is half."""
_LIMIT: Final = 50.0
FULL_USAGE: Final = 0.95
"""Of the KV cache, above which requests may wait for room in it and not for a place."""
MIN_REQUESTS_AT_LIMIT: Final = 16
"""Fewer requests running may be as many as before by chance."""
FLEETS_KEPT: Final = 256
LASTING_SAMPLES: Final = 180.0
"""Over which it shows what of a pod's difference from the others lasts: three times what metrics are means of."""
LOAD_SECONDS: Final = 3.0
"""Over which a pod's smoothed load is averaged: a few polls."""
ELSEWHERE_SECONDS: Final = 30.0
"""Over which what engines count beyond what is known here is averaged."""


@dataclass(frozen=True, slots=True)
class Prior:
    """Seconds, and tokens."""

    step_seconds: float = 0.008
    prefill_token_seconds: float = 1 / 14_000
    decode_request_seconds: float = 0.00006
    kv_token_seconds: float = 2.2e-8
    step_tokens: float = 8192.0
    """The engine's token budget for one step (vLLM: max_num_batched_tokens)."""
    output_tokens: float = 200.0
    uncached_tokens: float = 1000.0


class Speeds:
    """What is known of a model's pods at one epoch: arrays in the order of the candidates."""

    __slots__ = (
        "decode",
        "elsewhere",
        "flat",
        "idle_step",
        "kv_share_per_token",
        "output_tokens",
        "polled",
        "prefill_seconds",
        "prefill_tokens_per_second",
        "sampled_at",
        "sent",
        "share_elsewhere",
        "share_per_request",
        "slope",
        "smoothed_loads",
        "token_interval",
    )

    def __init__(self) -> None:
        self.smoothed_loads: Floats
        """[2][n]: requests and tokens in flight as the ledger had them over the last LOAD_SECONDS."""
        self.share_per_request: Floats | None = None
        """1 / (requests that the pod can run at once), 0 where that is not known; None if nowhere."""
        self.kv_share_per_token: Floats | None = None
        """1 / (prompt tokens in flight that fill the pod's KV cache), 0 where that is not known; None if nowhere."""
        self.prefill_seconds: Floats
        """Per prompt token of the mean cost."""
        self.prefill_tokens_per_second: Floats
        """Such tokens per second."""
        self.decode: Floats
        """Factor on the prior's decode rates."""
        self.idle_step: Floats
        """Seconds of a step, at factor 1, before this replica sends anything: a0, and reading what others sent."""
        self.elsewhere: Floats
        """Requests on the pod that this replica does not know of."""
        self.share_elsewhere = 0.0
        """Of the requests in flight over the last ELSEWHERE_SECONDS, those that this replica does not know of."""
        self.output_tokens = 0.0
        """Mean of a request."""
        self.token_interval: Floats
        """Seconds from token to token of late, others' prefills in between included; 0 where that is not known."""
        self.polled: list[int] = []
        """Candidates with a sample not seen before."""
        self.sampled_at = 0.0
        """The median pod's last poll."""
        self.flat, self.slope = 1.0, 0.0
        """What a prompt token costs: flat + slope * (tokens before it)."""
        self.sent: list[Sent] = []
        """For each candidate: whoever sends it a prompt says so there."""

    def cost(self, prompt: float, uncached: float) -> float:
        """Tokens of the mean cost that the last `uncached` ones of a prompt come to."""
        return uncached * (self.flat + self.slope * (prompt - 0.5 * uncached))


class _Pod:
    __slots__ = ("evidence", "polled", "seen", "sent", "sums", "watched")

    def __init__(self, now: float) -> None:
        self.seen = now
        self.polled = 0.0
        self.watched = 0.0
        """Seconds that samples so far are of, those of a minute before the first one included."""
        self.evidence = 0.0
        """The samples that said something, in samples of a minute."""
        self.sent = Sent()
        self.sums = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        """Of d*d, d*p, p*p, d, p and 1 over the samples, d and p being the decode and prefill seconds by the prior,
        divided by the seconds measured; the first five with weight 1 / (d + p)."""

    def add(self, decode: float, prefill: float, weight: float) -> None:
        """One equation, 1 = decode * factor + prefill * factor."""
        dd, dp, pp, d, p, samples = self.sums
        evened = weight / (decode + prefill)
        self.sums = (
            dd + evened * decode * decode,
            dp + evened * decode * prefill,
            pp + evened * prefill * prefill,
            d + evened * decode,
            p + evened * prefill,
            samples + weight,
        )


class Rates:
    """One process's knowledge of speeds. All processes learn the same from the same rows."""

    def __init__(self, prior: Prior | None = None, *, learn: bool = True) -> None:
        self.prior = prior or Prior()
        self._learns = learn
        self._pods: dict[int, _Pod] = {}  # by generation
        self._fleets: dict[tuple[int, ...], _Fleet] = {}
        self._since = -1.0

    def speeds(self, candidates: Candidates, now: float) -> Speeds:
        """The speeds of these candidates; worked out once per epoch."""
        found: Speeds | None = candidates.derived.get(Rates)
        if found is None:
            found = candidates.derived[Rates] = self._learn(candidates, now)
        return found

    def _learn(self, candidates: Candidates, now: float) -> Speeds:
        prior = self.prior
        if self._since < 0:
            self._since = now
        fleet = self._fleet(candidates, now)
        out = Speeds()
        sampled = candidates.metric("sampled_at")
        out.polled = np.flatnonzero(sampled > fleet.sampled_at).tolist()
        if out.polled:
            fleet.sampled_at = sampled
            columns = [candidates.metric(name) for name in _USED]
            for i in out.polled if self._learns else ():
                row = {name: float(column[i]) for name, column in zip(_USED, columns, strict=True)}
                fleet.observe(i, row, prior, float(sampled[i]))
            lengths = columns[_GENERATED]
            lengths = lengths[lengths > 0]
            fleet.measure_room(out.polled, candidates)
            fleet.output_tokens = (float(lengths.sum()) + 0.5 * prior.output_tokens) / (len(lengths) + 0.5)
        factor, decode = fleet.factors(now)
        out.prefill_seconds = factor * prior.prefill_token_seconds
        out.prefill_tokens_per_second = 1.0 / out.prefill_seconds
        out.decode = decode
        out.flat, out.slope = fleet.attention.flat, fleet.attention.slope
        out.sent = fleet.sent
        out.output_tokens = fleet.output_tokens
        if fleet.limits_seen:
            out.share_per_request = fleet.share_per_request
        out.kv_share_per_token = fleet.kv_share_per_token
        out.smoothed_loads = fleet.average(candidates.loads()[:2], now)
        out.sampled_at = float(np.partition(sampled, len(sampled) // 2)[len(sampled) // 2])
        self._elsewhere(out, fleet, candidates, sampled, now)
        return out

    def _fleet(self, candidates: Candidates, now: float) -> "_Fleet":
        generations = tuple([pod.generation for pod in candidates.pods])
        found = self._fleets.get(generations)
        if found is None:
            alike = self._most_alike(generations)
            if len(self._fleets) >= FLEETS_KEPT:
                self._fleets.clear()
                self._pods = {pod: known for pod, known in self._pods.items() if pod in generations}
            pods = []
            for generation in generations:
                known = self._pods.get(generation)
                if known is None:
                    # The fleet that this process finds is not new, even if the process is.
                    known = self._pods[generation] = _Pod(now if now > self._since else -1e9)
                pods.append(known)
            found = self._fleets[generations] = _Fleet(pods, self.prior)
            if alike is not None:
                found.inherit(alike)
                found.measure_room([], candidates)
        return found

    def _most_alike(self, generations: tuple[int, ...]) -> "_Fleet | None":
        """The set that has most pods in common with this one, the latest of them."""
        wanted = set(generations)
        alike = max(reversed(self._fleets), key=lambda known: len(wanted.intersection(known)), default=())
        return self._fleets[alike] if wanted.intersection(alike) else None

    def _elsewhere(self, out: Speeds, fleet: "_Fleet", candidates: Candidates, sampled: Floats, now: float) -> None:
        """What engines count beyond what the ledger had in flight there (this replica's requests, and with Redis the
        other replicas'): other gateways', or direct traffic."""
        counted = candidates.metric("running") + candidates.metric("waiting")
        extra = np.maximum(counted - candidates.metric("tracked_requests_at_sample"), 0.0)
        extra[np.isnan(extra) | (now - sampled > STALE_SECONDS)] = 0.0
        out.elsewhere = extra
        tracked = candidates.metric("tracked_requests_at_sample")
        both = (counted >= 0) & (tracked >= 0) & (now - sampled <= STALE_SECONDS)
        more = float((counted - tracked)[both].sum())  # what one pod has more than is known, another may have less
        out.share_elsewhere = fleet.average_elsewhere(max(more, 0.0), float(tracked[both].sum()), now)
        tokens = extra * np.nan_to_num(candidates.metric("prompt_tokens_mean"), nan=1000.0)
        out.token_interval = np.nan_to_num(candidates.metric("itl_mean_seconds"))
        out.token_interval[now - sampled > STALE_SECONDS] = 0.0
        out.idle_step = self.prior.step_seconds + tokens * self.prior.kv_token_seconds


_OF_A_POD: Final = (
    "sampled_at", "_queued", "_full", "_max_requests", "_most", "_lasting", "_chance", "_pace", "_paced", "_window",
)  # fmt: skip


class _Fleet:
    """What is known of one set of pods, in the order of the candidates."""

    __slots__ = (
        "_chance",
        "_decode",
        "_elsewhere_at",
        "_extra",
        "_full",
        "_known",
        "_lasting",
        "_max_requests",
        "_most",
        "_pace",
        "_paced",
        "_pods",
        "_prefill",
        "_queued",
        "_smoothed_at",
        "_smoothed_loads",
        "_sums",
        "_watched",
        "_window",
        "_young",
        "attention",
        "kv_share_per_token",
        "limits_seen",
        "output_tokens",
        "sampled_at",
        "sent",
        "share_per_request",
        "spread",
    )

    def __init__(self, pods: list[_Pod], prior: Prior) -> None:
        self._pods = pods
        self.sampled_at: Floats = np.zeros(len(pods))
        self.share_per_request: Floats = np.zeros(len(pods))
        self.limits_seen = False
        self.kv_share_per_token: Floats | None = None
        self.spread = 1.0
        self._queued: Floats = np.zeros(len(pods))
        self._full: Floats = np.zeros(len(pods))
        self._max_requests: Floats = np.zeros(len(pods))
        self._most: Floats = np.zeros(len(pods))
        self.output_tokens = prior.output_tokens
        self._young = max((pod.seen for pod in pods), default=0.0)
        self._sums: Floats = np.array([pod.sums for pod in pods], float).T.copy()
        self._prefill: Floats | None = None
        self._decode: Floats = np.zeros(0)
        self._smoothed_loads: Floats | None = None
        self._smoothed_at = 0.0
        self._extra = self._known = 0.0
        self._elsewhere_at = 0.0
        self.attention = Attention(len(pods))
        self.sent = [pod.sent for pod in pods]
        # Of the logarithms of prefill factors: how far each pod is off the mean, and by how much that varies.
        self._lasting: Floats = np.zeros(len(pods))
        self._chance: Floats = np.zeros(len(pods))
        # The logarithm of how fast each pod is in all, the weight of the samples that this is the mean of, and the
        # seconds that the last one is of.
        self._pace: Floats = np.zeros(len(pods))
        self._paced: Floats = np.zeros(len(pods))
        self._window: Floats = np.zeros(len(pods))
        self._watched = 0.0

    def inherit(self, known: "_Fleet") -> None:
        """Begin with what is known of another set, one that has lost pods or got new ones, say."""
        self.attention = known.attention.copy(len(self._pods))
        self.spread, self.output_tokens, self._watched = known.spread, known.output_tokens, known._watched
        self._extra, self._known, self._elsewhere_at = known._extra, known._known, known._elsewhere_at
        indices = {id(pod): j for j, pod in enumerate(known._pods)}
        for i, pod in enumerate(self._pods):
            j = indices.get(id(pod), -1)
            if j >= 0:
                for name in _OF_A_POD:
                    getattr(self, name)[i] = getattr(known, name)[j]

    def observe(self, i: int, row: dict[str, float], prior: Prior, sampled: float) -> None:
        """Take a sample of one pod in. Another fleet may have seen it already: time passes once for the pod."""
        pod = self._pods[i]
        passed = max(sampled - pod.polled, 0.0)
        self._window[i] = _window_seconds(row)
        pod.watched += min(passed, float(self._window[i]))
        pod.sent.fade(passed)
        pod.polled = max(sampled, pod.polled)
        _observe(pod, prior, row, self.attention)
        self._sums[:, i] = pod.sums
        self._prefill = None

    def measure_room(self, polled: list[int], candidates: Candidates) -> None:
        """See how many requests and tokens the pods can take at once.

        A limit shows where requests wait in polls one after the other and the same number runs. Where that is not for
        want of room in the KV cache it is the engine's limit, which is remembered, and expected of pods that were never
        seen at theirs too. Room in the KV cache is known; how much of it a prompt token takes is learnt where nobody
        waits: less than its own where prompts share blocks, more for the answers.
        """
        waiting, running = candidates.metric("waiting"), candidates.metric("running")
        capacity = candidates.metric("num_gpu_blocks") * candidates.metric("block_size")
        usage = candidates.metric("kv_usage")
        used = usage * capacity
        tokens = candidates.metric("tracked_tokens_at_sample")
        for i in polled:
            runs = float(running[i])
            queued = runs if waiting[i] > 0 else 0.0
            stands = queued >= MIN_REQUESTS_AT_LIMIT and queued == self._queued[i]
            self._full[i] = queued if stands else 0.0
            self._queued[i] = queued
            self._most[i] = max(self._most[i], runs)
            if stands and not usage[i] > FULL_USAGE:
                self._max_requests[i] = runs
            elif runs > self._max_requests[i]:
                self._max_requests[i] = 0.0
            if waiting[i] == 0 and tokens[i] > 0 and used[i] > 0:
                self.spread += 0.1 * min(used[i] / tokens[i], 2.0) - 0.1 * self.spread
        largest = float(self._max_requests.max())
        expected = np.where(self._most <= largest, largest, 0.0)
        limits = np.where(self._max_requests > 0, self._max_requests, expected)
        limits = np.where(self._full > 0, self._full, limits)
        self.limits_seen = bool(limits.any())
        self.share_per_request = np.where(limits > 0, 1.0 / np.maximum(limits, 1.0), 0.0)
        known = capacity > 0
        if known.any():
            self.kv_share_per_token = np.where(known, self.spread / np.where(known, capacity, 1.0), 0.0)

    def average(self, loads: Ints, now: float) -> Floats:
        """Take in what the load is now."""
        smoothed: Floats
        if self._smoothed_loads is None:
            smoothed = loads.astype(float)
        else:
            smoothed = self._smoothed_loads + (1.0 - exp((self._smoothed_at - now) / LOAD_SECONDS)) * (
                loads - self._smoothed_loads
            )
        self._smoothed_loads, self._smoothed_at = smoothed, now
        return smoothed

    def average_elsewhere(self, extra: float, known: float, now: float) -> float:
        """Take in how many requests are in flight that this replica does not know of, and how many that it does.
        Returns the former's share, as if one more were known: of one or two it says little."""
        rate = 1.0 - exp(min(self._elsewhere_at - now, 0.0) / ELSEWHERE_SECONDS)
        self._extra += rate * (extra - self._extra)
        self._known += rate * (known - self._known)
        self._elsewhere_at = now
        return self._extra / (self._extra + self._known + 1.0)

    def _what_lasts(self, prefill: Floats) -> Floats:
        """Prefill factors, each off their mean for the share of its distance that lasts: square of the mean distance /
        mean square of the distance. The rest is what it happened to compute in the last minute."""
        logs = np.log(prefill)
        mean = logs.mean()
        off = logs - mean
        rate = 1.0 / self._watched
        self._lasting += rate * (off - self._lasting)
        self._chance += rate * ((off - self._lasting) ** 2 - self._chance)
        squares = self._lasting**2
        off *= squares / (squares + self._chance + 1e-9)
        result: Floats = np.exp(mean + off)
        return result

    def _lasting_paces(self) -> Floats:
        """How many times as long as on the others everything takes on each pod, as far as that is known by now, lasts
        and is more than pods of one kind differ. A sample's error goes by 1 / its seconds, so in this mean, in which
        each one holds those before it, its weight by their square."""
        dd, dp, pp, d, p, own = self._sums
        square, both = dd + 2.0 * dp + pp, d + p
        unseen = _UNSEEN_SAMPLES / max(float(own.sum()), 1e-9)
        every, everys = unseen * float(both.sum()), unseen * float(square.sum())
        if not (every > 0 and everys > 0):
            return np.ones(len(own))
        logs = np.log(np.clip((both + every) / (square + everys), 1.0 / _LIMIT, _LIMIT))
        squares = np.where(own > 0, self._window, 0.0) ** 2
        self._paced = np.minimum(self._paced + squares, LASTING_SAMPLES * len(own) * SENT_SECONDS**2)
        self._pace += squares / np.maximum(self._paced, 1e-9) * (logs - logs.mean() - self._pace)
        watched: Floats = np.array([pod.watched for pod in self._pods]) ** 2
        pace = self._pace * watched / (watched + EDGE_SECONDS**2)
        distance = pace**4
        result: Floats = np.exp(pace * distance / (distance + USUAL_SPREAD**4))
        return result

    def factors(self, now: float) -> tuple[Floats, Floats]:
        """On the prior's prefill and decode rates, for each pod."""
        if self._prefill is None:
            self._watched = min(self._watched + 1.0, LASTING_SAMPLES * len(self._pods))
            pace = self._lasting_paces()
            sums = self._sums.copy()
            sums[3:5] /= pace
            doubt = exp(-sum([pod.evidence for pod in self._pods]) / (FIRST_SAMPLES * len(self._pods)))
            decode, prefill = _solve(sums, _TOGETHER + doubt)
            self._decode, self._prefill = decode * pace, self._what_lasts(prefill) * pace
            self.attention.solve()
        if now - self._young >= WARM_UP_SECONDS:
            return self._prefill, self._decode
        ages = np.array([now - pod.seen for pod in self._pods])
        return self._prefill * (2.0 - np.clip(ages / WARM_UP_SECONDS, 0.0, 1.0)), self._decode


_USED: Final = (
    "window_seconds",
    "busy_ratio",
    "hit_ratio",
    "prompt_tokens_per_second",
    "computed_prompt_tokens_per_second",
    "generation_tokens_per_second",
    "requests_per_second",
    "steps_per_second",
    "observed_age_seconds",
    "itl_mean_seconds",
    "prefill_mean_seconds",
    "prompt_tokens_mean",
    "generation_tokens_mean",
    "tracked_requests_at_sample",
    "tracked_tokens_at_sample",
)


_GENERATED: Final = _USED.index("generation_tokens_mean")


def _solve(sums: Floats, together: float = _TOGETHER) -> Floats:
    """(decode, prefill) factors of each pod, from sums[6][pods]. `together`: how much the two are drawn together, as a
    share of the samples' weight."""
    dd, dp, pp, d, p, samples = sums.sum(axis=1).tolist()
    if not samples > 0:
        return np.ones((2, sums.shape[1]))
    both = (d + p) / (dd + 2.0 * dp + pp)
    together *= dd + 2.0 * dp + pp
    dd_fleet, pp_fleet = dd + together, pp + together
    decode, prefill = _two(dd_fleet, dp, pp_fleet, d + (dd_fleet - dd) * both, p + (pp_fleet - pp) * both)
    # The fleet's equations, at the weight of FLEET_SAMPLES (or more, in doubt), come to those of each pod.
    own = sums[5]
    mean = (sums[0] + sums[2] + 1e-9) / np.maximum(own, 1e-9)
    share = FLEET_SAMPLES / (dd + pp) * np.where(own > 0.1, mean, (dd + pp) / samples)
    ddf, dpf, ppf = dd_fleet * share, dp * share, pp_fleet * share
    result: Floats = np.array(
        _two(
            sums[0] + ddf,
            sums[1] + dpf,
            sums[2] + ppf,
            sums[3] + ddf * decode + dpf * prefill,
            sums[4] + dpf * decode + ppf * prefill,
        )
    )
    return np.clip(result, 1.0 / _LIMIT, _LIMIT, out=result)


def _two(a: Any, b: Any, c: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Solves a u + b v = x, b u + c v = y."""
    determinant = a * c - b * b
    return (x * c - y * b) / determinant, (y * a - x * b) / determinant


def _known(value: float, otherwise: float) -> float:
    return value if isfinite(value) else otherwise


def _window_seconds(row: dict[str, float]) -> float:
    """What the sample's means are of, a minute at most."""
    return min(max(_known(row["window_seconds"], SENT_SECONDS), 0.0), SENT_SECONDS)


def _observe(pod: _Pod, prior: Prior, row: dict[str, float], attention: Attention) -> None:
    """Take one sample of a pod's metrics in. Its weight is the share of a minute that it shows the pod busy."""
    generated = row["generation_tokens_per_second"]
    itl = row["itl_mean_seconds"]
    if row["observed_age_seconds"] > 10.0 or not generated > 0:
        return  # nothing happened since: the means are old ones
    busy = min(max(_known(row["busy_ratio"], 1.0), 0.02), 1.0)
    hit = _known(row["hit_ratio"], 0.0)
    computed = _known(row["computed_prompt_tokens_per_second"], row["prompt_tokens_per_second"] * (1.0 - hit))
    computed = max(_known(computed, 0.0), 0.0)
    # The requests in flight are those that are being computed; what has finished may have been others.
    tracked = row["tracked_requests_at_sample"]
    prompt = row["tracked_tokens_at_sample"] / tracked if tracked > 0 else _known(row["prompt_tokens_mean"], 1000.0)
    context = prompt + _known(row["generation_tokens_mean"], 200.0) / 2
    per_request = prior.decode_request_seconds + context * prior.kv_token_seconds
    steps = row["steps_per_second"]
    pod.sums = tuple(_KEEP * x for x in pod.sums)  # type: ignore[assignment]
    minutes = _window_seconds(row) / SENT_SECONDS
    weight = busy * minutes
    cost = attention.cost(pod.sent)
    if steps > 0:
        seconds = busy / steps
        decode = (prior.step_seconds + generated / steps * per_request) / seconds
        prefill = computed / steps * prior.prefill_token_seconds / seconds
        attention.add(pod.sent, decode, prefill, weight)
        pod.add(decode, prefill * cost, weight)
        pod.evidence += minutes
        return
    computed *= cost
    decode = prior.step_seconds
    if itl > 0:
        decoding = max(generated * itl / busy, 1.0)
        decode += decoding * per_request
        others = computed / busy * prior.prefill_token_seconds * decoding / (1.0 + decoding)
        pod.add(decode / itl, others, weight)
        pod.evidence += minutes
    phase = row["prefill_mean_seconds"]
    if phase > 0:
        finished = row["requests_per_second"]
        tokens = computed / finished if finished > 0 else row["prompt_tokens_mean"] * (1.0 - hit)
        if tokens > 0:
            meanwhile = (tokens / phase + computed / busy) * prior.prefill_token_seconds
            pod.add(decode / phase, meanwhile, weight)
