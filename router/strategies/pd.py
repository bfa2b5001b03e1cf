"""Prefill on one pod, decode on another of the same roleset. This is the choice of both; `router.handover` does it."""

from math import inf
from typing import ClassVar, Final

from router.bodies.base import Body
from router.errors import not_selected
from router.fleet import Candidates, Pod
from router.request import RoutingRequest
from router.rules import engine_of
from router.strategies.base import Context, Strategy
from router.strategies.marginal_delay import MarginalDelay
from state.ledger import Charge, Ledger

LEGS: Final = "pd"
"""In `RoutingRequest.notes`: the `Legs` that were chosen."""

_INDIVISIBLE: Final = ("use_beam_search", "prompt_embeds", "prompt_logprobs", "echo")
"""What of a request needs the prompt where the answer is made, or makes several."""
_Group = tuple[str, str, str]
"""Namespace, roleset, engine: who can hand over to whom."""


class _Roleset:
    """Pods of one group: indices of those that prefill and of those that decode."""

    __slots__ = ("decode", "prefill")

    def __init__(self) -> None:
        self.prefill: list[int] = []
        self.decode: list[int] = []


class _Rolesets:
    """Those in which somebody prefills and somebody decodes; worked out once per epoch."""

    __slots__ = ("decode", "groups", "prefill")

    def __init__(self, candidates: Candidates) -> None:
        groups: dict[_Group, _Roleset] = {}
        prefill = candidates.prefill
        for index, pod in enumerate(prefill.pods if prefill is not None else ()):
            if pod.record.roleset:
                groups.setdefault(_group(pod), _Roleset()).prefill.append(index)
        for index, pod in enumerate(candidates.pods):
            if pod.record.role == "decode" and _group(pod) in groups:
                groups[_group(pod)].decode.append(index)
        self.groups = {group: roleset for group, roleset in groups.items() if roleset.decode}
        self.decode = [index for roleset in self.groups.values() for index in roleset.decode]
        self.prefill = prefill

    @classmethod
    def of(cls, candidates: Candidates) -> "_Rolesets":
        found: _Rolesets | None = candidates.derived.get(cls)
        if found is None:
            found = candidates.derived[cls] = cls(candidates)
        return found


class Legs:
    """Where a request's prompt is prefilled. Its charge is there until the answer is: `release` it, as often as you
    like."""

    __slots__ = ("_charge", "_ledger", "engine", "group", "pod", "request", "tried")

    def __init__(self, group: _Group, ledger: Ledger) -> None:
        self.group = group
        self.engine = group[2]
        self.pod: Pod | None = None
        """None where the decode pod has to prefill by itself."""
        self.request: RoutingRequest | None = None
        """What the prefill pod is asked for: the prompt, and one token."""
        self.tried: list[Pod] = []
        """Pods that were sent the prompt, the latest last."""
        self._ledger = ledger
        self._charge: Charge | None = None

    def charge(self, pod: Pod) -> None:
        """The prompt goes to this pod."""
        assert self.request is not None
        tokens, uncached = self.request.prompt_tokens, self.request.uncached_tokens
        self._charge = self._ledger.charge(pod.slot, tokens, min(uncached, tokens), held=True)
        self.pod = pod
        self.tried.append(pod)

    def release(self, *, ok: bool | None = None) -> None:
        """It has answered, well or not, or nobody waits for that any more (None)."""
        charge, self._charge = self._charge, None
        if charge is not None:
            self._ledger.release(charge, held=True)
            if ok is not None:
                self._ledger.outcome(charge, ok=ok)


