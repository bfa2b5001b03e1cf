"""The scraper over real HTTP: pods fail and come back, and a restarted scraper carries on where its predecessor was."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from fleet import end_of, in_child, make_tables
from waiting import until

from state.pods import COLUMN, Health
from state.tables import REPLICATOR, SCRAPER, Tables
from workers.config import Config, LogConfig, load
from workers.process import run_child
from workers.scrape.page import Sample
from workers.scraper import Scraper, run_scraper

PAGE = (Path(__file__).parent.parent / "fixtures/vllm-0.32/metrics-after-4-requests.txt").read_bytes()


class Engine:
    """A pod's metrics page. `answers` is what it says: 200, 500, or 0 to hang up."""

    def __init__(self) -> None:
        self.answers = 200
        self.polls = 0
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                self.polls += 1
                if not self.answers:
                    break
                head = b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n" % (self.answers, len(PAGE))
                writer.write(head + PAGE)
                await writer.drain()
        writer.close()


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(2):
            engine = Engine()
            server = await stack.enter_async_context(await asyncio.start_server(engine.serve, "127.0.0.1", 0))
            engine.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            made.append(engine)
        yield made
        await asyncio.sleep(0)


def configuration(folder: Path, engines: list[Engine]) -> Config:
    addresses = ", ".join(f"'{engine.address}'" for engine in engines)
    (folder / "e.yaml").write_text(f"models: [{{name: m, endpoints: [{addresses}]}}]")
    scrape = {"interval_min_seconds": 0.02, "interval_max_seconds": 0.03, "timeout_seconds": 0.5, "failures": 3}
    return load(None, {"endpoints": folder / "e.yaml", "scrape": scrape})


@contextlib.asynccontextmanager
async def running(config: Config, tables: Tables) -> AsyncIterator[Scraper]:
    scraper = Scraper(config, tables)
    await scraper.discover()
    async with tasks_of(scraper):
        yield scraper


