"""How fast each pod is: learnt from its own metrics, with a stated prior.

An engine's step is taken to last

    a0 + (decoding requests) * per_request + (context tokens read) * per_kv_token + (prompt tokens computed) * per_token

seconds. The four rates of the prior were measured on nobody's machine: they are round figures of an 8B model on a
current GPU. What is learnt per pod is two factors on them, one for prefill and one for all decode rates, from what
every engine publishes:

    decode    time between tokens = factor * (a0 + d * per_request + d * context * per_kv_token), stretched by the
              share of time that prefills of other requests take; d = tokens generated per second * time between tokens
    prefill   tokens per second = hypot(u / t, v): u tokens computed per request in t seconds of its prefill phase,
              v tokens computed per second of busy time. Alone, u/t is the speed and v is little; saturated, many
              prompts share each step, and v is the speed. In between the sum of squares errs by less than 1.5.

Factors are averaged as logarithms, each new sample with weight 1/(samples + 1) and at least 0.1. A pod with few samples
is taken to be like its fleet, and a fleet with few samples like the prior (weight 2 samples each). A pod
that joins a running fleet is taken to be half as fast for prefills at first, and at full speed after WARM_UP_SECONDS:
engines compile, capture graphs and fill their own caches during their first requests.

It does not take more: with rates wrong by a factor of 2 (prefill) or 3 (decode) `marginal-delay` decides almost
as well.

Cost: 6 µs per pod that was polled, 25 µs per poll of any pod of the model; nothing per request.
"""

from dataclasses import dataclass
from math import exp, hypot, isfinite, log

import numpy as np

from router.fleet import Candidates
from state.pods import Floats, Ints

WARM_UP_SECONDS = 30.0
STALE_SECONDS = 15.0
"""Metrics older than this say nothing about the present load; speeds are kept."""
_PRIOR_SAMPLES = 2.0
_LIMIT = log(50.0)
FLEETS_KEPT = 256


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
        "decode_per_budget",
        "drain",
        "elsewhere",
        "fresh",
        "idle_step",
        "output_tokens",
        "polled",
        "prefill_seconds",
        "sampled_at",
        "select",
    )

    def __init__(self) -> None:
        self.select: slice | Ints
        """Picks the candidates' entries from arrays by slot."""
        self.prefill_seconds: Floats
        """Per prompt token."""
        self.drain: Floats
        """Prompt tokens per second."""
        self.decode: Floats
        """Factor on the prior's decode rates."""
        self.decode_per_budget: Floats
        """The same divided by the step's token budget."""
        self.idle_step: Floats
        """Seconds of a step, at factor 1, before this replica sends anything: a0, and reading what others sent."""
        self.elsewhere: Floats
        """Requests on the pod that this replica does not know of."""
        self.output_tokens = 0.0
        """Mean of a request."""
        self.polled: list[int] = []
        """Candidates with a sample not seen before."""
        self.sampled_at = 0.0
        """The median pod's last poll."""
        self.fresh = False
        """Whether that was less than STALE_SECONDS ago when the epoch began."""


class _Pod:
    __slots__ = ("decode", "decode_samples", "prefill", "prefill_samples", "seen")

    def __init__(self, now: float) -> None:
        self.seen = now
        self.prefill = 0.0  # logarithms of the factors
        self.decode = 0.0
        self.prefill_samples = 0
        self.decode_samples = 0


