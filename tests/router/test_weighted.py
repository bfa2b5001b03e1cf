import random
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import orjson
import pytest

from router.errors import RequestError
from router.fleet import Candidates, Pod
from router.request import RoutingRequest
from router.strategies import STRATEGIES
from router.strategies.base import Context, Scoring
from router.strategies.weighted import MAX_COMPILED, Strategies, Weighted, parse_strategy, scaled
from state.catalog import PodRecord
from state.pods import FIELDS, Floats
from state.tables import Capacity, Tables

KNOWN = {*STRATEGIES, "pd", "slo", "slo-pack-load"}


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = Tables.create(Capacity(pods=8, writers=4, catalog_bytes=4096, series=64), writer=3)
    tables.ledger.admit(3)
    yield tables


def candidates(tables: Tables, requests: list[int], **columns: list[float]) -> Candidates:
    pods = []
    values = np.full((len(requests), len(FIELDS)), np.nan)
    values[:, : FIELDS.index("running")] = 0.0
    for slot, count in enumerate(requests):
        tables.pods.claim(slot, 1)
        pods.append(Pod(PodRecord(slot, 1, f"pod-{slot}", f"10.0.0.{slot}:8000", ("m",))))
        for _ in range(count):
            tables.ledger.charge(slot, 0, 0, held=True)
    for name, column in columns.items():
        values[:, FIELDS.index(name)] = column
    return Candidates(tables, pods, values)


class Fixed(Scoring):
    """Scores set from outside."""

    name: ClassVar[str] = "fixed"

    def __init__(self, *scores: float) -> None:
        super().__init__(Context(random.Random(1)))
        self.given = np.array(scores)
        self.heard: list[int] = []

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        return self.given

    def chosen(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        self.heard.append(index)


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("least-request", (("least-request", 1),)),
        ("least-request:5", (("least-request", 5),)),
        (" least-request : +2 , throughput ", (("least-request", 2), ("throughput", 1))),
        ("least-request:0,throughput:1000000", (("throughput", 1000000),)),
        ("nobody:0,throughput", (("throughput", 1),)),
        ("throughput,throughput:2", (("throughput", 3),)),
        ("least-request,pd:7", (("pd", 1),)),
        ("least-request,slo-pack-load,pd", (("slo-pack-load", 1),)),
        ("random:3", (("random", 3),)),
        ("least-request:007", (("least-request", 7),)),
    ],
)
def test_values_understood(value: str, items: object) -> None:
    assert parse_strategy(value, KNOWN) == items


REFUSED = [
    "",
    " ",
    ",",
    "least-request,",
    ",least-request",
    "nobody",
    "least-request,nobody",
    "Least-Request",
    "least-request:",
    "least-request:1:2",
    ":1",
    "least-request:-1",
    "least-request:1.5",
    "least-request:1000001",
    "least-request:1e3",
    "least-request:1_0",
    "least-request:x",
    "least-request:٣",
    "least-request:0",
    "least-request:0,throughput:0",
    "slo-nobody,least-request",
    "least-request," * 200 + "throughput",
]