class Pd(Strategy):
    """Chooses a pod that prefills and a pod that decodes, of one roleset, where both together add the least delay.

    score = marginal-delay of the prompt and one token on the prefill pod
          + marginal-delay of the answer on the decode pod, as if it held the whole prompt. [seconds]

    Both are the formula of marginal-delay: cached prefixes, promised prefills and learnt speeds decide between prefill
    pods; requests in flight, the tokens they hold and the room in the KV cache between decode pods. Both pods are
    charged in the step of the choice: the one that prefills until it has answered, the other until the request is over.

    A roleset takes part while it has a pod of each role that is ready, both of the same engine. Requests that cannot be
    handed over (several answers or prompts, paths other than chat and text completions) go whole to the decode pod
    that has the least to do. Source: AIBrix's pd, with our costs instead of its scores.
    """

    name: ClassVar[str] = "pd"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._delays = MarginalDelay(context)

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The index of the decode pod; who prefills is noted. Raises RequestError 503 where no roleset is complete."""
        rolesets = _Rolesets.of(candidates)
        if not rolesets.groups or rolesets.prefill is None:
            raise not_selected()
        decode = self._decode_scores(request, candidates, now)
        best, index, group = inf, -1, ("", "", "")
        if not can_be_divided(request.body):
            index = min(rolesets.decode, key=decode.__getitem__)
            legs = Legs(_group(candidates.pods[index]), candidates.ledger)
        else:
            leg = RoutingRequest(request.model, request.prompt_tokens, 1, lambda: request.text, user=request.user)
            prefill: list[float] = self._delays.scores(leg, rolesets.prefill, now).tolist()
            place = -1
            for name, roleset in rolesets.groups.items():
                first = min(roleset.prefill, key=prefill.__getitem__)
                second = min(roleset.decode, key=decode.__getitem__)
                if index < 0 or prefill[first] + decode[second] < best:
                    best, place, index, group = prefill[first] + decode[second], first, second, name
            legs = Legs(group, candidates.ledger)
            legs.request = leg
            legs.pod = rolesets.prefill.pods[place]
        if request.notes is None:
            request.notes = {}
        request.notes[LEGS] = legs
        return index

    def next_best(
        self, request: RoutingRequest, candidates: Candidates, first: int, count: int, now: float
    ) -> list[int]:
        """Other decode pods of the roleset: its prefill can be fetched by any of them."""
        assert request.notes is not None
        legs: Legs = request.notes[LEGS]
        scores = self._decode_scores(request, candidates, now)
        others = [index for index in _Rolesets.of(candidates).groups[legs.group].decode if index != first]
        return sorted(others, key=scores.__getitem__)[:count]

    def prepare(self, candidates: Candidates, now: float) -> None:
        """Learn from the last polls of both."""
        self._delays.prepare(candidates, now)
        if candidates.prefill is not None and candidates.prefill.pods:
            self._delays.prepare(candidates.prefill, now)

    def chosen(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """Charge the pod that prefills, and remember that it will hold the prompt."""
        assert request.notes is not None
        legs: Legs = request.notes[LEGS]
        prefill = candidates.prefill
        if legs.pod is None or legs.request is None or prefill is None:
            request.uncached_tokens = request.prompt_tokens
            self._delays.delays(candidates, now).promise(index, request.prompt_tokens, request.prompt_tokens, now)
            return
        request.uncached_tokens = 0
        self._send(legs, prefill, prefill.pods.index(legs.pod), now)

    def again(self, legs: Legs, candidates: Candidates | None, now: float) -> bool:
        """Choose another pod of the same roleset for the prompt, of those that are candidates now, and charge it.
        False where there is none."""
        legs.pod = None
        prefill = candidates.prefill if candidates is not None else None
        if prefill is None or legs.request is None:
            return False
        tried = [(pod.slot, pod.generation) for pod in legs.tried]
        others = [
            place
            for place, pod in enumerate(prefill.pods)
            if _group(pod) == legs.group and (pod.slot, pod.generation) not in tried
        ]
        if not others:
            return False
        scores: list[float] = self._delays.scores(legs.request, prefill, now).tolist()
        self._send(legs, prefill, min(others, key=scores.__getitem__), now)
        return True

    def _send(self, legs: Legs, prefill: Candidates, place: int, now: float) -> None:
        assert legs.request is not None
        self._delays.chosen(legs.request, prefill, place, now)
        legs.charge(prefill.pods[place])

    def _decode_scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> list[float]:
        """Seconds of delay by the answer alone."""
        delays = self._delays.up_to_date(candidates, now)
        prompt = float(request.prompt_tokens)
        output = delays.speeds.output_tokens
        if 0 < request.max_tokens < output:
            output = float(request.max_tokens)
        full = delays.wait_for_room(prompt) if delays.may_be_full(prompt) else 0
        delays.score(prompt, output, 0.0, 0.0, 0.0)
        if full:
            delays.add_waits_for_room()
        return delays.scores()


def can_be_divided(body: Body | None) -> bool:
    """Whether one pod's prefill is all that another needs for the answer: of one prompt and one answer it is."""
    if body is None:
        return True
    document = body.json
    if body.kind not in ("chat", "completion") or document is None:
        return False
    prompt = document.get("prompt")
    several = type(prompt) is list and len(prompt) != 1 and type(prompt[0]) is not int
    once = all(document.get(name) in (None, 1) for name in ("n", "best_of"))
    return once and not several and not any(document.get(name) for name in _INDIVISIBLE)


def _group(pod: Pod) -> _Group:
    record = pod.record
    return record.namespace, record.roleset, engine_of(pod)
