"""The admin server: health, metrics and what the router believes, over HTTP, from a process of its own."""

import time
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from router.errors import error_body, error_type
from state.ledger import Entry
from state.pods import COLUMN, Health
from state.roster import Kind, Phase
from state.tables import REPLICATOR, Tables
from workers.address import parse_address
from workers.config import Config
from workers.metrics import TablesCollector
from workers.process import Stop

_IN_FLIGHT = ("requests", "tokens", "promised")
_COUNTED = (Entry.REQUESTS_HELD, Entry.TOKENS_HELD, Entry.CHOSEN, Entry.SUCCEEDED, Entry.FAILED)
"""What else of the ledger a person can read."""


class Admin:
    """The handlers."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._registry = CollectorRegistry()
        self._registry.register(TablesCollector(tables))

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application()
        application.add_routes(
            [
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
                web.get("/metrics", self.metrics),
                web.route("*", "/v1/models", self.models),
                web.route("*", "/v1/models/", self.models),
                web.route("*", "/v1/models/{model:.+}", self.model),
                web.get("/debug/pods", self.pods),
            ]
        )
        return application

    async def healthz(self, request: web.Request) -> web.Response:
        """This process answers."""
        return web.json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        """200 once every worker listens and discovery has loaded; else 503 that says what is missing."""
        missing = []
        # A worker may be two processes for a while: one that serves and its successor, or its predecessor.
        phases: dict[int, set[Phase]] = {}
        for process in self._tables.roster.processes():
            if process.kind is Kind.WORKER:
                phases.setdefault(process.number, set()).add(process.phase)
        workers = [number for number, found in phases.items() if Phase.READY in found]
        if not workers:
            missing.append("no worker is ready")
        for number, found in sorted(phases.items()):
            if Phase.READY not in found and found != {Phase.DRAINING}:
                how = {Phase.STARTING: "is starting", Phase.HUNG: "hangs"}
                missing.append(f"worker {number} {next((how[phase] for phase in how if phase in found), 'is down')}")
        if self._tables.catalog.version == 0:
            missing.append("discovery has not loaded")
        if missing:
            return web.json_response({"status": "not ready", "missing": missing}, status=503)
        _, document = self._tables.catalog.read()
        pods = sum(not pod.draining for pod in document.pods)
        return web.json_response({"status": "ready", "workers": len(workers), "pods": pods})

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus text format."""
        return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self, request: web.Request) -> web.Response:
        """OpenAI's list of models, with AIBrix's fields."""
        if request.method != "GET":
            return _json({"error": "method not allowed"}, status=405)
        return _json({"object": "list", "data": [_model(name) for name in sorted(self._served())]})

    async def model(self, request: web.Request) -> web.Response:
        """One of them, or 404."""
        if request.method != "GET":
            return _json({"error": "method not allowed"}, status=405)
        name = request.match_info["model"]
        if name in self._served():
            return _json(_model(name))
        body = error_body(f"The model `{name}` does not exist", error_type(404), "model_not_found", "model")
        return web.Response(body=body, status=404, content_type="application/json")

    def _served(self) -> set[str]:
        _, document = self._tables.catalog.read()
        return {name for pod in document.pods if not pod.draining for name in pod.models}

    async def pods(self, request: web.Request) -> web.Response:
        """Everything the router believes of each pod."""
        tables = self._tables
        version, document = tables.catalog.read()
        _, rows = tables.pods.snapshot()
        totals = {entry.name.lower(): tables.ledger.totals(entry, tables.pods.high).tolist() for entry in _COUNTED}
        in_flight = tables.ledger.of_this_replica(tables.pods.high, REPLICATOR).tolist()
        now = time.monotonic()
        listed = []
        for pod in document.pods:
            if pod.slot >= len(rows):
                continue
            row = rows[pod.slot]
            sampled = float(row[COLUMN["sampled_at"]])
            requests, tokens = tables.ledger.held_by(REPLICATOR, pod.slot)
            own = dict(zip(_IN_FLIGHT, (counts[pod.slot] for counts in in_flight), strict=True))
            own |= {name: counts[pod.slot] for name, counts in totals.items()}
            own["requests_held"] -= requests
            own["tokens_held"] -= tokens
            listed.append(
                {
                    "name": pod.name,
                    "namespace": pod.namespace,
                    "address": pod.address,
                    "models": pod.models,
                    "engine": pod.engine,
                    "role": pod.role,
                    "roleset": pod.roleset,
                    "labels": pod.labels,
                    "slot": pod.slot,
                    "generation": pod.generation,
                    "draining": pod.draining,
                    "health": Health(int(row[COLUMN["health"]])).name.lower(),
                    "failed_polls": int(row[COLUMN["failed_polls"]]),
                    "sample_age_seconds": round(now - sampled, 3) if sampled > 0 else None,
                    "own": own,
                    "elsewhere": {"requests": requests, "tokens": tokens},
                    "engine_metrics": _known(row),
                }
            )
        return web.Response(
            body=orjson.dumps({"catalog_version": version, "pods": listed}, option=orjson.OPT_INDENT_2),
            content_type="application/json",
        )


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "aibrix"}


def _json(document: dict[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(document), status=status, content_type="application/json")


def _known(row: Any) -> dict[str, float]:
    return {
        name: float(row[column])
        for name, column in COLUMN.items()
        if column >= COLUMN["running"] and row[column] == row[column]
    }


async def run_admin(config: Config, tables: Tables, ready: Callable[[], None]) -> None:
    """Serve until told to stop."""
    stop = Stop()
    runner = web.AppRunner(Admin(tables).application(), access_log=None, handle_signals=False)
    await runner.setup()
    kind, host, port = parse_address(config.admin)
    site: web.BaseSite
    if kind == "unix":
        site = web.UnixSite(runner, host)
    else:
        site = web.TCPSite(runner, host, port, reuse_address=True)
    await site.start()
    ready()
    await stop.wait()
    await runner.cleanup()
