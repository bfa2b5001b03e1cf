"""What a prompt token costs to compute, depending on how many stand before it.

Matrix products cost the same for every token; attention compares each with all that stand before it. So the last u
tokens of a prompt of P take

    u * (1 + pair * (P - u / 2)) * seconds of a prompt's first token

with (P - u / 2) tokens before one of them, on average. By the operations, `pair` is about 3 * layers * hidden size /
weights: 5e-5 per token for 8B and 14B models, 3e-5 for 70B, so that in a prompt of 100,000 tokens the mean token takes
two to four times as long as in a short one. It is learnt, since kernels, models and GPUs differ, from 0 on: the least
squares solution of

    measured seconds = decode seconds * a + prefill seconds * b + prefill seconds * tokens before * c,  pair = c / b

over the fleet's samples (`router.rates`, whose seconds by the prior these are), where the tokens before are those of
what was sent to the pod in about the last minute, the time over which metrics are means. Pods have long and short
prompts at different times, which tells c from b. Where prefill takes little of the time, or all prompts are alike, c is
drawn to 0: it does not matter there.

All else counts in tokens of the mean cost, so that speeds mean the same with and without.
"""

from math import exp
from typing import Final

KEPT_SAMPLES: Final = 250.0
"""Of each pod: minutes."""
SENT_SECONDS: Final = 60.0
"""What the metrics are means of."""
DRAWN: Final = 0.002
"""To 0: as much as that share of the samples' weight, had they been nothing but prefill."""
DOUBTED_SAMPLES: Final = 100.0
"""So many samples more are drawn to 0."""
MOST: Final = 2e-4


class Sent:
    """What a pod was sent of late."""

    __slots__ = ("heard", "pairs", "tokens")

    def __init__(self) -> None:
        self.tokens = 0.0
        """To compute."""
        self.pairs = 0.0
        """Of one of these and one before it in its prompt."""
        self.heard = 0
        """The number of the last record of the prefix log that is in it."""

    def add(self, prompt: float, uncached: float) -> None:
        """A prompt, of which the last `uncached` tokens are to compute."""
        self.tokens += uncached
        self.pairs += uncached * (prompt - 0.5 * uncached)

    def fade(self, seconds: float) -> None:
        """So much time has passed."""
        kept = exp(-seconds / SENT_SECONDS)
        self.tokens *= kept
        self.pairs *= kept


class Attention:
    """What attention adds to a fleet's prefills."""

    __slots__ = ("_keep", "_mean", "_samples", "_sums", "flat", "slope")

    def __init__(self, pods: int) -> None:
        self._keep = 1.0 - 1.0 / (KEPT_SAMPLES * max(pods, 1))
        self._mean = (0.0, 0.0)
        """Tokens and pairs that pods were sent."""
        self._samples = 0.0
        self._sums: tuple[float, ...] = (0.0,) * 9
        """Of d*d, d*p, d*q, p*p, p*q, q*q, d, p and q, with weight 1 / (d + p): d and p are a sample's decode and
        prefill seconds by the prior, divided by the seconds measured, q is p times the tokens before."""
        self.flat = 1.0
        self.slope = 0.0
        """A token costs flat + slope * (tokens before it), in tokens of the mean cost."""

    def copy(self, pods: int) -> "Attention":
        """What is known so far, for a fleet of so many pods."""
        made = Attention(pods)
        made._mean, made._samples, made._sums = self._mean, self._samples, self._sums
        made.flat, made.slope = self.flat, self.slope
        return made

    def cost(self, sent: Sent) -> float:
        """Of the mean token that a pod was sent."""
        return self.flat + self.slope * sent.pairs / sent.tokens if sent.tokens > 0 else 1.0

    def add(self, sent: Sent, decode: float, prefill: float, weight: float) -> None:
        """A sample of a pod: decode and prefill seconds by the prior over the seconds measured."""
        if not sent.tokens > 0:
            return
        keep, before = self._keep, sent.pairs / sent.tokens
        evened = weight / (decode + prefill)
        d, p, q = evened * decode, evened * prefill, evened * prefill * before
        new = (d * decode, d * prefill, d * prefill * before, p * prefill, q * prefill, q * prefill * before, d, p, q)
        self._sums = tuple([keep * old + more for old, more in zip(self._sums, new, strict=True)])
        self._samples = keep * self._samples + weight
        tokens, pairs = self._mean
        self._mean = keep * tokens + sent.tokens, keep * pairs + sent.pairs

    def solve(self) -> None:
        """Work out `flat` and `slope` anew."""
        tokens, pairs = self._mean
        dd, dp, dq, pp, pq, qq, d, p, q = self._sums
        if not (tokens > 0 and dd > 0):
            return
        mean = pairs / tokens
        qq += DRAWN * (self._samples + DOUBTED_SAMPLES) * mean * mean
        # Without decoding, two equations are left.
        pp -= dp * dp / dd
        pq -= dp * dq / dd
        qq -= dq * dq / dd
        p -= dp * d / dd
        q -= dq * d / dd
        b, c = qq * p - pq * q, pp * q - pq * p
        pair = min(max(c / b, 0.0), MOST) if b > 0 else 0.0
        self.flat = 1.0 / (1.0 + pair * mean)
        self.slope = pair * self.flat
