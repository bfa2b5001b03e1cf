"""`MarginalDelay`'s formula for all pods at once and for one. Not a strategy itself.

    score = fixed + (M + F + u / budget) * step + (M + F) * (held + (r + P * k) * shared) + c * price
            + (u + c * (1 + N)) * prefill + u * (1 + N) * loss

is the strategy's formula with what concerns the request taken out of the brackets: P, u, c and M are its prompt, its
uncached, its scarce and its output tokens (except in u / budget and u * (1 + N), u and c are in tokens of the mean
cost, so multiplied by flat + slope * (P - u / 2)); F are the output tokens of those that will follow it; r and k are
the prior's rates per request and per KV token. What is left, seven numbers per pod, is kept from decision to decision
and worked out anew once in KEPT_SECONDS. In between,
what this process charges to a pod, for whatever model and by whatever strategy, is added to that pod's numbers, and so
is what it hears from the prefix log that other workers have sent. So a decision is one product of a vector with a
matrix, and a few multiplications for the pods that hold another part of the prompt than most.
"""

from math import inf
from random import Random
from typing import Final

import numpy as np

from router.attention import SENT_SECONDS
from router.backlog import FIRST_STEPS, Backlog
from router.fleet import Candidates
from router.prefix_index import MOST_HEARD, PrefixIndex
from router.rates import Speeds
from state.pods import Floats, Ints

KEPT_SECONDS: Final = 0.01
"""How old finished requests and finished prefills may be."""
LEAD_SECONDS: Final = 0.0002
"""By how much a record may be older than the charge that it stands for."""
MOST_ENTERED: Final = 64
"""More is worked out anew."""
MOST_BUSY: Final = 0.98
"""With prefills, of a pod's time: more than all of it may have been promised."""
JITTER_SECONDS: Final = 1e-9
"""Chance between equal pods."""
_JITTERS: Final = 1024

_FIXED: Final = 0
_STEP: Final = 1
_PRICE: Final = 2
_SHARED: Final = 3
_PREFILL: Final = 4
_LOSS: Final = 5
_HELD: Final = 6


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


