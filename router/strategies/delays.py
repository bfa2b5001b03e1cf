"""`MarginalDelay`'s formula for all pods at once and for one. Not a strategy itself.

    score = fixed + (M + F + u / budget) * step + (M + F) * (prefill_interference + (r + P * k) * shared) + c * price
            + (u + c * (1 + N)) * prefill + u * (1 + N) * loss

is the strategy's formula with what concerns the request taken out of the brackets: P, u, c and M are its prompt, its
uncached, its scarce and its output tokens (except in u / budget and u * (1 + N), u and c are in tokens of the mean
cost, so multiplied by flat + slope * (P - u / 2)); F are the output tokens of those that will follow it; r and k are
the prior's rates per request and per KV token. What is left, seven numbers per pod, is kept from decision to decision
and worked out anew once in KEPT_SECONDS. In between, what this process charges to a pod, for whatever model and by
whatever strategy, is added to that pod's numbers, and so is what it hears from the prefix log that other workers have
sent. So a decision is seven multiplications per pod, in a compiled loop: for some dozens of pods a call of numpy takes
longer, mostly to get its code into the processor's cache.
"""

from math import inf
from random import Random
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from router.attention import SENT_SECONDS
from router.backlog import FIRST_STEPS, Backlog, BacklogCorrection
from router.fleet import Candidates
from router.prefix_index import MAX_HEARD, PrefixIndex
from router.rates import Speeds
from state.pods import Floats

KEPT_SECONDS: Final = 0.01
"""How old finished requests and finished prefills may be."""
LEAD_SECONDS: Final = 0.0002
"""By how much a record may be older than the charge that it stands for."""
MAX_APPLIED: Final = 64
"""More is worked out anew."""
MAX_BUSY: Final = 0.98
"""With prefills, of a pod's time: more than all of it may have been promised."""
MIN_FORGOTTEN: Final = 0.1
"""Of what pods hold. Less is not worth looking for."""
MIN_UNSEEN: Final = 0.3
"""Fewer requests from elsewhere are no other replica: direct traffic, or polls and ledger that do not quite agree."""
JITTER_SECONDS: Final = 1e-9
"""Chance between equal pods."""
_JITTERS: Final = 1024


class Chance:
    """Tells equal pods apart: a table of jitters, read from another place each time."""

    def __init__(self, random: Random) -> None:
        self._random = random.random
        self._table = np.array([random.random() for _ in range(_JITTERS)]) * JITTER_SECONDS

    def draw(self, n: int) -> Floats:
        """Seconds, for n pods."""
        while n > len(self._table) // 2:
            self._table = np.concatenate([self._table, self._table])
        start = int(self._random() * (len(self._table) - n))
        return self._table[start : start + n]


