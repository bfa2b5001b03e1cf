"""Prompt tokens that pods were promised and have not computed yet.

The ledger counts, per pod and over all processes, the tokens ever promised (`Entry.PROMISED`): sent to the pod and not
expected in its cache. Each process integrates from this what is still to do, as a fluid that drains at the pod's
prefill speed:

    backlog = max(0, backlog + newly promised - elapsed * drain)          [tokens]

What this process promised is entered at once; what others promised since it last looked is taken to have come evenly
over that time.

No message says when a prefill is done, so none can be lost. A wrong speed would let the backlog drift, which each poll
of the pod puts right: it can be no less than what the engine has waiting, and no more than about twice that, what was
sent since, and one prompt under way (an engine works at most one prompt over several steps).

Cost: 5 µs per decision over 64 pods.
"""

import numpy as np

from router.fleet import Candidates
from router.rates import Rates, Speeds
from state.pods import Floats, Ints

TICK_SECONDS = 0.001
"""The fluid drains in steps of at least this: within one, less is done than a short prompt has tokens."""


class Backlog:
    """One process's account, by slot. Shared by all models, since a pod may serve several."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.mean_tokens = rates.prior.uncached_tokens
        """Tokens that a request of late had to compute."""
        self.largest_tokens = 0.0
        """Of the requests of late."""
        self._at = 0.0
        self._tokens: Floats = np.zeros(0)
        self._drain: Floats = np.zeros(0)
        self._promised: Floats = np.zeros(0)
        self._generation: list[int] = []

    def follow(self, candidates: Candidates, speeds: Speeds, promised: Ints, now: float) -> Floats:
        """Tokens still to do on each candidate, not to be written to. `promised` is `candidates.promised()`."""
        select = speeds.select
        new = Backlog not in candidates.derived
        if new:
            candidates.derived[Backlog] = True
            self._admit(candidates, promised)
            self._drain[select] = speeds.drain
        more = promised - self._promised[select]
        self._promised[select] = promised
        self._tokens[select] += more
        elapsed = now - self._at
        if elapsed >= TICK_SECONDS:
            self._at = now
            left = self._drain * -elapsed
            left += self._tokens
            np.maximum(left, 0.0, out=self._tokens)
        if new and speeds.polled:
            self._correct(candidates, speeds)
        return self._tokens[select]

    def chose(self, slot: int, uncached_tokens: int) -> None:
        """This process sends a request that has so much to compute, and will charge the ledger with just that."""
        if slot < len(self._tokens):
            self._tokens[slot] += uncached_tokens
            self._promised[slot] += uncached_tokens
        self.mean_tokens += 0.02 * (uncached_tokens - self.mean_tokens)
        self.largest_tokens = max(self.largest_tokens * 0.999, uncached_tokens)

    def _admit(self, candidates: Candidates, promised: Ints) -> None:
        """Begin the account of pods not seen before."""
        missing = int(candidates.slots.max()) + 1 - len(self._tokens)
        if missing > 0:
            self._tokens = np.concatenate([self._tokens, np.zeros(missing)])
            self._drain = np.concatenate([self._drain, np.zeros(missing)])
            self._promised = np.concatenate([self._promised, np.zeros(missing)])
            self._generation += [0] * missing
        generations = self._generation
        for i, pod in enumerate(candidates.pods):
            slot = pod.slot
            if generations[slot] != pod.generation:
                generations[slot] = pod.generation
                self._tokens[slot] = 0.0
                self._promised[slot] = promised[i]

    def _correct(self, candidates: Candidates, speeds: Speeds) -> None:
        """Hold the account against what engines say is waiting."""
        waiting = candidates.metric("waiting").tolist()
        since = candidates.requests_since_sample().tolist()
        mean = self.mean_tokens
        for i in speeds.polled:
            if waiting[i] >= 0:
                slot = candidates.pods[i].slot
                least = waiting[i] * mean
                most = (2.0 * waiting[i] + since[i]) * mean + self.largest_tokens
                self._tokens[slot] = min(max(self._tokens[slot], least), max(most, least))
