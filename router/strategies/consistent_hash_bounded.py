"""The same pod for the same conversation, as long as it is not overloaded."""

from bisect import bisect_left
from math import ceil
from typing import ClassVar

from xxhash import xxh3_64_intdigest

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Context, Strategy

POINTS = 100
KEY_BYTES = 1024
BOUND = 1.25


class ConsistentHashBounded(Strategy):
    """The first pod on the ring after hash(key) with fewer than ceil(1.25 * (all requests + 1) / pods) requests.

    key = session key, else user, else the first 1024 bytes of the prompt (256 tokens). 100 points per pod, by its name,
    so that a pod that comes or goes moves only its own share of keys. Source: Mirrokni, Thorup, Zadimoghaddam,
    "Consistent Hashing with Bounded Loads" (2016); key and bound as SMG 1.13 `prefix_hash`.
    """

    name: ClassVar[str] = "consistent-hash-bounded"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._rings: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The first pod on the ring that has room."""
        ring, owners = self._ring(candidates)
        requests = [max(count, 0) for count in candidates.requests().tolist()]  # see workers.scrape.settle
        room = ceil(BOUND * (sum(requests) + 1) / len(requests))
        key = (request.session_key or request.user).encode("utf-8", "surrogatepass") or request.text[:KEY_BYTES]
        place = bisect_left(ring, xxh3_64_intdigest(key, 1))
        for step in range(len(owners)):
            owner = owners[(place + step) % len(owners)]
            if requests[owner] < room:
                return owner
        raise AssertionError("some pod is always below the mean")

    def _ring(self, candidates: Candidates) -> tuple[list[int], list[int]]:
        found: tuple[list[int], list[int]] | None = candidates.derived.get(ConsistentHashBounded)
        if found is None:
            names = tuple(pod.generation for pod in candidates.pods)
            found = self._rings.get(names)
            if found is None:
                points = sorted(
                    (xxh3_64_intdigest(f"{pod.name}#{point}".encode()), i)
                    for i, pod in enumerate(candidates.pods)
                    for point in range(POINTS)
                )
                found = [point for point, _ in points], [i for _, i in points]
                if len(self._rings) >= 64:
                    self._rings.clear()
                self._rings[names] = found
            candidates.derived[ConsistentHashBounded] = found
        return found
