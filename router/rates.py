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
    __slots__ = ("decode", "decode_samples", "generation", "prefill", "prefill_samples", "sampled_at", "seen")

    def __init__(self, generation: int, now: float) -> None:
        self.generation = generation
        self.seen = now
        self.sampled_at = 0.0
        self.prefill = 0.0  # logarithms of the factors
        self.decode = 0.0
        self.prefill_samples = 0
        self.decode_samples = 0


class Rates:
    """One process's knowledge of speeds. All processes learn the same from the same rows."""

    def __init__(self, prior: Prior | None = None) -> None:
        self.prior = prior or Prior()
        self._pods: dict[int, _Pod] = {}
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
        out = Speeds()
        sampled = candidates.metric("sampled_at").tolist()
        pods: list[_Pod] = []
        metrics: dict[str, list[float]] | None = None
        for i, pod in enumerate(candidates.pods):
            known = self._pods.get(pod.slot)
            if known is None or known.generation != pod.generation:
                # The fleet that this process finds is not new, even if the process is.
                known = self._pods[pod.slot] = _Pod(pod.generation, now if now > self._since else -1e9)
            if sampled[i] > known.sampled_at:
                known.sampled_at = sampled[i]
                out.polled.append(i)
                if metrics is None:
                    metrics = {name: candidates.metric(name).tolist() for name in _USED}
                _observe(known, prior, {name: metrics[name][i] for name in _USED})
            pods.append(known)
        prefill_fleet = _fleet([pod.prefill for pod in pods], [pod.prefill_samples for pod in pods])
        decode_fleet = _fleet([pod.decode for pod in pods], [pod.decode_samples for pod in pods])
        n = len(pods)
        prefill = np.empty(n)
        decode = np.empty(n)
        for i, known in enumerate(pods):
            k = known.prefill_samples
            factor = exp((k * known.prefill + _PRIOR_SAMPLES * prefill_fleet) / (k + _PRIOR_SAMPLES))
            age = now - known.seen
            if age < WARM_UP_SECONDS:
                factor *= 2.0 - age / WARM_UP_SECONDS
            prefill[i] = factor
            k = known.decode_samples
            decode[i] = exp((k * known.decode + _PRIOR_SAMPLES * decode_fleet) / (k + _PRIOR_SAMPLES))
        out.prefill_seconds = prefill * prior.prefill_token_seconds
        out.drain = 1.0 / out.prefill_seconds
        out.decode = decode
        out.decode_per_budget = decode / prior.step_tokens
        lengths = [x for x in candidates.metric("generation_tokens_mean").tolist() if x > 0]
        out.output_tokens = (sum(lengths) + 0.5 * prior.output_tokens) / (len(lengths) + 0.5)
        slots = candidates.slots
        out.select = slice(0, n) if slots.tolist() == list(range(n)) else slots
        out.sampled_at = sorted(sampled)[n // 2]
        out.fresh = now - out.sampled_at < STALE_SECONDS
        self._elsewhere(out, candidates, np.array(sampled), now)
        return out

    def _elsewhere(self, out: Speeds, candidates: Candidates, sampled: Floats, now: float) -> None:
        """What engines count beyond what this replica had sent them: other gateways', or direct traffic."""
        counted = candidates.metric("running") + candidates.metric("waiting")
        extra = np.maximum(counted - candidates.metric("own_requests_at_sample"), 0.0)
        extra[np.isnan(extra) | (now - sampled > STALE_SECONDS)] = 0.0
        out.elsewhere = extra
        tokens = extra * np.nan_to_num(candidates.metric("prompt_tokens_mean"), nan=1000.0)
        out.idle_step = self.prior.step_seconds + tokens * self.prior.kv_token_seconds


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


def _fleet(values: list[float], samples: list[int]) -> float:
    """Weighted mean, with the prior (0, the logarithm of 1) as `_PRIOR_SAMPLES` more."""
    return sum(value * k for value, k in zip(values, samples, strict=True)) / (sum(samples) + _PRIOR_SAMPLES)


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