class PodTerms:
    """What is kept of one pod: the seven numbers of its score, what they are made of, and what they change by when it
    is sent a request. Plain numbers of an object of its own: compiled, that is the cheapest way to read and write
    them."""

    __slots__ = (
        "answer",
        "bit",
        "busy_until",
        "capacity_wait",
        "decode",
        "elsewhere",
        "fixed",
        "full",
        "growth",
        "idle_step",
        "index",
        "kv_share_per_token",
        "kv_wait_base",
        "kv_wait_per_token",
        "loss",
        "max_requests",
        "prefill",
        "prefill_interference",
        "prefill_tokens_per_second",
        "price",
        "requests",
        "score",
        "served",
        "share_per_request",
        "shared",
        "slot",
        "smoothed_requests",
        "smoothed_tokens",
        "step",
        "token_interval",
        "tokens",
        "wait",
        "wait_for_slot",
    )

    def __init__(self, index: int, slot: int) -> None:
        self.score = 0.0
        """Seconds: of the request that was asked for last."""
        # The seven numbers of the score.
        self.fixed = 0.0
        """Seconds that any request costs there: the wait for the prefills promised, and what that says of slack."""
        self.step = 0.0
        """Seconds of an engine step."""
        self.prefill_interference = 0.0
        """Seconds per token of an answer, that others' prefills add to a step."""
        self.price = 0.0
        """Seconds per token of prefill, that it costs those whose answers it interrupts and those that wait for it."""
        self.shared = 0.0
        """Number of requests that decode there, times `decode`: those that a longer step delays."""
        self.prefill = 0.0
        """Seconds per prompt token of the mean cost."""
        self.loss = 0.0
        """Seconds per uncached token: to prefill again what it pushes out of the cache."""
        # How long there is no room for a request beyond the prefills before it.
        self.capacity_wait = 0.0
        """Seconds that the request asked for last would wait for a slot or for its tokens' room in the KV cache, not
        counting `wait`; 0 where there is room."""
        self.kv_wait_base = 0.0
        """Seconds that a prompt of no tokens would wait for room in the KV cache, not counting `wait`; negative where
        there is room."""
        self.kv_wait_per_token = 0.0
        """Seconds per prompt token that come to `kv_wait_base`."""
        self.wait_for_slot = 0.0
        """Seconds that a request would wait to be one of `max_requests`, not counting `wait`; negative where it would
        not."""
        self.full = False
        """Yes or no: whether `capacity_wait` is more than 0."""
        # What the numbers above are made of.
        self.requests = 0.0
        """Number of requests in flight, others' than this gateway's included."""
        self.served = 0.0
        """Number of requests, of those in flight, that the pod has slots and room for."""
        self.tokens = 0.0
        """Prompt tokens of the requests in flight."""
        self.busy_until = 0.0
        """Monotonic seconds: when it will have done the prefills promised to it."""
        self.wait = 0.0
        """Seconds until then, as worked out last."""
        self.answer = 0.0
        """Seconds that a mean answer takes."""
        self.growth = 0.0
        """Ratio: by how much of itself a step grows with the prefills that it was promised of late."""
        # As in `Speeds`, zero where nobody's is known.
        self.kv_share_per_token = 0.0
        """1 / prompt tokens: the share of the KV cache that one takes."""
        self.share_per_request = 0.0
        """1 / requests: the share of its slots that one takes."""
        self.max_requests = inf
        """Number of requests that it can run at once: 1 / share_per_request."""
        self.decode = 0.0
        """Factor on the prior's decode rates."""
        self.prefill_tokens_per_second = 0.0
        """Prompt tokens of the mean cost, per second."""
        self.token_interval = 0.0
        """Seconds from token to token of late, by its own metrics."""
        self.elsewhere = 0.0
        """Number of requests there that this gateway does not know of."""
        self.idle_step = 0.0
        """Seconds of a step, at factor 1, without this gateway's requests."""
        self.smoothed_requests = 0.0
        """Number of requests in flight, averaged over the last seconds."""
        self.smoothed_tokens = 0.0
        """Prompt tokens of those, averaged alike."""
        # Which pod it is.
        self.index = index
        """Index among the candidates."""
        self.slot = slot
        """Row of the tables."""
        self.bit = 1 << slot
        """Bitmap with that row's bit set."""


