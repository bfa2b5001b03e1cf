"""An ext_proc worker: a transport, the methods it serves, and the scheduler behind them."""

import asyncio
import time
from collections.abc import Callable
from hashlib import sha256
from secrets import token_bytes

import structlog

from router.access_log import AccessLog
from router.exchange import Exchanges
from router.handover import Prefills
from router.policy import NO_POLICY, Policy
from router.prefixes import Prefixes
from router.scheduler import Scheduler
from router.strategies import Context
from state.tables import Tables
from workers.calls import Method, Methods
from workers.config import Config
from workers.h2.limits import TransportCounters
from workers.health import EXT_PROC_SERVICE, HealthService
from workers.last_users import LastUsers
from workers.limits import open_gate
from workers.prefill import PrefillSender
from workers.process import Stop
from workers.transport import Meter, make_server, tls_context
from workers.wake import Waker

PROCESS = f"/{EXT_PROC_SERVICE}/Process"
STREAM_ACCESS_LOGS = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"

log = structlog.get_logger()

COPY_SECONDS = 1.0
"""Between two copies of the transport's counters into the shared tables."""
CATCH_UP_SECONDS = 0.05
"""Between two times that what the polls say is taken in. The scraper announces it no more often."""
_SECRET = token_bytes(32)
"""Made when this module is loaded, which the supervisor does before it forks: all workers have the same."""


def process_method(scheduler: Scheduler, max_body_bytes: int, policy: Policy = NO_POLICY) -> Method:
    """The ext_proc Process stream."""
    return Method(Exchanges(scheduler, max_body_bytes, policy).open, listens=True)


def methods(scheduler: Scheduler, health: HealthService, max_body_bytes: int, policy: Policy = NO_POLICY) -> Methods:
    """Everything a worker answers."""
    return {
        PROCESS: process_method(scheduler, max_body_bytes, policy),
        STREAM_ACCESS_LOGS: Method(lambda metadata: AccessLog(scheduler), listens=True),
        **health.methods(),
    }


def prefix_knowledge(config: Config, tables: Tables) -> Prefixes:
    """This worker's view of the prefixes that all workers of the replica sent somewhere."""
    prefix = config.prefix
    known = Prefixes.of(
        tables,
        seed=prefix.seed,
        block_bytes=prefix.block_bytes,
        homes=config.has_silent_replicas,
        max_blocks=prefix.blocks,
        ttl_seconds=prefix.ttl_seconds,
    )
    known.index.follow(time.monotonic(), limit=1 << 30)  # everything that predecessor and neighbours wrote
    return known


async def run_worker(
    config: Config, tables: Tables, index: int, ready: Callable[[], None], last_users: LastUsers | None = None
) -> None:
    """Serve until told to stop, then drain. `ready` is called once every address is listened on."""
    stop = Stop()
    health = HealthService()
    counters = TransportCounters()
    context = Context(
        prefixes=prefix_knowledge(config, tables),
        user_tokens=tables.user_tokens,
        session_secret=session_secret(config),
    )
    scheduler = Scheduler(
        tables, config.default_strategy, time.monotonic, context, retry_candidates=config.retry_candidates
    )
    waker = Waker()
    scheduler.wake = waker.ask
    sender = PrefillSender(config.pd.timeout_seconds, config.pd.connections)
    scheduler.prefills = Prefills(sender, config.pd.kv_connector)
    scheduler.passes_on = config.has_replicas
    async with open_gate(config, tables, scheduler.series, last_users) as gate:
        policy = Policy(gate, explain=config.explain, usage_metrics=config.usage_metrics)
        server = make_server(config, methods(scheduler, health, config.max_message_bytes, policy), counters)
        tls = tls_context(config.tls)
        await server.listen(config.listen, tls)
        await server.listen(config.worker_address(index), tls)
        ready()
        copying = asyncio.ensure_future(_copy_counters(Meter(counters, scheduler.series), scheduler))
        catching_up = asyncio.ensure_future(_catch_up(scheduler))
        await stop.wait()
        health.stop()
        policy.draining = True
        until = time.monotonic() + config.drain_seconds
        await server.stop(config.drain_seconds)
        await sender.close(until - time.monotonic())
        copying.cancel()
        catching_up.cancel()
        waker.close()


def session_secret(config: Config) -> bytes:
    """What session ids are made with: the configured secret, or one that lasts as long as the supervisor."""
    configured = config.session_secret.get_secret_value()
    return sha256(configured.encode()).digest() if configured else _SECRET


async def _catch_up(scheduler: Scheduler) -> None:
    while True:
        await asyncio.sleep(CATCH_UP_SECONDS)
        try:
            scheduler.catch_up()
        except Exception:
            scheduler.fleet.ahead = False  # then requests do it
            log.exception("the latest polls could not be processed")
            await asyncio.sleep(COPY_SECONDS)


async def _copy_counters(meter: Meter, scheduler: Scheduler) -> None:
    while True:
        try:
            meter.copy()
            scheduler.show_modes()
        except Exception:
            log.exception("the transport's counters could not be copied")
        await asyncio.sleep(COPY_SECONDS)
