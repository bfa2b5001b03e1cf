"""The admin server's answers, over HTTP."""

from collections.abc import AsyncIterator

import pytest
from aiohttp.test_utils import TestClient, TestServer
from fleet import make_fleet, make_record, make_tables, set_row
from prometheus_client.parser import text_string_to_metric_families

from state.catalog import CatalogDocument
from state.pods import Health
from state.roster import Kind, Phase, Process
from state.tables import Tables
from workers.admin import Admin


class Site:
    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.client: TestClient = TestClient(TestServer(Admin(tables).application()))

    async def get(self, path: str) -> tuple[int, dict[str, object]]:
        async with self.client.get(path) as response:
            return response.status, await response.json()

    def worker(self, number: int, *phases: Phase) -> None:
        """The processes of one worker."""
        for offset, phase in enumerate(phases):
            row = 3 + 3 * number + offset
            self.tables.roster.put(row, Process(Kind.WORKER, number, row, phase, 0))


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site(make_fleet(2))
    async with site.client:
        yield site


@pytest.fixture
async def bare() -> AsyncIterator[Site]:
    site = Site(make_tables())
    async with site.client:
        yield site


async def test_healthz(bare: Site) -> None:
    assert await bare.get("/healthz") == (200, {"status": "ok"})


async def test_not_ready_before_anything_is_there(bare: Site) -> None:
    status, body = await bare.get("/readyz")
    assert status == 503
    assert body["missing"] == ["no worker is ready", "discovery has not loaded"]


@pytest.mark.parametrize(
    ("workers", "missing"),
    [
        ([[Phase.READY], [Phase.READY]], []),
        ([[Phase.READY], [Phase.STARTING]], ["worker 1 is starting"]),
        ([[Phase.DOWN], [Phase.READY]], ["worker 0 is down"]),
        ([[Phase.READY, Phase.STARTING], [Phase.READY]], []),  # a rolling restart
        ([[Phase.DRAINING, Phase.READY], [Phase.READY]], []),
        ([[Phase.READY], [Phase.DRAINING]], []),  # one worker less
        ([[Phase.DRAINING, Phase.STARTING], [Phase.READY]], ["worker 0 is starting"]),
        ([[Phase.DRAINING], [Phase.DRAINING]], ["no worker is ready"]),
    ],
)
async def test_ready_means_every_worker_listens(site: Site, workers: list[list[Phase]], missing: list[str]) -> None:
    for number, phases in enumerate(workers):
        site.worker(number, *phases)
    status, body = await site.get("/readyz")
    assert (status, body.get("missing", [])) == (503 if missing else 200, missing)


async def test_the_number_of_workers_and_of_pods(site: Site) -> None:
    site.worker(0, Phase.DRAINING, Phase.READY)
    site.worker(1, Phase.READY)
    site.tables.catalog.publish(CatalogDocument((make_record(0), make_record(1, draining=True))))
    assert await site.get("/readyz") == (200, {"status": "ready", "workers": 2, "pods": 1})
    site.tables.catalog.publish(CatalogDocument(()))
    assert await site.get("/readyz") == (200, {"status": "ready", "workers": 2, "pods": 0})


async def test_models(site: Site) -> None:
    records = (make_record(0, models=("b", "a")), make_record(1, models=("c",), draining=True))
    site.tables.catalog.publish(CatalogDocument(records))
    status, body = await site.get("/v1/models")
    assert status == 200
    assert body == {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": "aibrix"} for name in ("a", "b")],
    }


async def test_one_model(site: Site) -> None:
    site.tables.catalog.publish(CatalogDocument((make_record(0, models=("org/a",)),)))
    assert await site.get("/v1/models/org/a") == (
        200,
        {"id": "org/a", "object": "model", "created": 0, "owned_by": "aibrix"},
    )
    status, body = await site.get("/v1/models/b")
    assert (status, body["error"]["code"]) == (404, "model_not_found")  # type: ignore[index]
    async with site.client.delete("/v1/models/org/a") as response:
        assert response.status == 405


async def test_metrics(site: Site) -> None:
    site.tables.series(4).add(1.0, "decisions", "m", "p", "random")
    async with site.client.get("/metrics") as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/plain")
        text = await response.text()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"pointsman_decisions", "pointsman_in_flight", "pointsman_decision_seconds"} <= names


async def test_debug_pods_says_what_the_router_believes(site: Site) -> None:
    tables = site.tables
    charge = tables.ledger.charge(0, 70, 50, held=True)
    tables.ledger.outcome(charge, ok=False)
    set_row(tables, 0, Health.EJECTED, running=3.0, itl_mean_seconds=float("inf"))
    tables.pods.claim(1, 2)
    _, body = await site.get("/debug/pods")
    first, second = body["pods"]  # type: ignore[misc]
    assert (first["name"], first["address"], first["health"]) == ("pod-0", "10.0.0.1:8000", "ejected")
    assert first["own"] == {
        "requests": 1, "tokens": 70, "promised": 50, "requests_held": 1, "tokens_held": 70, "chosen": 1,
        "succeeded": 0, "failed": 1,
    }  # fmt: skip
    assert first["engine_metrics"]["running"] == 3.0
    assert first["sample_age_seconds"] is not None
    assert (second["health"], second["sample_age_seconds"], second["engine_metrics"]) == ("unseen", None, {})
    assert (first["failed_polls"], second["failed_polls"]) == (0, 0)
    assert body["catalog_version"] == 1


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/metrics", "/debug/pods"])
async def test_only_get(site: Site, path: str) -> None:
    async with site.client.post(path) as response:
        assert response.status == 405


async def test_the_list_of_models_is_only_got(site: Site) -> None:
    for method in ("POST", "DELETE", "HEAD", "PROPFIND"):
        async with site.client.request(method, "/v1/models") as response:
            assert (response.status, response.content_type) == (405, "application/json")
            if method != "HEAD":
                assert await response.read() == b'{"error":"method not allowed"}'


async def test_what_is_not_there(site: Site) -> None:
    async with site.client.get("/") as response:
        assert response.status == 404
