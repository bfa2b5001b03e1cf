"""CPU cost of reading the engines' metrics: `python -m bench.page_cost [--pods 64] [--json]`.

First one page by itself: our reader on a page it knows, on one it sees for the first time, prometheus_client's
parser, and the window's arithmetic. With `--pods N` then the whole: a second process serves the page on N ports, this
one polls them all once a second, paced as the scraper does it, and charges itself its CPU time. Times are CPU,
medians over runs.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from workers.scrape.engines import ENGINES, Engine
from workers.scrape.pace import Pace
from workers.scrape.page import KnownLines, PageReader
from workers.scrape.poll import Poller, PollError
from workers.scrape.window import Window

PAGE = Path(__file__).parents[1] / "tests" / "fixtures" / "vllm-0.32" / "metrics-after-evictions.txt"


def median_microseconds(action: Callable[[], object], seconds: float, runs: int) -> float:
    """Median over `runs` of the mean CPU time of one `action`; each run lasts about `seconds` / `runs`."""
    action()
    started = time.process_time()
    action()
    once = max(time.process_time() - started, 1e-6)
    times = max(1, round(seconds / runs / once))
    results = []
    for _ in range(runs):
        started = time.process_time()
        for _ in range(times):
            action()
        results.append((time.process_time() - started) / times)
    return statistics.median(results) * 1e6


def page_costs(page: bytes, engine: Engine, runs: int) -> dict[str, float]:
    """Microseconds of CPU for each way to read the page."""
    text = page.decode()
    reader = PageReader(KnownLines(engine))
    window = Window()
    sample = reader.read(page)
    seconds = [0.0]

    def relearn() -> None:
        """What a page costs whose lines are known and whose layout is not."""
        PageReader(reader._known).read(page + b"\n" * (1 + int(seconds[0]) % 2))
        seconds[0] += 1.0

    def add() -> None:
        seconds[0] += 1.0
        window.add(seconds[0], replace(sample, generation_tokens=seconds[0]))

    return {
        "known page": median_microseconds(lambda: reader.read(page), 1.0, runs),
        "page with a new layout": median_microseconds(relearn, 1.0, runs),
        "first page of an engine": median_microseconds(lambda: PageReader(KnownLines(engine)).read(page), 1.0, runs),
        "window": median_microseconds(add, 0.5, runs),
        "prometheus_client": median_microseconds(lambda: list(text_string_to_metric_families(text)), 2.0, runs),
    }


class _PageServer(asyncio.Protocol):
    """Answers every request with the page, as cheaply as can be."""

    response = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"\r\n\r\n"):
            self._transport.write(self.response)


def serve(page: bytes, pods: int, ports: Connection) -> None:
    """A process that serves the page on so many ports, which it names through the pipe."""
    _PageServer.response = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: %d\r\n\r\n" % len(page) + page
    )

    async def main() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(_PageServer, "127.0.0.1", 0) for _ in range(pods)]
        ports.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main())


async def scrape(addresses: list[tuple[str, int]], engine: Engine, seconds: float, batch: int) -> dict[str, float]:
    """Poll every address once a second for so long; polls, errors, and CPU from the second second on."""
    loop = asyncio.get_running_loop()
    known = KnownLines(engine)
    pace: Pace[int] = Pace(1.0, 1.0, batch=batch)
    pods = [(Poller(host, port), PageReader(known), Window()) for host, port in addresses]
    polls = errors = 0
    tasks: set[asyncio.Task[None]] = set()

    async def poll(index: int) -> None:
        nonlocal polls, errors
        poller, reader, window = pods[index]
        ok = True
        try:
            page = await poller.poll()
            window.add(loop.time(), reader.read(page))
        except PollError:
            ok = False
            errors += 1
        polls += 1
        pace.polled(index, loop.time(), busy=True, ok=ok)

    start = loop.time()
    for index in range(len(pods)):
        pace.add(index, start)
    cpu_started = measured_from = None
    while (now := loop.time()) < start + 2.0 + seconds:
        if cpu_started is None and now >= start + 2.0:
            cpu_started, measured_from, polls = time.process_time(), now, 0
        for index in pace.due(now):
            task = loop.create_task(poll(index))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        next_due = pace.next_due()
        await asyncio.sleep(0.05 if next_due is None else max(0.0, min(0.5, next_due - loop.time())))
    assert cpu_started is not None and measured_from is not None
    cpu, elapsed, counted = time.process_time() - cpu_started, loop.time() - measured_from, polls
    await asyncio.gather(*tasks)
    for poller, _, _ in pods:
        poller.close()
    return {
        "pods": len(pods),
        "polls a second": counted / elapsed,
        "errors": errors,
        "connections": sum(poller.connects for poller, _, _ in pods),
        "cores": cpu / elapsed,
        "microseconds of CPU per poll": cpu / counted * 1e6,
    }


def whole_cost(page: bytes, engine: Engine, pods: int, seconds: float, batch: int) -> dict[str, float]:
    """The cost of polling `pods` pods that another process serves."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(page, pods, theirs), daemon=True)
    server.start()
    try:
        ports: list[int] = ours.recv()
        return uvloop.run(scrape([("127.0.0.1", port) for port in ports], engine, seconds, batch))
    finally:
        server.terminate()
        server.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="a saved metrics page")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--pods", type=int, default=0, help="also poll so many pods once a second")
    parser.add_argument("--at", nargs="*", metavar="HOST:PORT", help="poll these once a second instead of own ones")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to poll")
    parser.add_argument("--batch", type=int, default=4, help="polls that leave together")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    page, engine = arguments.page.read_bytes(), ENGINES[arguments.engine]
    result: dict[str, object] = {"page bytes": len(page)}
    result["microseconds of CPU"] = page_costs(page, engine, arguments.runs)
    if arguments.at:
        addresses = [(host, int(port)) for host, _, port in (text.rpartition(":") for text in arguments.at)]
        result["polling"] = uvloop.run(scrape(addresses, engine, arguments.seconds, arguments.batch))
    elif arguments.pods:
        result["polling"] = whole_cost(page, engine, arguments.pods, arguments.seconds, arguments.batch)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            print(name)
            for inner, number in value.items():
                print(f"  {inner:32} {number:12.3f}")
        else:
            print(f"{name:34} {value:>12}")


if __name__ == "__main__":
    main()
