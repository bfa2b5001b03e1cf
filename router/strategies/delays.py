"""`MarginalDelay`'s formula for all pods at once and for one. Not a strategy itself.

    score = fixed + (M + F + u / budget) * step + (M + F) * (held + (r + P * k) * shared) + c * price
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

from router.attention import SENT_SECONDS
from router.backlog import FIRST_STEPS, Backlog, Excess
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
MOST_BUSY: Final = 0.98
"""With prefills, of a pod's time: more than all of it may have been promised."""
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


class Form:
    """What is kept of one pod: the seven numbers of its score, what they are made of, and what they change by when it
    is sent a request. Plain numbers of an object of its own: compiled, that is the cheapest way to read and write
    them."""

    __slots__ = (
        "answer",
        "bit",
        "decode",
        "drain",
        "elsewhere",
        "fixed",
        "full",
        "growth",
        "held",
        "idle_step",
        "loss",
        "more",
        "no_place",
        "pace",
        "place",
        "places",
        "prefill",
        "price",
        "requests",
        "room",
        "rooms",
        "score",
        "seats",
        "served",
        "shared",
        "short",
        "slot",
        "step",
        "tokens",
        "until",
        "usual_requests",
        "usual_tokens",
        "wait",
    )

    def __init__(self, place: int, slot: int) -> None:
        self.score = 0.0
        """Of the request that was asked for last, in seconds."""
        self.fixed = 0.0
        self.step = 0.0
        self.held = 0.0
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
        self.full = False
        """Whether `room` is more than 0."""
        self.requests = 0.0
        self.served = 0.0
        """Of the requests, those that the pod has places and room for."""
        self.tokens = 0.0
        self.until = 0.0
        """When it will have done the prefills promised to it."""
        self.wait = 0.0
        """Seconds until then, as worked out last."""
        self.answer = 0.0
        """Seconds of a mean one."""
        self.growth = 0.0
        """By how much of itself a step grows with the prefills that it was promised of late."""
        # The rest as in `Speeds`, zero where nobody's is known.
        self.rooms = 0.0
        self.seats = 0.0
        self.places = inf
        """1 / seats."""
        self.decode = 0.0
        self.drain = 0.0
        self.pace = 0.0
        self.elsewhere = 0.0
        self.idle_step = 0.0
        self.usual_requests = 0.0
        self.usual_tokens = 0.0
        self.place = place
        self.slot = slot
        self.bit = 1 << slot
        """The row in a bitmap."""


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
        self._most_room = float(speeds.rooms.max()) if speeds.rooms is not None else 0.0
        self._rooms_known, self._seats_known = speeds.rooms is not None, speeds.seats is not None
        self._fullest = self._most_taken = 0.0
        self._full = 0
        """Those that are `Form.full`, as a bitmap of their rows."""
        self._forms = [Form(place, pod.slot) for place, pod in enumerate(candidates.pods)]
        self._form_of = {form.slot: form for form in self._forms}
        self._flat, self._slope, self._sent = speeds.flat, speeds.slope, speeds.sent
        self._learn(speeds)
        self._mean_tokens = 1.0
        self._price_of_all = 1.0
        self._slack = 0.0
        self._per_new = 0.0
        self._output = 0.0
        self._per_answer = 0.0
        self._cost_of_last = 1.0
        self._worked_out_at = -inf
        self._charges = candidates.ledger.charges
        self._heard = 0

    def _learn(self, speeds: Speeds) -> None:
        """Hand each pod what is known of it."""
        prefill: list[float] = speeds.prefill_seconds.tolist()
        drain: list[float] = speeds.drain.tolist()
        decode: list[float] = speeds.decode.tolist()
        pace: list[float] = speeds.pace.tolist()
        elsewhere: list[float] = speeds.elsewhere.tolist()
        idle_step: list[float] = speeds.idle_step.tolist()
        usual_requests: list[float] = speeds.usual[0].tolist()
        usual_tokens: list[float] = speeds.usual[1].tolist()
        unknown = [0.0] * self._n
        rooms: list[float] = speeds.rooms.tolist() if speeds.rooms is not None else unknown
        seats: list[float] = speeds.seats.tolist() if speeds.seats is not None else unknown
        for form in self._forms:
            place = form.place
            form.prefill, form.drain, form.decode = prefill[place], drain[place], decode[place]
            form.pace, form.elsewhere, form.idle_step = pace[place], elsewhere[place], idle_step[place]
            form.usual_requests, form.usual_tokens = usual_requests[place], usual_tokens[place]
            form.rooms, form.seats = rooms[place], seats[place]
            if self._seats_known:
                form.places = 1.0 / max(form.seats, 1e-6)
            sent = self._sent[place]
            busy = (self._flat * sent.tokens + self._slope * sent.pairs) * form.prefill / SENT_SECONDS
            busy = min(busy, MOST_BUSY)
            form.growth = busy / (1.0 - busy)

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
        """Note what prompts other workers have sent, each once, however many ask: it is for all epochs and models."""
        for number in range(-count, 0):
            slot, size, new, _ = index.heard[number]
            form = self._form_of.get(slot)
            if form is not None:
                sent = self._sent[form.place]
                if sent.heard <= index.heard_count + number:
                    sent.heard = index.heard_count + number + 1
                    sent.add(size / index.bytes_per_token, new / index.bytes_per_token)

    def _work_out(self, now: float, index: PrefixIndex | None) -> None:
        candidates, speeds, forms = self._candidates, self.speeds, self._forms
        excess = self._backlog.excess(candidates, speeds, now)
        loads, until = candidates.loads(), candidates.busy_until()
        requests: list[int] = loads[0].tolist()
        tokens: list[int] = loads[1].tolist()
        busy_until: list[float] = until.tolist()
        mean_tokens = self._mean_tokens = max(self._backlog.mean_tokens, 1.0)
        output_tokens = speeds.output_tokens
        self._fullest = self._most_taken = 0.0
        for form in forms:
            place = form.place
            form.requests = requests[place] + form.elsewhere
            form.tokens = float(tokens[place])
            form.until = busy_until[place]
            form.wait = max(form.until - now, 0.0)
            # What decodes is taken to be half of what there is now and half of what there usually is.
            decoding = 0.5 * (requests[place] + form.usual_requests) + form.elsewhere
            context = 0.5 * (form.tokens + form.usual_tokens)
            form.shared = decoding * form.decode
            form.step = (decoding * self._of_request + context * self._per_token + form.idle_step) * form.decode
            form.answer = max(form.step, form.pace) * output_tokens
        if excess.any:
            self._take_off(excess, now)
        for form in forms:
            if self._rooms_known:
                form.more = form.rooms * form.answer
                filled = form.tokens * form.rooms
                self._fullest = max(self._fullest, filled)
                form.short = (filled - 1.0) * form.answer - form.wait
            if self._seats_known:
                taken = (form.requests + 1.0) * form.seats
                self._most_taken = max(self._most_taken, taken)
                form.no_place = (taken - 1.0) * form.answer - form.wait

        typical = mean_tokens * forms[0].prefill
        crowded = self.crowded(mean_tokens)
        free = all_served = 0.0
        for form in forms:
            wait = form.wait
            if crowded:
                wait += max(max(form.short + mean_tokens * form.more, form.no_place), 0.0)
            free += typical / (wait + typical)
            form.served = min(form.requests, form.places)
            if self._fullest > 1.0:
                form.served = min(form.served, form.requests / max(form.tokens * form.rooms, 1.0))
            all_served += form.served
        slack = self._slack = free / self._n
        self._price_of_all = 1.0 + all_served / self._n
        mean_prompt = max(self._backlog.mean_prompt, mean_tokens)
        self._per_new = slack * output_tokens * (1.0 / mean_tokens - 1.0 / mean_prompt)

        chances: list[float] = self._chance.draw(self._n).tolist()
        for form in forms:
            wait, half = form.wait, 0.5 * form.served
            waiting = min(wait * form.drain / mean_tokens, form.requests)
            form.price = (half + slack * waiting) * form.prefill
            form.fixed = (1.0 + slack * half) * wait + chances[form.place]
            if wait == 0.0:
                form.fixed += form.step * FIRST_STEPS
            form.held = 0.5 * slack * min(form.step * form.growth, self._budget * form.prefill)
            if index is not None:
                form.loss = index.lost[form.slot] * form.prefill * (1.0 - slack)

    def _take_off(self, excess: Excess, now: float) -> None:
        """Waits that the last polls show to be shorter."""
        since: list[float] = excess.since.tolist()
        seconds: list[float] = excess.seconds.tolist()
        for form in self._forms:
            if since[form.place] > now:
                form.wait = max(form.until - now - seconds[form.place], 0.0)

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
            prompt * (self._flat + 0.5 * self._slope * prompt),
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

    def score(self, prompt: float, output: float, uncached: float, scarce: float, new: float) -> None:
        """Score every pod, if all of them hold as much of the prompt. `new`: tokens that bind others to the pod that
        computes them."""
        self._cost_of_last = self._flat + self._slope * prompt
        self._output = output + new * (self._cost_of_last - 0.5 * self._slope * new) * self._per_new
        self._per_answer = self._output * (self._per_request + prompt * self._per_token)
        self._score(self._forms, uncached, scarce)

    def score_others(self, places: list[int], uncached: float, scarce: float) -> None:
        """Score some pods anew, which hold another part of the prompt that `score` was last asked for."""
        self._score([self._forms[place] for place in places], uncached, scarce)

    def _score(self, forms: list[Form], uncached: float, scarce: float) -> None:
        output = self._output
        steps, loss = output + uncached / self._budget, uncached * self._price_of_all
        cost = self._cost_of_last - 0.5 * self._slope * uncached
        price = scarce * cost
        prefill = uncached * cost + price * self._price_of_all
        shared = self._per_answer
        for form in forms:
            form.score = (
                form.fixed
                + form.step * steps
                + form.held * output
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
        fixed, step, held, price, shared, prefill, loss, room = np.array(
            [(f.fixed, f.step, f.held, f.price, f.shared, f.prefill, f.loss, f.room if full else 0.0) for f in forms]
        ).T
        cost = self._flat + self._slope * (prompt - 0.5 * uncached)
        added = (self._per_request + prompt * self._per_token) * shared
        most = float(uncached.max())
        new = float(uncached.min()) ** 2 / most if most > 0.0 else 0.0
        following = new * (self._flat + self._slope * (prompt - 0.5 * new)) * self._per_new
        return {
            "queue": fixed + room,
            "prefill": uncached * cost * prefill,
            "answer": output * (step + held) + uncached / self._budget * step,
            "others": scarce * cost * (price + self._price_of_all * prefill) + output * added,
            "evicted": uncached * self._price_of_all * loss,
            "followers": following * (step + held + added),
        }

    def crowded(self, prompt: float) -> bool:
        """Whether some pod may be out of places, or out of room in its KV cache with this prompt."""
        return self._fullest + prompt * self._most_room > 1.0 or self._most_taken > 1.0

    def wait_for_room(self, prompt: float) -> int:
        """Work out how long each pod has no room for one request more, beyond the wait for the prefills before it: the
        time of a mean answer frees as much as there is. Returns which have none, as a bitmap of their rows."""
        for form in self._forms:
            form.room = max(max(form.short + prompt * form.more, form.no_place), 0.0)
            if form.full != (form.room > 0.0):
                form.full = not form.full
                self._full ^= form.bit
        return self._full