@contextlib.asynccontextmanager
async def tasks_of(scraper: Scraper) -> AsyncIterator[None]:
    task = asyncio.ensure_future(scraper.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for slot in list(scraper._pods):
            scraper._unwatch(slot)
        if scraper._timer is not None:
            scraper._timer.cancel()
        await asyncio.sleep(0)


def states(tables: Tables) -> list[Health]:
    return [Health(int(row[COLUMN["health"]])) for row in tables.pods.snapshot()[1]]


async def test_a_pod_that_never_answers_is_told_of_once(tmp_path: Path, engines: list[Engine]) -> None:
    tables = make_tables(writer=SCRAPER)
    engines[1].answers = 500
    with structlog.testing.capture_logs() as logs:
        async with running(configuration(tmp_path, engines), tables):
            await until(lambda: tables.pods.snapshot()[1][1][COLUMN["failed_polls"]] >= 5)
        assert states(tables) == [Health.READY, Health.UNSEEN]
    told = [entry for entry in logs if entry["event"] == "a pod is not ready"]
    assert [(entry["address"], entry["why"]) for entry in told] == [(engines[1].address, "status 500")]


async def test_pods_become_ready_fail_and_come_back(tmp_path: Path, engines: list[Engine]) -> None:
    tables = make_tables(writer=SCRAPER)
    async with running(configuration(tmp_path, engines), tables):
        await until(lambda: states(tables) == [Health.READY, Health.READY])
        engines[1].answers = 500
        await until(lambda: states(tables) == [Health.READY, Health.FAILED])
        engines[1].answers = 0
        polls = engines[1].polls
        await until(lambda: engines[1].polls > polls)
        assert states(tables) == [Health.READY, Health.FAILED]
        engines[1].answers = 200
        await until(lambda: states(tables) == [Health.READY, Health.READY])


async def test_a_restarted_scraper_makes_no_failed_pod_ready(tmp_path: Path, engines: list[Engine]) -> None:
    tables = make_tables(writer=SCRAPER)
    config = configuration(tmp_path, engines)
    async with running(config, tables):
        await until(lambda: states(tables) == [Health.READY, Health.READY])
        engines[1].answers = 500
        await until(lambda: states(tables) == [Health.READY, Health.FAILED])
    before = tables.catalog.read()
    seen = set()
    async with running(config, tables):
        polls = engines[1].polls

        def look() -> bool:
            seen.add(states(tables)[1])
            return engines[1].polls >= polls + 3

        await until(look)
        assert seen == {Health.FAILED}
        assert tables.catalog.read() == before
        engines[1].answers = 200
        await until(lambda: states(tables) == [Health.READY, Health.READY])


async def test_a_scraper_that_restarts_onto_a_bad_file_keeps_the_pods(tmp_path: Path, engines: list[Engine]) -> None:
    tables = make_tables(writer=SCRAPER)
    config = configuration(tmp_path, engines)
    async with running(config, tables):
        await until(lambda: states(tables) == [Health.READY, Health.READY])
    before = tables.catalog.read()
    (tmp_path / "e.yaml").write_text("models: [")
    async with running(config, tables):
        polls = [engine.polls for engine in engines]
        await until(lambda: all(engine.polls > was for engine, was in zip(engines, polls, strict=True)))
        assert tables.catalog.read() == before


async def test_failing_answers_eject_a_pod_but_never_the_last_that_could_serve(
    tmp_path: Path, engines: list[Engine]
) -> None:
    tables = make_tables(writer=SCRAPER)
    worker = Tables.attach(tables.segment.fd, 5)

    def fail(slot: int) -> None:
        for _ in range(5):
            charge = worker.ledger.charge(slot, 1, 1, held=True)
            worker.ledger.outcome(charge, ok=False)
            worker.ledger.release(charge, held=True)

    async with running(configuration(tmp_path, engines), tables) as scraper:
        await until(lambda: states(tables) == [Health.READY, Health.READY])
        fail(0)
        await until(lambda: states(tables) == [Health.EJECTED, Health.READY])
        fail(1)
        await until(lambda: scraper._pods[1].bad == 5)
        assert states(tables)[1] is Health.READY


async def test_a_pod_whose_only_peer_has_failed_is_not_ejected(tmp_path: Path, engines: list[Engine]) -> None:
    tables = make_tables(writer=SCRAPER)
    worker = Tables.attach(tables.segment.fd, 5)
    async with running(configuration(tmp_path, engines), tables) as scraper:
        await until(lambda: states(tables) == [Health.READY, Health.READY])
        engines[1].answers = 500
        await until(lambda: states(tables) == [Health.READY, Health.FAILED])
        for _ in range(5):
            worker.ledger.outcome(worker.ledger.charge(0, 1, 1, held=True), ok=False)
        await until(lambda: scraper._pods[0].bad == 5)
        assert states(tables)[0] is Health.READY


async def test_a_name_server_that_hangs_stops_neither_polls_nor_the_file(
    tmp_path: Path, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = make_tables(writer=SCRAPER)
    config = configuration(tmp_path, engines[:1])
    port = engines[0].address.rpartition(":")[2]
    path = tmp_path / "e.yaml"
    path.write_text(path.read_text().replace(engines[0].address, f"localhost:{port}"))
    async with running(config, tables):
        await until(lambda: states(tables) == [Health.READY])
    hangs = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hangs.wait(20) and [])
    try:
        scraper, asked = Scraper(config, tables), engines[0].polls
        monkeypatch.setattr(scraper, "discover", lambda: asyncio.sleep(20))
        async with tasks_of(scraper):
            await until(lambda: engines[0].polls > asked)  # before anything was discovered
        async with running(config, tables):
            path.write_text(path.read_text().replace("]}", f", 'slow.svc:1', '{engines[1].address}']}}"))
            await until(lambda: states(tables) == [Health.READY, Health.READY])
            assert not any(pod.draining for pod in tables.catalog.read()[1].pods)
    finally:
        hangs.set()


def test_a_name_server_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("models: [{name: m, endpoints: ['slow.svc:1', '127.0.0.1:9']}]")
    config = load(None, {"endpoints": tmp_path / "e.yaml"})
    tables = make_tables(writer=SCRAPER)
    read, write = os.pipe()

    def work() -> None:
        socket.getaddrinfo = lambda *_, **__: time.sleep(60)  # type: ignore[assignment, return-value]
        run_child("scraper", os.getppid(), LogConfig(), lambda: run_scraper(config, tables, lambda: os.close(write)))

    began = time.monotonic()
    pid = in_child(work)
    os.close(write)
    os.read(read, 1)
    os.kill(pid, signal.SIGTERM)
    assert end_of(pid) == 0
    assert time.monotonic() - began < 10
    os.close(read)
    assert [pod.address for pod in tables.catalog.read()[1].pods] == ["127.0.0.1:9"]


@pytest.mark.parametrize(("implausible", "left"), [((), 2), (("waiting",), 5)])
async def test_a_count_is_not_settled_by_numbers_that_cannot_be_true(
    tmp_path: Path, engines: list[Engine], implausible: tuple[str, ...], left: int
) -> None:
    tables = make_tables(writer=SCRAPER)
    scraper = Scraper(configuration(tmp_path, engines), tables)
    await scraper.discover()
    watched = scraper._pods[0]
    for _ in range(5):
        tables.ledger.charge(0, 100, 100, held=False)
    for poll in range(10):
        scraper._take(watched, Sample(running=2.0, implausible=implausible, found=1), 1000.0 + 3 * poll)
    assert tables.ledger.load(0)[0] == left
    stop_polling(scraper)


def stop_polling(scraper: Scraper) -> None:
    for slot in list(scraper._pods):
        scraper._unwatch(slot)
    if scraper._timer is not None:
        scraper._timer.cancel()


@pytest.mark.parametrize(("running", "left"), [(9.0, 5), (2.0, 2), (0.0, 0)])
async def test_what_other_replicas_have_in_flight_is_not_settled_here(
    tmp_path: Path, engines: list[Engine], running: float, left: int
) -> None:
    tables = make_tables(writer=SCRAPER)
    mirror = Tables.attach(tables.segment.fd, REPLICATOR).ledger
    scraper = Scraper(configuration(tmp_path, engines), tables)
    await scraper.discover()
    for _ in range(5):
        tables.ledger.charge(0, 100, 100, held=False)
    mirror.hold(0, 4, 400)
    for poll in range(10):
        scraper._take(scraper._pods[0], Sample(running=running, found=1), 1000.0 + 3 * poll)
    assert tables.ledger.load(0) == (left + 4, 100 * left + 400)
    assert tables.pods.row(0)[COLUMN["tracked_requests_at_sample"]] == left + 4
    mirror.hold(0, 0, 0)
    scraper._take(scraper._pods[0], Sample(running=running, found=1), 1040.0)
    assert tables.ledger.load(0) == (left, 100 * left)
    stop_polling(scraper)


async def test_samples_are_announced_together_and_health_at_once(tmp_path: Path, engines: list[Engine]) -> None:
    tables = make_tables(writer=SCRAPER)
    scraper = Scraper(configuration(tmp_path, engines), tables)
    await scraper.discover()
    first, second = scraper._pods[0], scraper._pods[1]
    epoch = tables.pods.epoch
    for watched in (first, second):
        scraper._take(watched, Sample(running=1.0, found=1), 1000.0)
    assert tables.pods.epoch == epoch + 2, "both are ready now"
    for poll in range(5):
        for watched in (first, second):
            scraper._take(watched, Sample(running=1.0, found=1), 1001.0 + poll)
    assert tables.pods.epoch == epoch + 2
    await until(lambda: tables.pods.epoch == epoch + 3)
    scraper._take(first, Sample(running=1.0, start_time_seconds=5.0, found=1), 1010.0)
    scraper._take(second, Sample(running=0.0, awake=0.0, found=1), 1010.0)
    assert tables.pods.epoch >= epoch + 4, "that it sleeps"
    stop_polling(scraper)
