"""`MarginalDelay`'s formula for all pods at once and for one. Not a strategy itself.

    score = fixed + (M + u / budget) * step + c * price + M * (r + P * k) * shared + (u + c * (1 + N)) * prefill
            + u * (1 + N) * loss

is the strategy's formula with what concerns the request taken out of the brackets: P, u, c and M are its prompt, its
uncached, its scarce and its output tokens (except in u / budget and u * (1 + N), u and c are in tokens of the mean
cost, so multiplied by flat + slope * (P - u / 2)); r and k are the prior's rates per request and per KV token. What is
left, six numbers per pod, is kept from decision to decision and worked out anew once in KEPT_SECONDS. In between,
what this process charges to a pod, for whatever model and by whatever strategy, is added to that pod's numbers, and so
is what it hears from the prefix log that other workers have sent. So a decision is six multiplications per pod, in a
compiled loop: for some dozens of pods a call of numpy takes longer, mostly to get its code into the processor's cache.
"""

from math import inf
from random import Random
from typing import Final

import numpy as np

from router.backlog import FIRST_STEPS, Backlog
from router.fleet import Candidates
from router.prefix_index import MOST_HEARD, PrefixIndex
from router.rates import Speeds
from state.pods import Floats

KEPT_SECONDS: Final = 0.01
"""How old finished requests and finished prefills may be."""
LEAD_SECONDS: Final = 0.0002
"""By how much a record may be older than the charge that it stands for."""
MOST_ENTERED: Final = 64
"""More is worked out anew."""
JITTER_SECONDS: Final = 1e-9
"""Chance between equal pods."""
_JITTERS: Final = 1024

_FIXED: Final = 0
_STEP: Final = 1
_PRICE: Final = 2
_SHARED: Final = 3
_PREFILL: Final = 4
_LOSS: Final = 5
_REQUESTS: Final = 6
_TOKENS: Final = 7
_UNTIL: Final = 8
_WAIT: Final = 9
_ANSWER: Final = 10
_SHORT: Final = 11
_MORE: Final = 12
_NO_PLACE: Final = 13
_NUMBERS: Final = 14


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