class Rates:
    """One process's knowledge of speeds. All processes learn the same from the same rows."""

    def __init__(self, prior: Prior | None = None) -> None:
        self.prior = prior or Prior()
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
            for i in out.polled:
                row = {name: float(column[i]) for name, column in zip(_USED, columns, strict=True)}
                fleet.observe(i, row, prior)
            lengths = columns[_GENERATED]
            lengths = lengths[lengths > 0]
            fleet.output_tokens = (float(lengths.sum()) + 0.5 * prior.output_tokens) / (len(lengths) + 0.5)
        factor, decode = fleet.factors(now)
        out.prefill_seconds = factor * prior.prefill_token_seconds
        out.drain = 1.0 / out.prefill_seconds
        out.decode = decode
        out.decode_per_budget = decode / prior.step_tokens
        out.output_tokens = fleet.output_tokens
        out.select = fleet.select
        out.sampled_at = float(np.partition(sampled, len(sampled) // 2)[len(sampled) // 2])
        out.fresh = now - out.sampled_at < STALE_SECONDS
        self._elsewhere(out, candidates, sampled, now)
        return out

    def _fleet(self, candidates: Candidates, now: float) -> "_Fleet":
        generations = tuple([pod.generation for pod in candidates.pods])
        found = self._fleets.get(generations)
        if found is None:
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
            slots = candidates.slots
            select = slice(0, len(pods)) if slots.tolist() == list(range(len(pods))) else slots
            found = self._fleets[generations] = _Fleet(pods, select, self.prior)
        return found

    def _elsewhere(self, out: Speeds, candidates: Candidates, sampled: Floats, now: float) -> None:
        """What engines count beyond what this replica had sent them: other gateways', or direct traffic."""
        counted = candidates.metric("running") + candidates.metric("waiting")
        extra = np.maximum(counted - candidates.metric("own_requests_at_sample"), 0.0)
        extra[np.isnan(extra) | (now - sampled > STALE_SECONDS)] = 0.0
        out.elsewhere = extra
        tokens = extra * np.nan_to_num(candidates.metric("prompt_tokens_mean"), nan=1000.0)
        out.idle_step = self.prior.step_seconds + tokens * self.prior.kv_token_seconds


class _Fleet:
    """What is known of one set of pods, in the order of the candidates."""

    __slots__ = ("_decode", "_logs", "_pods", "_prefill", "_samples", "_young", "output_tokens", "sampled_at", "select")

    def __init__(self, pods: list[_Pod], select: slice | Ints, prior: Prior) -> None:
        self._pods = pods
        self.select = select
        self.sampled_at: Floats = np.zeros(len(pods))
        self.output_tokens = prior.output_tokens
        self._young = max((pod.seen for pod in pods), default=0.0)
        self._logs: Floats = np.array([(pod.prefill, pod.decode) for pod in pods], float).T.copy()
        self._samples: Floats = np.array([(pod.prefill_samples, pod.decode_samples) for pod in pods], float).T.copy()
        self._prefill: Floats | None = None
        self._decode: Floats = np.zeros(0)

    def observe(self, i: int, row: dict[str, float], prior: Prior) -> None:
        """Take a sample of one pod in."""
        pod = self._pods[i]
        _observe(pod, prior, row)
        self._logs[0, i], self._logs[1, i] = pod.prefill, pod.decode
        self._samples[0, i], self._samples[1, i] = pod.prefill_samples, pod.decode_samples
        self._prefill = None

    def factors(self, now: float) -> tuple[Floats, Floats]:
        """On the prior's prefill and decode rates, for each pod."""
        if self._prefill is None:
            self._prefill, self._decode = _shrunk(self._logs, self._samples)
        if now - self._young >= WARM_UP_SECONDS:
            return self._prefill, self._decode
        ages = np.array([now - pod.seen for pod in self._pods])
        return self._prefill * (2.0 - np.clip(ages / WARM_UP_SECONDS, 0.0, 1.0)), self._decode


_USED = (
    "busy_ratio",
    "hit_ratio",
    "prompt_tokens_per_second",
    "computed_prompt_tokens_per_second",
    "generation_tokens_per_second",
    "requests_per_second",
    "observed_age_seconds",
    "itl_mean_seconds",
    "prefill_mean_seconds",
    "prompt_tokens_mean",
    "generation_tokens_mean",
)


_GENERATED = _USED.index("generation_tokens_mean")


def _shrunk(logarithms: Floats, samples: Floats) -> Floats:
    """Factors: each pod's mean drawn to the fleet's, and the fleet's to 1, by the weight of `_PRIOR_SAMPLES` each.
    Arrays of (prefill, decode) by pod."""
    total = logarithms * samples
    fleet = total.sum(axis=1) / (samples.sum(axis=1) + _PRIOR_SAMPLES)
    total += (_PRIOR_SAMPLES * fleet)[:, None]
    total /= samples + _PRIOR_SAMPLES
    result: Floats = np.exp(total, out=total)
    return result


def _known(value: float, otherwise: float) -> float:
    return value if isfinite(value) else otherwise


def _observe(pod: _Pod, prior: Prior, row: dict[str, float]) -> None:
    """Take one sample of a pod's metrics into its factors."""
    generated = row["generation_tokens_per_second"]
    itl = row["itl_mean_seconds"]
    if row["observed_age_seconds"] > 10.0 or not generated > 0:
        return  # nothing happened since: the means are old ones
    busy = min(max(_known(row["busy_ratio"], 1.0), 0.05), 1.0)
    hit = _known(row["hit_ratio"], 0.0)
    computed = _known(row["computed_prompt_tokens_per_second"], row["prompt_tokens_per_second"] * (1.0 - hit))
    computed = max(_known(computed, 0.0), 0.0) / busy
    context = _known(row["prompt_tokens_mean"], 1000.0) + _known(row["generation_tokens_mean"], 200.0) / 2
    step = prior.step_seconds
    if itl > 0:
        decoding = max(generated * itl / busy, 1.0)
        step += decoding * (prior.decode_request_seconds + context * prior.kv_token_seconds)
        prefill_share = min(computed * prior.prefill_token_seconds * exp(pod.prefill), 0.9)
        others = prefill_share * decoding / (1.0 + decoding)
        pod.decode = _average(pod.decode, log(itl * (1.0 - others) / step), pod.decode_samples)
        pod.decode_samples = min(pod.decode_samples + 1, 30)
    phase = row["prefill_mean_seconds"]
    if phase > 0:
        finished = row["requests_per_second"]
        tokens = computed * busy / finished if finished > 0 else row["prompt_tokens_mean"] * (1.0 - hit)
        alone = max(phase - step * exp(pod.decode), 0.3 * phase)
        speed = hypot(_known(tokens, 0.0) / alone, computed)
        # Of short prompts the step takes most of the time: all they say is that the pod is at least so fast.
        if speed > 0 and (tokens >= 256 or speed * prior.prefill_token_seconds * exp(pod.prefill) > 1.0):
            pod.prefill = _average(pod.prefill, -log(speed * prior.prefill_token_seconds), pod.prefill_samples)
            pod.prefill_samples = min(pod.prefill_samples + 1, 30)


def _average(mean: float, value: float, samples: int) -> float:
    return mean + (min(max(value, -_LIMIT), _LIMIT) - mean) * max(1.0 / (samples + 1), 0.1)
