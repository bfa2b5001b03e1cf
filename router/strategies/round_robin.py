"""One pod after the other."""

from typing import ClassVar

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Context, Strategy


class RoundRobin(Strategy):
    """The candidate after the one chosen last, per model, in the order of their slots. Each worker keeps its own
    turn and begins at a random place, so that several workers do not march in step."""

    name: ClassVar[str] = "round-robin"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._last_slot: dict[str, int] = {}

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The first candidate with a higher slot than the last one chosen, else the first of all."""
        pods = candidates.pods
        last = self._last_slot.get(request.model)
        if last is None:
            index = int(self.context.random.random() * len(pods))
        else:
            index = next((i for i, pod in enumerate(pods) if pod.slot > last), 0)
        self._last_slot[request.model] = pods[index].slot
        return index