class Delays:
    """What a request costs on each candidate, for one epoch of their metrics."""

    def __init__(self, candidates: Candidates, speeds: Speeds, backlog: Backlog, chance: Chance) -> None:
        self._n = len(candidates.pods)
        prior = backlog.rates.prior
        self.speeds = speeds
        self._candidates = candidates
        self._backlog = backlog
        self._chance = chance
        self._per_request, self._per_token = prior.decode_request_seconds, prior.kv_token_seconds
        self._budget = prior.step_tokens
        # Of a running request half of the output is there, on average.
        self._of_request = self._per_request + 0.5 * speeds.output_tokens * self._per_token
        self._most_kv_share = float(speeds.kv_share_per_token.max()) if speeds.kv_share_per_token is not None else 0.0
        self._kv_known, self._slots_known = speeds.kv_share_per_token is not None, speeds.share_per_request is not None
        self._fullest = self._most_taken = 0.0
        self._full = 0
        """Those that are `PodTerms.full`, as a bitmap of their rows."""
        self._pods = [PodTerms(index, pod.slot) for index, pod in enumerate(candidates.pods)]
        self._pod_at = {pod.slot: pod for pod in self._pods}
        self._flat, self._slope, self._sent = speeds.flat, speeds.slope, speeds.sent
        self._learn(speeds)
        self._mean_tokens = 1.0
        self._price_of_all = 1.0
        self.slack = 0.0
        """Share of the pods where nobody waits."""
        self.worth = 0.0
        """What a copy made now is good for, from 0 to 1: the slack there is, times what the prompts of late found in
        relation to what they computed, if that is less than 1."""
        self.busy = 0
        """Those that were promised prefill which is not yet done, as a bitmap of their rows."""
        self._per_new = 0.0
        self._output = 0.0
        self._per_answer = 0.0
        self._cost_of_last = 1.0
        self._recomputed_at = -inf
        self._charges = candidates.ledger.charges
        self._heard = 0
        self.unseen = 0.0
        """Share of the requests in flight that others have sent; 0 where it is small."""
        self.forgotten = 0.0
        """Share of what the pods hold for which the prefix index had no room; 0 where it is small."""
        self._keys: npt.NDArray[np.uint64] | None = None

    def keys(self) -> npt.NDArray[np.uint64]:
        """A number for each pod, the same in all replicas."""
        if self._keys is None:
            self._keys = np.array([xxh3_64_intdigest(pod.address.encode()) for pod in self._candidates.pods], np.uint64)
        return self._keys

    def _learn(self, speeds: Speeds) -> None:
        """Hand each pod what is known of it."""
        prefill: list[float] = speeds.prefill_seconds.tolist()
        tokens_per_second: list[float] = speeds.prefill_tokens_per_second.tolist()
        decode: list[float] = speeds.decode.tolist()
        token_interval: list[float] = speeds.token_interval.tolist()
        elsewhere: list[float] = speeds.elsewhere.tolist()
        idle_step: list[float] = speeds.idle_step.tolist()
        smoothed_requests: list[float] = speeds.smoothed_loads[0].tolist()
        smoothed_tokens: list[float] = speeds.smoothed_loads[1].tolist()
        kv_share = share = [0.0] * self._n
        if speeds.kv_share_per_token is not None:
            kv_share = speeds.kv_share_per_token.tolist()
        if speeds.share_per_request is not None:
            share = speeds.share_per_request.tolist()
        for pod in self._pods:
            i = pod.index
            pod.prefill, pod.prefill_tokens_per_second, pod.decode = prefill[i], tokens_per_second[i], decode[i]
            pod.token_interval, pod.elsewhere, pod.idle_step = token_interval[i], elsewhere[i], idle_step[i]
            pod.smoothed_requests, pod.smoothed_tokens = smoothed_requests[i], smoothed_tokens[i]
            pod.kv_share_per_token, pod.share_per_request = kv_share[i], share[i]
            if self._slots_known:
                pod.max_requests = 1.0 / max(pod.share_per_request, 1e-6)
            sent = self._sent[i]
            busy = (self._flat * sent.tokens + self._slope * sent.pairs) * pod.prefill / SENT_SECONDS
            busy = min(busy, MAX_BUSY)
            pod.growth = busy / (1.0 - busy)

    def refresh(self, now: float, prefixes: PrefixIndex | None) -> None:
        """Take in what has changed: all of it when that was last done too long ago, else what this process has charged
        (for whatever model and strategy) and what it has heard of other workers."""
        ledger = self._candidates.ledger
        charged = ledger.charges - self._charges
        heard = prefixes.heard_count - self._heard if prefixes is not None else 0
        if heard and prefixes is not None:
            self._hear(prefixes, min(heard, MAX_HEARD))
        if not 0.0 <= now - self._recomputed_at < KEPT_SECONDS or charged > MAX_APPLIED or heard > MAX_APPLIED:
            self._recomputed_at = now
            self._recompute(now, prefixes)
        elif charged or heard:
            for number in range(-charged, 0):
                slot, tokens, uncached = ledger.charged[number]
                pod = self._pod_at.get(slot)
                if pod is not None:
                    cost = self._flat + self._slope * (tokens - 0.5 * uncached)
                    self._apply_charge(pod, tokens, uncached * cost * pod.prefill)
            if heard and prefixes is not None:
                for number in range(-heard, 0):
                    slot, size, new, at = prefixes.heard[number]
                    pod = self._pod_at.get(slot)
                    if pod is not None and at >= self._recomputed_at - LEAD_SECONDS:
                        prompt = size / prefixes.bytes_per_token
                        seconds = self.speeds.cost(prompt, new / prefixes.bytes_per_token) * pod.prefill
                        pod.busy_until = max(pod.busy_until, now) + seconds
                        self._apply_charge(pod, prompt, seconds)
        self._charges = ledger.charges
        if prefixes is not None:
            self._heard = prefixes.heard_count

    def _hear(self, prefixes: PrefixIndex, count: int) -> None:
        """Note what prompts other workers have sent, each once, however many ask: it is for all epochs and models."""
        for number in range(-count, 0):
            slot, size, new, _ = prefixes.heard[number]
            pod = self._pod_at.get(slot)
            if pod is not None:
                sent = self._sent[pod.index]
                if sent.heard <= prefixes.heard_count + number:
                    sent.heard = prefixes.heard_count + number + 1
                    sent.add(size / prefixes.bytes_per_token, new / prefixes.bytes_per_token)

    def _recompute(self, now: float, prefixes: PrefixIndex | None) -> None:
        """Work everything out anew."""
        self._take_loads(now)
        self._weigh_slack()
        unseen = self.speeds.share_elsewhere
        self.unseen = unseen if unseen > MIN_UNSEEN else 0.0
        forgotten = prefixes.forgotten() if prefixes is not None else 0.0
        self.forgotten = forgotten if forgotten > MIN_FORGOTTEN else 0.0
        self._set_coefficients(prefixes)

    def _take_loads(self, now: float) -> None:
        """Each pod's load, steps and waits, as ledger and polls have them now."""
        candidates, speeds, pods = self._candidates, self.speeds, self._pods
        correction = self._backlog.correction(candidates, speeds, now)
        loads, until = candidates.loads(), candidates.busy_until()
        requests: list[int] = loads[0].tolist()
        tokens: list[int] = loads[1].tolist()
        busy_until: list[float] = until.tolist()
        output_tokens = speeds.output_tokens
        self._fullest = self._most_taken = 0.0
        for pod in pods:
            index = pod.index
            pod.requests = requests[index] + pod.elsewhere
            pod.tokens = float(tokens[index])
            pod.busy_until = busy_until[index]
            pod.wait = max(pod.busy_until - now, 0.0)
            # What decodes is taken to be half of what there is now and half of what there was of late.
            decoding = 0.5 * (requests[index] + pod.smoothed_requests) + pod.elsewhere
            context = 0.5 * (pod.tokens + pod.smoothed_tokens)
            pod.shared = decoding * pod.decode
            pod.step = (decoding * self._of_request + context * self._per_token + pod.idle_step) * pod.decode
            pod.answer = max(pod.step, pod.token_interval) * output_tokens
        if correction.any:
            self._apply_poll_correction(correction, now)
        for pod in pods:
            if self._kv_known:
                pod.kv_wait_per_token = pod.kv_share_per_token * pod.answer
                filled = pod.tokens * pod.kv_share_per_token
                self._fullest = max(self._fullest, filled)
                pod.kv_wait_base = (filled - 1.0) * pod.answer - pod.wait
            if self._slots_known:
                taken = (pod.requests + 1.0) * pod.share_per_request
                self._most_taken = max(self._most_taken, taken)
                pod.wait_for_slot = (taken - 1.0) * pod.answer - pod.wait

    def _weigh_slack(self) -> None:
        """What concerns all pods: which are busy, the slack there is, and the requests that a pod serves."""
        mean_tokens = self._mean_tokens = max(self._backlog.mean_tokens, 1.0)
        typical = mean_tokens * self._pods[0].prefill
        may_be_full = self.may_be_full(mean_tokens)
        slack = all_served = 0.0
        self.busy = 0
        for pod in self._pods:
            wait = pod.wait
            if wait > 0.0:
                self.busy |= pod.bit
            if may_be_full:
                wait += max(max(pod.kv_wait_base + mean_tokens * pod.kv_wait_per_token, pod.wait_for_slot), 0.0)
            slack += typical / (wait + typical)
            pod.served = min(pod.requests, pod.max_requests)
            if self._fullest > 1.0:
                pod.served = min(pod.served, pod.requests / max(pod.tokens * pod.kv_share_per_token, 1.0))
            all_served += pod.served
        self.slack = slack / self._n
        self._price_of_all = 1.0 + all_served / self._n
        mean_prompt = max(self._backlog.mean_prompt, mean_tokens)
        self.worth = self.slack * min(mean_prompt / mean_tokens - 1.0, 1.0)
        self._per_new = self.slack * self.speeds.output_tokens * (1.0 / mean_tokens - 1.0 / mean_prompt)

    def _set_coefficients(self, prefixes: PrefixIndex | None) -> None:
        """Of each pod's seven numbers those that are made of the above."""
        slack, mean_tokens = self.slack, self._mean_tokens
        chances: list[float] = self._chance.draw(self._n).tolist()
        for pod in self._pods:
            wait, half = pod.wait, 0.5 * pod.served
            waiting = min(wait * pod.prefill_tokens_per_second / mean_tokens, pod.requests)
            pod.price = (half + slack * waiting) * pod.prefill
            pod.fixed = (1.0 + slack * half) * wait + chances[pod.index]
            if wait == 0.0:
                pod.fixed += pod.step * FIRST_STEPS
            pod.prefill_interference = 0.5 * slack * min(pod.step * pod.growth, self._budget * pod.prefill)
            if prefixes is not None:
                pod.loss = prefixes.recompute_per_token[pod.slot] * pod.prefill * (1.0 - slack)

    def _apply_poll_correction(self, correction: BacklogCorrection, now: float) -> None:
        """Waits that the last polls show to be shorter."""
        since: list[float] = correction.since.tolist()
        seconds: list[float] = correction.seconds.tolist()
        for pod in self._pods:
            if since[pod.index] > now:
                pod.wait = max(pod.busy_until - now - seconds[pod.index], 0.0)

    def promise(self, index: int, prompt: float, uncached: float, now: float) -> None:
        """This process sends a prompt to a pod: say when the pod will have done its prefill."""
        pairs = uncached * (prompt - 0.5 * uncached)
        sent, pod = self._sent[index], self._pods[index]
        # A step takes step / (1 - r) where prompts take the share r of all time, and r / prefill are as many a second.
        meanwhile = pod.growth * pod.step / (self._mean_tokens * pod.prefill)
        sent.tokens += uncached
        sent.pairs += pairs
        pod.busy_until = self._backlog.promise(
            self._candidates,
            index,
            self._flat * uncached + self._slope * pairs,
            pod.prefill,
            now,
            pod.step,
            pod.busy_until,
            prompt * (self._flat + 0.5 * self._slope * prompt),
            meanwhile,
        )

    def _apply_charge(self, pod: PodTerms, tokens: float, longer: float) -> None:
        """A request more, and so many seconds of prefill: to first order what that changes."""
        if longer > 0.0:
            self.busy |= pod.bit
        pod.fixed += longer * (1.0 + 0.5 * self.slack * pod.requests)
        pod.step += 0.5 * pod.decode * (self._of_request + tokens * self._per_token)
        pod.price += 0.5 * pod.prefill + self.slack * longer / self._mean_tokens
        pod.shared += 0.5 * pod.decode
        self._price_of_all += 1.0 / self._n
        if self._kv_known:
            pod.tokens += tokens
            self._fullest = max(self._fullest, pod.tokens * pod.kv_share_per_token)
            pod.kv_wait_base += tokens * pod.kv_wait_per_token - longer
        pod.requests += 1.0
        if self._slots_known:
            self._most_taken = max(self._most_taken, (pod.requests + 1.0) * pod.share_per_request)
            pod.wait_for_slot += pod.share_per_request * pod.answer - longer

    def score(self, prompt: float, output: float, uncached: float, scarce: float, new: float) -> None:
        """Score every pod, if all of them hold as much of the prompt. `new`: tokens that bind others to the pod that
        computes them."""
        self._cost_of_last = self._flat + self._slope * prompt
        self._output = output + new * (self._cost_of_last - 0.5 * self._slope * new) * self._per_new
        self._per_answer = self._output * (self._per_request + prompt * self._per_token)
        self._score(self._pods, uncached, scarce)

    def score_others(self, indices: list[int], uncached: float, scarce: float) -> None:
        """Score some pods anew, which hold another part of the prompt that `score` was last asked for."""
        self._score([self._pods[index] for index in indices], uncached, scarce)

    def _score(self, pods: list[PodTerms], uncached: float, scarce: float) -> None:
        output = self._output
        steps, loss = output + uncached / self._budget, uncached * self._price_of_all
        cost = self._cost_of_last - 0.5 * self._slope * uncached
        price = scarce * cost
        prefill = uncached * cost + price * self._price_of_all
        shared = self._per_answer
        for pod in pods:
            pod.score = (
                pod.fixed
                + pod.step * steps
                + pod.prefill_interference * output
                + pod.price * price
                + pod.shared * shared
                + pod.prefill * prefill
                + pod.loss * loss
            )

    def add_waits_for_room(self) -> None:
        """Of the request that `wait_for_room` was last asked for."""
        for pod in self._pods:
            pod.score += pod.capacity_wait

    def scores(self) -> list[float]:
        """Seconds of delay on each pod, as scored last."""
        return [pod.score for pod in self._pods]

    def lowest(self) -> int:
        """The index of the pod with the lowest score."""
        lowest, found = inf, 0
        for pod in self._pods:
            if pod.score < lowest:
                lowest, found = pod.score, pod.index
        return found

    def terms(
        self, prompt: float, output: float, full: int, uncached: Floats, scarce: Floats, new: float
    ) -> dict[str, Floats]:
        """What the scores add up from, by name, for every pod; `full` as `wait_for_room` gave it, `new` as `score` was
        given it. For people: it takes its time."""
        fixed, step, interference, price, shared, prefill, loss = np.array(
            [
                (pod.fixed, pod.step, pod.prefill_interference, pod.price, pod.shared, pod.prefill, pod.loss)
                for pod in self._pods
            ]
        ).T
        capacity_wait = np.array([pod.capacity_wait if full else 0.0 for pod in self._pods])
        cost = self._flat + self._slope * (prompt - 0.5 * uncached)
        added = (self._per_request + prompt * self._per_token) * shared
        following = new * (self._flat + self._slope * (prompt - 0.5 * new)) * self._per_new
        return {
            "queue": fixed + capacity_wait,
            "prefill": uncached * cost * prefill,
            "answer": output * (step + interference) + uncached / self._budget * step,
            "others": scarce * cost * (price + self._price_of_all * prefill) + output * added,
            "evicted": uncached * self._price_of_all * loss,
            "followers": following * (step + interference + added),
        }

    def may_be_full(self, prompt: float) -> bool:
        """Whether some pod may be out of slots, or out of room in its KV cache with this prompt."""
        return self._fullest + prompt * self._most_kv_share > 1.0 or self._most_taken > 1.0

    def wait_for_room(self, prompt: float) -> int:
        """Work out how long each pod has no room for one request more, beyond the wait for the prefills before it: the
        time of a mean answer frees as much as there is. Returns which have none, as a bitmap of their rows."""
        for pod in self._pods:
            pod.capacity_wait = max(max(pod.kv_wait_base + prompt * pod.kv_wait_per_token, pod.wait_for_slot), 0.0)
            if pod.full != (pod.capacity_wait > 0.0):
                pod.full = not pod.full
                self._full ^= pod.bit
        return self._full
