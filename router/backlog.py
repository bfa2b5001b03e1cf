"""Prompt tokens that pods were promised and have not computed yet.

Whoever sends a prompt to a pod says, in its own row of the ledger, when the pod will be done with it: at the pod's
prefill speed, after everything it was promised before. The latest of all rows counts, so each process sees what any
other has promised, and

    backlog = max(0, busy until - now) * prefill speed          [tokens]

needs no history: a process that starts knows as much as the others, and one that dies leaves nothing to clear.

What a step takes besides its prompts is promised with them. A prompt that finds others there waits for a step of its
own, or shares it with those that come meanwhile. A long one takes several.

No message says when a prefill is done, so none can be lost. That a speed is wrong, or a prompt was cached after all,
shows in each poll of the pod, and bounds the backlog from both sides: it is no less than what the engine has waiting,
and no more than about twice that, the tokens sent since, and one prompt under way (an engine spreads at most one
prompt over several steps), which there cannot be where nothing runs and nothing was on its way.

Cost: 3 µs per decision over 64 pods.
"""

from math import inf
from typing import Final

import numpy as np

from router.fleet import Candidates
from router.rates import Rates, Speeds
from state.pods import Floats

FIRST_STEPS: Final = 1.5
"""A prompt that finds none before it waits for half a step, and its own takes as long as the decoding in it besides."""


class Backlog:
    """One process's view, for all models."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.mean_tokens = rates.prior.uncached_tokens
        """Tokens that a request of late had to compute."""
        self.mean_prompt = rates.prior.uncached_tokens
        """Tokens that it had, those found in caches included."""
        self.largest_tokens = 0.0
        """Of the requests of late."""

    def follow(self, candidates: Candidates, speeds: Speeds, now: float) -> Floats:
        """Tokens still to do on each candidate."""
        until = candidates.busy_until()
        todo = until - now
        correction = self.correction(candidates, speeds, now)
        if correction.any:
            todo -= np.where(correction.since > now, correction.seconds, 0.0)
        todo *= speeds.prefill_tokens_per_second
        return np.maximum(todo, 0.0, out=todo)

    def correction(self, candidates: Candidates, speeds: Speeds, now: float) -> "BacklogCorrection":
        """By how much the account is too high, seen from the last polls; worked out once per epoch."""
        found: BacklogCorrection | None = candidates.derived.get(Backlog)
        if found is None:
            found = candidates.derived[Backlog] = self._hold_against_poll(
                candidates, speeds, candidates.busy_until(), now
            )
        return found

    def promise(
        self,
        candidates: Candidates,
        index: int,
        uncached_tokens: float,
        prefill_seconds: float,
        now: float,
        step_seconds: float = 0.0,
        until: float | None = None,
        prompt_tokens: float = 0.0,
        prompts_per_step: float = inf,
    ) -> float:
        """A request is sent to candidate `index` that has so much to compute. `prefill_seconds`: what a token takes
        there; `step_seconds`: what a step of the pod takes without any prompt; `until`: when it will have done what it
        was promised, where the caller knows; `prompt_tokens`: all of the prompt; `prompts_per_step`: of those that come
        while others are computed. Returns when it will have done this too."""
        self.mean_tokens += 0.02 * (uncached_tokens - self.mean_tokens)
        self.mean_prompt += 0.02 * (max(prompt_tokens, uncached_tokens) - self.mean_prompt)
        self.largest_tokens = max(self.largest_tokens * 0.999, uncached_tokens)
        if until is None:
            until = float(candidates.busy_until()[index])
        steps = uncached_tokens / self.rates.prior.step_tokens
        if until <= now:
            until = now
            steps += FIRST_STEPS
        else:
            steps = max(steps, 1.0 / max(prompts_per_step, 1.0))
        until += uncached_tokens * prefill_seconds + steps * step_seconds
        candidates.occupy(index, until)
        return until

    def _hold_against_poll(
        self, candidates: Candidates, speeds: Speeds, until: Floats, now: float
    ) -> "BacklogCorrection":
        """What engines say is waiting: raise the account where it is too low, and find where it is too high."""
        waiting = candidates.metric("waiting")
        tokens = self.mean_tokens
        sampled = candidates.metric("sampled_at")
        for i in speeds.polled:
            if waiting[i] > 0:
                least = float(sampled[i] + waiting[i] * tokens * speeds.prefill_seconds[i])
                if least > max(until[i], now):
                    candidates.occupy(i, least)
        there = np.maximum(candidates.metric("running"), candidates.metric("tracked_requests_at_sample"))
        most = 2.0 * waiting * tokens + np.where(there == 0, 0.0, self.largest_tokens + tokens)
        most += candidates.promised() - candidates.metric("tracked_promised_at_sample")
        return BacklogCorrection(until, np.maximum(until - (now + most * speeds.prefill_seconds), 0.0))


class BacklogCorrection:
    """By how many seconds the account of each pod is too high, for as long as what was promised by then may last."""

    __slots__ = ("any", "seconds", "since")

    def __init__(self, since: Floats, seconds: Floats) -> None:
        self.since = since
        self.seconds = np.nan_to_num(seconds)
        self.any = bool(self.seconds.any())