class Delays:
    """What a request costs on each candidate, for one epoch of their metrics."""

    def __init__(self, candidates: Candidates, speeds: Speeds, backlog: Backlog, chance: Chance) -> None:
        n = len(candidates.pods)
        prior = backlog.rates.prior
        self.speeds = speeds
        self._candidates = candidates
        self._backlog = backlog
        self._chance = chance
        self._per_request, self._per_token = prior.decode_request_seconds, prior.kv_token_seconds
        self._budget = prior.step_tokens
        self._places = None if speeds.seats is None else 1.0 / np.maximum(speeds.seats, 1e-6)
        self._idle_step = speeds.idle_step * speeds.decode
        # Of a running request half of the output is there, on average.
        self._request_step = (self._per_request + 0.5 * speeds.output_tokens * self._per_token) * speeds.decode
        self._token_step = self._per_token * speeds.decode
        self._rooms = speeds.rooms
        self._most_room = float(speeds.rooms.max()) if speeds.rooms is not None else 0.0
        self._rooms_of = _numbers(speeds.rooms) if speeds.rooms is not None else None
        self._seats_of = _numbers(speeds.seats) if speeds.seats is not None else None
        # Seconds that a request would wait for room beyond the prefills before it: for its place, and for its tokens
        # as short + P * more. Negative where there is room.
        self._room: Floats = np.zeros(n)
        self._no_place: Floats = np.zeros(n)
        self._short: Floats = np.zeros(n)
        self._more: Floats = np.zeros(n)
        self._short_of, self._more_of = _numbers(self._short), _numbers(self._more)
        self._no_place_of = _numbers(self._no_place)
        self._answer: Floats = np.zeros(n)
        self._answer_of = _numbers(self._answer)
        self._fullest = self._most_taken = 0.0
        self._loads: Floats = np.zeros((3, n))
        self._flat, self._slope, self._sent = speeds.flat, speeds.slope, speeds.sent
        self._form: Floats = np.zeros((7, n))
        self._form[_PREFILL] = speeds.prefill_seconds
        self._weights: Floats = np.ones(7)
        # What others' prefills add to a pod's steps: by how much steps grow, and by how much at most.
        sent = [self._flat * sent.tokens + self._slope * sent.pairs for sent in speeds.sent]
        busy = np.minimum(np.array(sent) * speeds.prefill_seconds / SENT_SECONDS, MOST_BUSY)
        self._growth: Floats = busy / (1.0 - busy)
        self._full_step = self._budget * speeds.prefill_seconds
        self._scores: Floats = np.zeros(n)
        self._others: Floats = np.zeros(n)
        # Single numbers are read and written through views: half the price.
        self._form_of, self._weight_of = _numbers(self._form), _numbers(self._weights)
        self._of_request, self._of_token = _numbers(self._request_step), _numbers(self._token_step)
        self._of_decode, self._requests_of = _numbers(speeds.decode), _numbers(self._loads[0])
        self._tokens_of = _numbers(self._loads[1])
        self._place_of = {slot: place for place, slot in enumerate(candidates.slots.tolist())}
        self._n = n
        self._last = 1.0
        self._mean_tokens = 1.0
        self._price_of_all = 1.0
        self._slack = 0.0
        self._per_new = 0.0
        self._following = 0.0
        self._worked_out_at = -inf
        self._charges = candidates.ledger.charges
        self._heard = 0

    def follow(self, now: float, index: PrefixIndex | None) -> None:
        """Take in what has changed: all of it when that was last done too long ago, else what this process has charged
        (for whatever model and strategy) and what it has heard of other workers."""
        ledger = self._candidates.ledger
        charged = ledger.charges - self._charges
        heard = index.heard_count - self._heard if index is not None else 0
        if heard and index is not None:
            self._hear(index, min(heard, MOST_HEARD))
        if not 0.0 <= now - self._worked_out_at < KEPT_SECONDS or charged > MOST_ENTERED or heard > MOST_ENTERED:
            self._worked_out_at = now
            self._work_out(now, index)
        elif charged or heard:
            prefill = _PREFILL * self._n
            for number in range(-charged, 0):
                slot, tokens, uncached = ledger.charged[number]
                place = self._place_of.get(slot)
                if place is not None:
                    cost = self._flat + self._slope * (tokens - 0.5 * uncached)
                    self._enter(place, tokens, uncached * cost * self._form_of[prefill + place])
            if heard and index is not None:
                for number in range(-heard, 0):
                    slot, size, new, at = index.heard[number]
                    place = self._place_of.get(slot)
                    if place is not None and at >= self._worked_out_at - LEAD_SECONDS:
                        prompt = size / index.bytes_per_token
                        seconds = self.speeds.cost(prompt, new / index.bytes_per_token) * self._form_of[prefill + place]
                        self._until[place] = max(self._until[place], now) + seconds
                        self._enter(place, prompt, seconds)
        self._charges = ledger.charges
        if index is not None:
            self._heard = index.heard_count

    def _hear(self, index: PrefixIndex, count: int) -> None:
        """Note what prompts other workers have sent, each once, however many ask: it is for all epochs and models."""
        for number in range(-count, 0):
            slot, size, new, _ = index.heard[number]
            place = self._place_of.get(slot)
            if place is not None and self._sent[place].heard <= index.heard_count + number:
                self._sent[place].heard = index.heard_count + number + 1
                self._sent[place].add(size / index.bytes_per_token, new / index.bytes_per_token)

    def _work_out(self, now: float, index: PrefixIndex | None) -> None:
        candidates, speeds, form, answer = self._candidates, self.speeds, self._form, self._answer
        excess = self._backlog.excess(candidates, speeds, now)
        requests, tokens, wait = self._loads
        fixed, step, price, shared, prefill, loss, held = form
        loads, until = candidates.loads(), candidates.busy_until()
        np.add(loads[0], speeds.elsewhere, out=requests)
        tokens[:] = loads[1]
        np.subtract(until, now, out=wait)
        self._until = _numbers(until)
        if excess.any:
            wait -= np.where(excess.since > now, excess.seconds, 0.0)
        np.maximum(wait, 0.0, out=wait)
        mean_tokens = self._mean_tokens = max(self._backlog.mean_tokens, 1.0)

        # What decodes is taken to be half of what there is now and half of what there usually is.
        decoding, context = 0.5 * (loads[:2] + speeds.usual)
        decoding += speeds.elsewhere
        np.multiply(decoding, speeds.decode, out=shared)
        np.multiply(decoding, self._request_step, out=step)
        step += context * self._token_step
        step += self._idle_step
        typical = mean_tokens * float(prefill[0])
        np.maximum(step, speeds.pace, out=answer)
        answer *= speeds.output_tokens
        filled: Floats | None = None
        if self._rooms is not None:
            np.multiply(self._rooms, answer, out=self._more)
            filled = tokens * self._rooms
            self._fullest = float(filled.max())
            np.subtract(filled, 1.0, out=self._short)
            self._short *= answer
            self._short -= wait
        if speeds.seats is not None:
            taken = (requests + 1.0) * speeds.seats
            self._most_taken = float(taken.max())
            np.subtract(taken, 1.0, out=self._no_place)
            self._no_place *= answer
            self._no_place -= wait
        waits = wait + self.wait_for_room(mean_tokens) if self.crowded(mean_tokens) else wait
        slack = self._slack = float(np.add.reduce(typical / (waits + typical))) / self._n
        served = requests if self._places is None else np.minimum(requests, self._places)
        if self._fullest > 1.0 and filled is not None:
            served = np.minimum(served, requests / np.maximum(filled, 1.0))
        self._price_of_all = 1.0 + float(np.add.reduce(served)) / self._n
        if index is not None:
            np.multiply(index.lost[self._candidates.slots], prefill, out=loss)
        np.multiply(wait, speeds.drain, out=price)
        price /= mean_tokens
        np.minimum(price, requests, out=price)
        price *= slack
        half = 0.5 * served
        price += half
        price *= prefill
        half *= slack
        half += 1.0
        np.multiply(half, wait, out=fixed)
        fixed += np.where(wait > 0.0, 0.0, step * FIRST_STEPS)
        fixed += self._chance.draw(self._n)
        loss *= 1.0 - slack
        np.multiply(step, self._growth, out=held)
        np.minimum(held, self._full_step, out=held)
        held *= 0.5 * slack
        mean_prompt = max(self._backlog.mean_prompt, mean_tokens)
        self._per_new = slack * speeds.output_tokens * (1.0 / mean_tokens - 1.0 / mean_prompt)

    def promise(self, place: int, prompt: float, uncached: float, now: float) -> None:
        """This process sends a prompt to a pod: say when the pod will have done its prefill."""
        pairs = uncached * (prompt - 0.5 * uncached)
        whole = prompt * (self._flat + 0.5 * self._slope * prompt)
        sent = self._sent[place]
        sent.tokens += uncached
        sent.pairs += pairs
        step = self._form_of[self._n + place]
        until = self._until[place]
        self._until[place] = self._backlog.chose(
            self._candidates, place, self._flat * uncached + self._slope * pairs, self.speeds, now, step, until, whole
        )

    def _enter(self, place: int, tokens: float, longer: float) -> None:
        """A request more, and so many seconds of prefill: to first order what that changes."""
        n, form = self._n, self._form_of
        form[place] += longer * (1.0 + 0.5 * self._slack * self._requests_of[place])
        form[n + place] += 0.5 * (self._of_request[place] + tokens * self._of_token[place])
        form[2 * n + place] += 0.5 * form[4 * n + place] + self._slack * longer / self._mean_tokens
        form[3 * n + place] += 0.5 * self._of_decode[place]
        self._price_of_all += 1.0 / n
        if self._rooms_of is not None:
            held = self._tokens_of[place] = self._tokens_of[place] + tokens
            self._fullest = max(self._fullest, held * self._rooms_of[place])
            self._short_of[place] += tokens * self._more_of[place] - longer
        taken = self._requests_of[place] = self._requests_of[place] + 1.0
        if self._seats_of is not None:
            self._most_taken = max(self._most_taken, (taken + 1.0) * self._seats_of[place])
            self._no_place_of[place] += self._seats_of[place] * self._answer_of[place] - longer

    def of_all(self, prompt: float, output: float, uncached: float, scarce: float, new: float) -> Floats:
        """The score of every pod, if all of them hold as much of the prompt. `new`: tokens that bind others to the pod
        that computes them. The array is written over by the next call."""
        weights = self._weight_of
        self._last = self._flat + self._slope * prompt
        self._following = new * (self._last - 0.5 * self._slope * new) * self._per_new
        output += self._following
        weights[_STEP] = output + uncached / self._budget
        weights[_HELD] = output
        weights[_LOSS] = uncached * self._price_of_all
        cost = self._last - 0.5 * self._slope * uncached
        scarce *= cost
        weights[_PRICE] = scarce
        weights[_SHARED] = output * (self._per_request + prompt * self._per_token)
        weights[_PREFILL] = uncached * cost + scarce * self._price_of_all
        np.dot(self._weights, self._form, out=self._scores)
        return self._scores

    def of(self, places: int | Ints, output: float, uncached: float, scarce: float) -> float | Floats:
        """The scores of some pods that hold another part of the prompt that `of_all` was last asked for."""
        output += self._following
        steps = output + uncached / self._budget
        loss = uncached * self._price_of_all
        cost = self._last - 0.5 * self._slope * uncached
        uncached *= cost
        scarce *= cost
        if not isinstance(places, int):
            weights = self._weight_of
            weights[_STEP] = steps
            weights[_LOSS] = loss
            weights[_PRICE] = scarce
            weights[_PREFILL] = uncached + scarce * self._price_of_all
            np.dot(self._weights, self._form, out=self._others)
            some: Floats = self._others[places]
            return some
        n, form = self._n, self._form_of
        return (
            form[places]
            + form[n + places] * steps
            + form[2 * n + places] * scarce
            + form[3 * n + places] * self._weight_of[_SHARED]
            + form[4 * n + places] * (uncached + scarce * self._price_of_all)
            + form[5 * n + places] * loss
            + form[6 * n + places] * output
        )

    def terms(
        self, prompt: float, output: float, room: Floats | None, uncached: Floats, scarce: Floats
    ) -> dict[str, Floats]:
        """What the scores add up from, by name, for every pod. For people: it takes its time."""
        form = self._form
        cost = self._flat + self._slope * (prompt - 0.5 * uncached)
        queue, of_others = form[_FIXED].copy(), scarce * cost * (form[_PRICE] + self._price_of_all * form[_PREFILL])
        if room is not None:
            queue += room
        added = (self._per_request + prompt * self._per_token) * form[_SHARED]
        of_others += output * added
        most = float(uncached.max())
        new = float(uncached.min()) ** 2 / most if most > 0.0 else 0.0
        following = new * (self._flat + self._slope * (prompt - 0.5 * new)) * self._per_new
        return {
            "queue": queue,
            "prefill": uncached * cost * form[_PREFILL],
            "answer": output * (form[_STEP] + form[_HELD]) + uncached / self._budget * form[_STEP],
            "others": of_others,
            "evicted": uncached * self._price_of_all * form[_LOSS],
            "followers": following * (form[_STEP] + form[_HELD] + added),
        }

    def crowded(self, prompt: float) -> bool:
        """Whether some pod may be out of places, or out of room in its KV cache with this prompt."""
        return self._fullest + prompt * self._most_room > 1.0 or self._most_taken > 1.0

    def wait_for_room(self, prompt: float) -> Floats:
        """Seconds until each pod has room for one request more, beyond the wait for the prefills before it: the time of
        a mean answer frees as much as there is. The array is written over by the next call."""
        room = self._room
        np.multiply(self._more, prompt, out=room)
        room += self._short
        if self._seats_of is not None:
            np.maximum(room, self._no_place, out=room)
        np.maximum(room, 0.0, out=room)
        return room


def _numbers(array: Floats) -> "memoryview[float]":
    return memoryview(array.reshape(-1))  # type: ignore[arg-type]
