"""Several strategies at once: `routing-strategy: prefix-cache:2,least-request`.

    value   = item *("," item)
    item    = name [":" weight]        weight 0..1000000, 1 if absent; 0 leaves the item out

As in AIBrix, `pd` and the `slo` family go alone: the first such item is used and the others are dropped. All others
must be formulas (`Scoring`): `random`, `round-robin` and `power-of-two` have no scores.
"""

import re
from collections import OrderedDict
from collections.abc import Container, Mapping
from typing import ClassVar, Final

import numpy as np

from router.errors import bad_strategy
from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Context, Scoring, Strategy
from state.pods import Floats

HEAVIEST: Final = 1_000_000
MAX_VALUE_LENGTH: Final = 1024
MAX_COMPILED: Final = 256

UNITS: Final[Mapping[str, float]] = {
    "least-request": 4.0,
    "least-kv-cache": 0.2,
    "least-gpu-cache": 0.2,
    "least-utilization": 0.2,
    "least-busy-time": 0.2,
    "least-latency": 0.1,
    "throughput": 500.0,
    "session-affinity": 1.0,
}
"""The least spread of a strategy's scores, in its own unit, that counts in full: four requests, a fifth of a cache,
a tenth of a second, 500 tokens/s. A strategy may say its own as class attribute `unit`."""
RELATIVE_UNIT: Final = 0.25
"""The same as a share of the mean score: among pods with a hundred requests each, 25 more are what counts in full."""

_WEIGHT: Final = re.compile(r"[+-]?[0-9]{1,18}")

Items = tuple[tuple[str, int], ...]


def parse_strategy(value: str, available: Container[str]) -> Items:
    """Names and weights of a `routing-strategy`, repeats added up. Raises RequestError 400 for whatever is wrong."""
    if len(value) > MAX_VALUE_LENGTH:
        raise bad_strategy(value)
    items: dict[str, int] = {}
    for part in value.split(","):
        name, colon, text = part.partition(":")
        name = name.strip()
        weight = 1
        if colon:
            text = text.strip()
            if not _WEIGHT.fullmatch(text):
                raise bad_strategy(value)
            weight = int(text)
        if not name or not 0 <= weight <= HEAVIEST:
            raise bad_strategy(value)
        if weight:
            items[name] = items.get(name, 0) + weight
    alone = next((name for name in items if name == "pd" or name.startswith("slo")), None)
    if alone is not None:
        items = {alone: 1}
    if not items or not all(name in available for name in items):
        raise bad_strategy(value)
    return tuple(items.items())


class Weighted(Scoring):
    """score = sum of weight_k * cost_k / sum of weight_k, over the strategies k that know anything. [0..1]

    cost_k of pod i = (s_ki - min s_k) / max(max s_k - min s_k, unit_k, mean |s_k| / 4)

    where s_k are strategy k's own scores, lower is better. A spread of at least one unit is stretched to 0..1, as
    AIBrix does with any spread; a smaller one stays small, so that one request more or a percent of cache less does
    not weigh like a cold prefix. A pod whose score is not known costs the mean of the others, an infinite one costs 1;
    a strategy that knows nothing of any pod has no say.
    """

    name: ClassVar[str] = "weighted"

    def __init__(self, context: Context, parts: list[tuple[Scoring, float]]) -> None:
        super().__init__(context)
        self.parts = parts
        self._units = [float(getattr(part, "unit", UNITS.get(part.name, 0.0))) for part, _ in parts]
        self._hear = told([part for part, _ in parts])

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """The weighted cost; all NaN if nobody knows anything."""
        total = np.zeros(len(candidates))
        weights = 0.0
        for (part, weight), unit in zip(self.parts, self._units, strict=True):
            cost = scaled(part.scores(request, candidates, now), unit)
            if cost is not None:
                total += weight * cost
                weights += weight
        if not weights:
            return np.full(len(candidates), np.nan)
        return total / weights

    def prepare(self, candidates: Candidates, now: float) -> None:
        """Every part does."""
        for part, _ in self.parts:
            part.prepare(candidates, now)

    def chosen(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """Every part hears of the choice, but the prompt is remembered and its prefill promised once."""
        for part in self._hear:
            part.chosen(request, candidates, index, now)

    def used(self, user: str, counted: int, input_tokens: int, output_tokens: int, now: float) -> None:
        """Every part hears of it."""
        for part, _ in self.parts:
            part.used(user, counted, input_tokens, output_tokens, now)


def told(parts: list[Scoring]) -> list[Scoring]:
    """Those whose `chosen` is called: of the ones that promise, the best at it, and the first of equals."""
    best = max(parts, key=lambda part: part.promises)
    return [part for part in parts if part is best or not part.promises]


def scaled(scores: Floats, unit: float) -> Floats | None:
    """Costs from 0 (best) to at most 1 for scores of which lower is better; None if all are unknown."""
    known = scores[np.isfinite(scores)]
    if not len(known):
        return None if np.isnan(scores).all() else np.where(np.isposinf(scores), 1.0, 0.0)
    lowest = float(known.min())
    spread = max(float(known.max()) - lowest, unit, RELATIVE_UNIT * float(np.abs(known).mean()))
    if not spread:
        spread = 1.0
    costs: Floats = (scores - lowest) / spread
    costs[np.isnan(scores)] = float(known.mean() - lowest) / spread
    np.clip(costs, 0.0, 1.0, out=costs)
    return costs


class Strategies:
    """One process's strategies by header value: one instance of each kind, and the combinations last asked for."""

    def __init__(self, kinds: Mapping[str, type[Strategy]], context: Context) -> None:
        self._kinds = kinds
        self._context = context
        self._single: dict[str, Strategy] = {}
        self._combined: OrderedDict[str, Strategy] = OrderedDict()

    def get(self, value: str) -> Strategy:
        """The strategy for a `routing-strategy`, already trimmed. Raises RequestError 400."""
        found = self._single.get(value) or self._combined.get(value)
        return self._make(value) if found is None else found

    @property
    def made(self) -> list[Strategy]:
        """The single strategies that somebody has asked for so far."""
        return list(self._single.values())

    def _make(self, value: str) -> Strategy:
        if value in self._kinds:
            return self._one(value)
        items = parse_strategy(value, self._kinds)
        if len(items) == 1:
            made = self._one(items[0][0])
        else:
            parts: list[tuple[Scoring, float]] = []
            for name, weight in items:
                part = self._one(name)
                if not isinstance(part, Scoring):
                    raise bad_strategy(value)
                parts.append((part, float(weight)))
            made = Weighted(self._context, parts)
        while len(self._combined) >= MAX_COMPILED:
            self._combined.popitem(last=False)
        self._combined[value] = made
        return made

    def _one(self, name: str) -> Strategy:
        found = self._single.get(name)
        if found is None:
            found = self._single[name] = self._kinds[name](self._context)
        return found