@pytest.mark.parametrize("value", REFUSED)
def test_values_refused(value: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_strategy(value, KNOWN)
    error = caught.value
    assert (error.status, error.headers) == (400, (("x-error-routing", b"true"),))
    assert orjson.loads(error.body())["error"] == {
        "message": f"incorrect routing strategy {value if len(value) <= 256 else value[:256] + '…'}",
        "type": "invalid_request_error",
        "code": None,
        "param": None,
    }


@pytest.mark.parametrize("value", ["random,least-request", "least-request,power-of-two:2", "round-robin,throughput"])
def test_what_has_no_score_cannot_be_weighed(value: str) -> None:
    with pytest.raises(RequestError, match="incorrect routing strategy"):
        Strategies(STRATEGIES, Context(random.Random(1))).get(value)


def test_one_instance_of_each_kind_serves_alone_and_in_combinations() -> None:
    strategies = Strategies(STRATEGIES, Context(random.Random(1)))
    combined = strategies.get("least-request,throughput:2")
    assert isinstance(combined, Weighted)
    assert combined.parts[0][0] is strategies.get("least-request") is strategies.get("least-request:3")
    assert strategies.get("least-request,throughput:2") is combined


def test_values_made_up_by_clients_do_not_pile_up() -> None:
    strategies = Strategies(STRATEGIES, Context(random.Random(1)))
    for weight in range(1, 3000):
        strategies.get(f"least-request:{weight},throughput")
        strategies.get(f"least-request:{weight}")
    assert len(strategies._combined) <= MAX_COMPILED
    assert len(strategies._single) == 2


def test_a_spread_of_a_unit_or_more_is_stretched_and_a_smaller_one_is_not() -> None:
    assert scaled(np.array([0.0, 50.0, 100.0]), 4.0).tolist() == [0.0, 0.5, 1.0]  # type: ignore[union-attr]
    assert scaled(np.array([0.0, 1.0]), 4.0).tolist() == [0.0, 0.25]  # type: ignore[union-attr]
    near = scaled(np.array([100.0, 101.0]), 4.0)
    assert near is not None and near.max() < 0.05
    assert scaled(np.array([0.5, 0.51]), 0.2).max() < 0.1  # type: ignore[union-attr]


def test_unknown_infinite_and_equal_scores() -> None:
    nan, inf = np.nan, np.inf
    assert scaled(np.array([nan, nan]), 1.0) is None
    assert scaled(np.array([0.0, nan, 4.0]), 1.0).tolist() == [0.0, 0.5, 1.0]  # type: ignore[union-attr]
    assert scaled(np.array([0.0, inf, 4.0]), 1.0).tolist() == [0.0, 1.0, 1.0]  # type: ignore[union-attr]
    assert scaled(np.array([inf, nan]), 1.0).tolist() == [1.0, 0.0]  # type: ignore[union-attr]
    assert scaled(np.array([3.0, 3.0]), 0.0).tolist() == [0.0, 0.0]  # type: ignore[union-attr]
    assert scaled(np.array([0.0, 0.0]), 0.0).tolist() == [0.0, 0.0]  # type: ignore[union-attr]


def test_weights_decide_between_strategies_that_disagree(tables: Tables) -> None:
    pods = candidates(tables, [0, 0])
    left, right = Fixed(0.0, 10.0), Fixed(10.0, 0.0)
    request = RoutingRequest("m")
    assert Weighted(Context(random.Random(1)), [(left, 3.0), (right, 1.0)]).pick(request, pods, 0.0) == 0
    assert Weighted(Context(random.Random(1)), [(left, 1.0), (right, 3.0)]).pick(request, pods, 0.0) == 1


def test_a_strategy_that_knows_nothing_has_no_say(tables: Tables) -> None:
    pods = candidates(tables, [3, 0])
    nothing, right = Fixed(np.nan, np.nan), Fixed(10.0, 0.0)
    weighted = Weighted(Context(random.Random(1)), [(nothing, 1000.0), (right, 1.0)])
    assert weighted.scores(RoutingRequest("m"), pods, 0.0).tolist() == [1.0, 0.0]
    weighted = Weighted(Context(random.Random(1)), [(nothing, 1.0)])
    assert weighted.pick(RoutingRequest("m"), pods, 0.0) == 1  # the fewest requests
    assert weighted.fallbacks == 1


def test_every_part_hears_of_the_choice(tables: Tables) -> None:
    parts = [Fixed(1.0, 0.0), Fixed(0.0, 0.0)]
    Weighted(Context(random.Random(1)), [(part, 1.0) for part in parts]).chosen(
        RoutingRequest("m"), candidates(tables, [0, 0]), 1, 0.0
    )
    assert [part.heard for part in parts] == [[1], [1]]


def test_one_request_more_does_not_outweigh_a_cold_cache(tables: Tables) -> None:
    pods = candidates(tables, [1, 0], kv_usage=[0.1, 0.9], num_gpu_blocks=[1000, 1000], block_size=[16, 16])
    combined = Strategies(STRATEGIES, Context(random.Random(1))).get("least-request,least-gpu-cache")
    assert {combined.pick(RoutingRequest("m"), pods, 0.0) for _ in range(20)} == {0}
    busy = candidates(tables, [40, 0], kv_usage=[0.1, 0.2], num_gpu_blocks=[1000, 1000], block_size=[16, 16])
    assert {combined.pick(RoutingRequest("m"), busy, 0.0) for _ in range(20)} == {1}


def test_equals_are_taken_at_random(tables: Tables) -> None:
    pods = candidates(tables, [0] * 4)
    context = Context(random.Random(5))
    weighted = Weighted(context, [(Fixed(1.0, 1.0, 1.0, 1.0), 1.0)])
    assert {weighted.pick(RoutingRequest("m"), pods, 0.0) for _ in range(200)} == {0, 1, 2, 3}
