"""What the scraper makes of one page after another, by a clock of our own and without sockets."""

import re
from pathlib import Path
from typing import Any

from fleet import make_tables
from structlog.testing import capture_logs

from state.pods import COLUMN
from state.tables import FIRST_WORKER, SCRAPER, Tables
from workers.config import load
from workers.discovery.registry import FoundPod
from workers.scraper import Scraper

PAGE = (Path(__file__).parent.parent / "fixtures/vllm-0.32/metrics-after-4-requests.txt").read_bytes()


class World:
    def __init__(self) -> None:
        self.tables = make_tables(writer=SCRAPER)
        self.now = 100.0
        self.scraper = self.start()
        self.scraper._registry.update([FoundPod("127.0.0.1:1", "p", ("m",), metrics_address="127.0.0.1:1")], {}, 0.0)
        self.watch()

    def start(self) -> Scraper:
        return Scraper(load(None, {}), self.tables, lambda: self.now)

    def watch(self) -> None:
        self.scraper._watch(0, self.scraper._registry.pods[0])

    def poll(self, page: bytes) -> Any:
        self.now += 1.0
        watched = self.scraper._pods[0]
        self.scraper._take(watched, watched.reader.read(page), self.now)
        return self.tables.pods.row(0)


def page(running: int) -> bytes:
    return re.sub(rb"(?m)^(vllm:num_requests_running\S*) .*$", rb"\1 %d" % running, PAGE)


async def test_no_tokens_stay_behind_when_a_charge_is_settled() -> None:
    world = World()
    worker = Tables.attach(world.tables.segment.fd, FIRST_WORKER).ledger
    worker.charge(0, 100_000, 100_000, held=False)  # its log entry is lost
    goes_on = worker.charge(0, 1_000, 1_000, held=False)
    for _ in range(20):
        world.poll(page(1))
    worker.release(goes_on, held=False)
    for _ in range(3):
        world.poll(page(0))
    assert world.tables.ledger.load(0) == (0, 0)
    assert world.tables.pods.row(0)[COLUMN["tracked_tokens_at_sample"]] == 0


async def test_a_restart_between_two_scrapers_is_seen() -> None:
    world = World()
    assert world.poll(PAGE)[COLUMN["incarnation"]] == 0
    world.scraper = world.start()
    world.watch()
    assert world.poll(PAGE)[COLUMN["incarnation"]] == 0
    world.scraper = world.start()
    world.watch()
    restarted = re.sub(rb"(?m)^process_start_time_seconds .*$", b"process_start_time_seconds 1.99e9", PAGE)
    assert world.poll(restarted)[COLUMN["incarnation"]] == 1
    assert world.poll(restarted)[COLUMN["incarnation"]] == 1


async def test_several_engines_behind_one_address_are_told_of_once() -> None:
    world = World()
    other = re.sub(rb"(?m)^process_start_time_seconds .*$", b"process_start_time_seconds 1.99e9", PAGE)
    world.poll(PAGE)
    with capture_logs() as logs:
        for _ in range(10):
            world.poll(other)
            world.poll(PAGE)
        events = [(line["log_level"], line["event"][:20]) for line in logs]
        assert events == 3 * [("info", "an engine has restar")] + [("warning", "an engine seems to r")]
        world.now += 60.0
        world.poll(other)
        assert len(logs) == 5