class Form:
    """What is kept of one pod: the six numbers of its score, and what they change by when it is sent a request. Plain
    numbers of an object of its own: of all ways to read and write single ones this costs least."""

    __slots__ = (
        "answer",
        "decode",
        "fixed",
        "loss",
        "more",
        "no_place",
        "place",
        "prefill",
        "price",
        "requests",
        "room",
        "rooms",
        "score",
        "seats",
        "shared",
        "short",
        "slot",
        "step",
        "tokens",
        "until",
    )

    def __init__(self, place: int, slot: int) -> None:
        self.score = 0.0
        """Of the request that was asked for last, in seconds."""
        self.fixed = 0.0
        self.step = 0.0
        self.price = 0.0
        self.shared = 0.0
        self.prefill = 0.0
        self.loss = 0.0
        self.room = 0.0
        """Seconds that the request asked for last would wait for room beyond the prefills before it: for its place, and
        for its tokens as short + P * more. Negative where there is room."""
        self.short = 0.0
        self.more = 0.0
        self.no_place = 0.0
        self.answer = 0.0
        """Seconds of a mean one."""
        self.rooms = 0.0
        self.seats = 0.0
        """As in `Speeds`; 0 also where nobody's is known."""
        self.decode = 0.0
        self.requests = 0.0
        self.tokens = 0.0
        self.until = 0.0
        """When it will have done the prefills promised to it."""
        self.place = place
        self.slot = slot


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
        self._of_request = self._per_request + 0.5 * speeds.output_tokens * self._per_token
        self._request_step = self._of_request * speeds.decode
        self._token_step = self._per_token * speeds.decode
        self._most_room = float(speeds.rooms.max()) if speeds.rooms is not None else 0.0
        self._rooms_known, self._seats_known = speeds.rooms is not None, speeds.seats is not None
        self._fullest = self._most_taken = 0.0
        self._numbers: Floats = np.zeros((_NUMBERS, n))
        """By kind and pod, as they were worked out last."""
        self._numbers[_PREFILL] = speeds.prefill_seconds
        self._forms = [Form(place, pod.slot) for place, pod in enumerate(candidates.pods)]
        self._form_of = {form.slot: form for form in self._forms}
        unknown = [0.0] * n
        rooms = unknown if speeds.rooms is None else speeds.rooms.tolist()
        seats = unknown if speeds.seats is None else speeds.seats.tolist()
        for place, (form, decode) in enumerate(zip(self._forms, speeds.decode.tolist(), strict=True)):
            form.decode, form.rooms, form.seats = decode, rooms[place], seats[place]
        self._n = n
        self._flat, self._slope, self._sent = speeds.flat, speeds.slope, speeds.sent
        self._mean_tokens = 1.0
        self._price_of_all = 1.0
        self._slack = 0.0
        self._per_answer = 0.0
        self._cost_of_last = 1.0
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
            for number in range(-charged, 0):
                slot, tokens, uncached = ledger.charged[number]
                form = self._form_of.get(slot)
                if form is not None:
                    cost = self._flat + self._slope * (tokens - 0.5 * uncached)
                    self._enter(form, tokens, uncached * cost * form.prefill)
            if heard and index is not None:
                for number in range(-heard, 0):
                    slot, size, new, at = index.heard[number]
                    form = self._form_of.get(slot)
                    if form is not None and at >= self._worked_out_at - LEAD_SECONDS:
                        prompt = size / index.bytes_per_token
                        seconds = self.speeds.cost(prompt, new / index.bytes_per_token) * form.prefill
                        form.until = max(form.until, now) + seconds
                        self._enter(form, prompt, seconds)
        self._charges = ledger.charges
        if index is not None:
            self._heard = index.heard_count

    def _hear(self, index: PrefixIndex, count: int) -> None:
        """Note what prompts other workers have sent."""
        for number in range(-count, 0):
            slot, size, new, _ = index.heard[number]
            form = self._form_of.get(slot)
            if form is not None:
                self._sent[form.place].add(size / index.bytes_per_token, new / index.bytes_per_token)

    def _work_out(self, now: float, index: PrefixIndex | None) -> None:
        candidates, speeds = self._candidates, self.speeds
        excess = self._backlog.excess(candidates, speeds, now)
        fixed, step, price, shared, prefill, loss = self._numbers[: _LOSS + 1]
        requests, tokens, until, wait, answer, short, more, no_place = self._numbers[_REQUESTS:]
        loads, until[:] = candidates.loads(), candidates.busy_until()
        np.add(loads[0], speeds.elsewhere, out=requests)
        tokens[:] = loads[1]
        np.subtract(until, now, out=wait)
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
        if speeds.rooms is not None:
            np.multiply(speeds.rooms, answer, out=more)
            filled = tokens * speeds.rooms
            self._fullest = float(filled.max())
            np.subtract(filled, 1.0, out=short)
            short *= answer
            short -= wait
        if speeds.seats is not None:
            taken = (requests + 1.0) * speeds.seats
            self._most_taken = float(taken.max())
            np.subtract(taken, 1.0, out=no_place)
            no_place *= answer
            no_place -= wait
        waits = wait
        if self.crowded(mean_tokens):
            waits = wait + np.maximum(np.maximum(short + mean_tokens * more, no_place), 0.0)
        slack = self._slack = float(np.add.reduce(typical / (waits + typical))) / self._n
        served = requests if self._places is None else np.minimum(requests, self._places)
        if self._fullest > 1.0 and filled is not None:
            served = np.minimum(served, requests / np.maximum(filled, 1.0))
        self._price_of_all = 1.0 + float(np.add.reduce(served)) / self._n
        if index is not None:
            np.multiply([index.lost[form.slot] for form in self._forms], prefill, out=loss)
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
        self._keep()

    def _keep(self) -> None:
        """Hand each pod its numbers."""
        rows: list[list[float]] = self._numbers.T.tolist()
        for form in self._forms:
            row = rows[form.place]
            form.fixed, form.step, form.price = row[_FIXED], row[_STEP], row[_PRICE]
            form.shared, form.prefill, form.loss = row[_SHARED], row[_PREFILL], row[_LOSS]
            form.requests, form.tokens, form.until = row[_REQUESTS], row[_TOKENS], row[_UNTIL]
            form.answer, form.short, form.more, form.no_place = row[_ANSWER], row[_SHORT], row[_MORE], row[_NO_PLACE]

    def promise(self, place: int, prompt: float, uncached: float, now: float) -> None:
        """This process sends a prompt to a pod: say when the pod will have done its prefill."""
        pairs = uncached * (prompt - 0.5 * uncached)
        sent, form = self._sent[place], self._forms[place]
        sent.tokens += uncached
        sent.pairs += pairs
        form.until = self._backlog.chose(
            self._candidates,
            place,
            self._flat * uncached + self._slope * pairs,
            form.prefill,
            now,
            form.step,
            form.until,
        )

    def _enter(self, form: Form, tokens: float, longer: float) -> None:
        """A request more, and so many seconds of prefill: to first order what that changes."""
        form.fixed += longer * (1.0 + 0.5 * self._slack * form.requests)
        form.step += 0.5 * form.decode * (self._of_request + tokens * self._per_token)
        form.price += 0.5 * form.prefill + self._slack * longer / self._mean_tokens
        form.shared += 0.5 * form.decode
        self._price_of_all += 1.0 / self._n
        if self._rooms_known:
            form.tokens += tokens
            self._fullest = max(self._fullest, form.tokens * form.rooms)
            form.short += tokens * form.more - longer
        form.requests += 1.0
        if self._seats_known:
            self._most_taken = max(self._most_taken, (form.requests + 1.0) * form.seats)
            form.no_place += form.seats * form.answer - longer

    def score(self, prompt: float, output: float, uncached: float, scarce: float) -> None:
        """Score every pod, if all of them hold as much of the prompt."""
        self._per_answer = output * (self._per_request + prompt * self._per_token)
        self._cost_of_last = self._flat + self._slope * prompt
        self._score(self._forms, output, uncached, scarce)

    def score_others(self, places: list[int], output: float, uncached: float, scarce: float) -> None:
        """Score some pods anew, which hold another part of the prompt that `score` was last asked for."""
        self._score([self._forms[place] for place in places], output, uncached, scarce)

    def _score(self, forms: list[Form], output: float, uncached: float, scarce: float) -> None:
        steps, loss = output + uncached / self._budget, uncached * self._price_of_all
        cost = self._cost_of_last - 0.5 * self._slope * uncached
        price = scarce * cost
        prefill = uncached * cost + price * self._price_of_all
        shared = self._per_answer
        for form in forms:
            form.score = (
                form.fixed
                + form.step * steps
                + form.price * price
                + form.shared * shared
                + form.prefill * prefill
                + form.loss * loss
            )

    def add_waits_for_room(self) -> None:
        """Of the request that `wait_for_room` was last asked for."""
        for form in self._forms:
            form.score += form.room

    def scores(self) -> list[float]:
        """Seconds of delay on each pod, as scored last."""
        return [form.score for form in self._forms]

    def lowest(self) -> int:
        """The place of the pod with the lowest score."""
        lowest, found = inf, 0
        for form in self._forms:
            if form.score < lowest:
                lowest, found = form.score, form.place
        return found

    def terms(self, prompt: float, output: float, full: int, uncached: Floats, scarce: Floats) -> dict[str, Floats]:
        """What the scores add up from, by name, for every pod; `full` as `wait_for_room` gave it. For people: it takes
        its time."""
        forms = self._forms
        fixed, step, price, shared, prefill, loss, room = np.array(
            [(f.fixed, f.step, f.price, f.shared, f.prefill, f.loss, f.room if full else 0.0) for f in forms]
        ).T
        cost = self._flat + self._slope * (prompt - 0.5 * uncached)
        return {
            "queue": fixed + room,
            "prefill": uncached * cost * prefill,
            "answer": (output + uncached / self._budget) * step,
            "others": scarce * cost * (price + self._price_of_all * prefill)
            + output * (self._per_request + prompt * self._per_token) * shared,
            "evicted": uncached * self._price_of_all * loss,
        }

    def crowded(self, prompt: float) -> bool:
        """Whether some pod may be out of places, or out of room in its KV cache with this prompt."""
        return self._fullest + prompt * self._most_room > 1.0 or self._most_taken > 1.0

    def wait_for_room(self, prompt: float) -> int:
        """Work out how long each pod has no room for one request more, beyond the wait for the prefills before it: the
        time of a mean answer frees as much as there is. Returns which have none, as a bitmap of their rows."""
        full = 0
        for form in self._forms:
            room = form.room = max(form.short + prompt * form.more, form.no_place, 0.0)
            if room > 0.0:
                full |= 1 << form.slot
        return full
