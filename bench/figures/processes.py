"""The processes as a whole: what they need at rest and under load, how evenly they spread it, how soon they start."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

from bench.figures.figure import Figure
from bench.figures.rig import (
    ROOT,
    WARM_SECONDS,
    BenchError,
    Rig,
    Server,
    all_pids,
    cpu_seconds,
    memory_mib,
    server_core,
    task_switches,
    tool,
)
from bench.figures.streams import saturated, two_messages
from bench.lab import Lab

LOAD_STRATEGIES = (
    "random", "round-robin", "least-request", "power-of-two", "throughput", "least-busy-time", "least-kv-cache",
    "least-gpu-cache", "least-latency", "least-utilization",
)  # fmt: skip
DEFAULT_STRATEGY = "marginal-delay"
WORKERS = (1, 2, 4)
UNROUTED = {"grpc.aio, no routing": "bench.grpc_aio_baseline", "our HTTP/2, no routing": "bench.h2_server"}
AT_ONCE_WHEN_FULL = 64
OPEN_STREAMS = 10_000


def idle_streams(rig: Rig) -> list[Figure]:
    """Memory of a worker with 10,000 open streams."""
    lab = rig.router(rig.pods(64), workers=1, strategy=DEFAULT_STRATEGY)
    worker = lab.worker_pids()[0]
    before = memory_mib(worker)
    rig.progress(f"opening {OPEN_STREAMS} streams")
    rig.hold(lab.worker_addresses[0], OPEN_STREAMS)
    after = memory_mib(worker)
    held = sum(pod["own"]["requests_held"] for pod in lab.believed_pods())
    if held != OPEN_STREAMS:
        raise BenchError(f"the router knows of {held} open streams, not {OPEN_STREAMS}")
    idle = rig.busy_cores([worker], rig.seconds)
    return [
        Figure("idle-streams/rss", f"RSS of a worker with {OPEN_STREAMS:,} open streams", after, "MiB"),
        Figure("idle-streams/before", "RSS before", before, "MiB"),
        Figure("idle-streams/each", "a stream", (after - before) * 1024 / OPEN_STREAMS, "KiB"),
        Figure("idle-streams/cpu", "CPU of the worker while they rest", idle, "cores"),
    ]


def workers(rig: Rig) -> list[Figure]:
    """CPU of a stream with more workers at the same total load, and with as many servers that route nothing: what a
    core loses by going to and fro between processes shows there, too. And so with a core that is never idle, where
    processes wake up less often."""
    h2load = tool("h2load", "nghttp2-client")
    pods = rig.pods(64)
    servers: dict[tuple[str, int], Server] = {}
    for count in WORKERS:
        rig.progress(f"starting {count} workers")
        lab = rig.router(pods, workers=count)
        servers["router", count] = Server(",".join(lab.worker_addresses), tuple(lab.worker_pids()))
        for name, module in UNROUTED.items():
            processes = [rig.program(module) for _ in range(count)]
            addresses = ",".join(process.address for process in processes)
            servers[name, count] = Server(addresses, tuple(pid for process in processes for pid in process.pids))

    def cell(kind: str, count: int) -> Callable[[], float]:
        connections = max(WORKERS) // count  # to each worker, the same number in all
        options: tuple[str | int, ...] = ("-size", 4096, "-c", 64, "-conns", connections)
        if kind not in UNROUTED:
            options += ("-strategy", kind)
        server = servers[kind if kind in UNROUTED else "router", count]

        def measured() -> float:
            before = task_switches(server.pids)
            load = rig.load(server, *options)
            # The switches are those of the warm-up, too, whose streams the load generator does not count.
            seconds = load.seconds + min(WARM_SECONDS, load.seconds)
            switches.setdefault((kind, count), []).append(
                (task_switches(server.pids) - before) / (load.streams_per_second * seconds)
            )
            return load.cpu_microseconds

        return measured

    def full_cell(kind: str, count: int) -> Callable[[], float]:
        server = servers[kind if kind in UNROUTED else "router", count]
        return lambda: saturated(h2load, server, Path(body.name), rig.seconds / rig.rounds, AT_ONCE_WHEN_FULL)[0]

    switches: dict[tuple[str, int], list[float]] = {}
    kinds = ("least-request", DEFAULT_STRATEGY, *UNROUTED)
    cells = {(kind, count): cell(kind, count) for kind in kinds for count in WORKERS}
    full = {"least-request, core full": "least-request", "our HTTP/2, no routing, core full": "our HTTP/2, no routing"}
    with tempfile.NamedTemporaryFile() as body:
        body.write(two_messages(4096, ("routing-strategy", "least-request")))
        body.flush()
        cells |= {(name, count): full_cell(kind, count) for name, kind in full.items() for count in WORKERS}
        values = rig.take_turns(cells)
    figures = []
    for kind in (*kinds, *full):
        figures += [
            Figure.over(
                f"workers/{kind}/{count}",
                f"{kind}, {count} worker{'s' * (count > 1)}",
                values[kind, count],
                "µs",
                f"{median(switches[kind, count]):.2f} task switches a stream" if (kind, count) in switches else "",
            )
            for count in WORKERS
        ]
        more = [
            100 * (max(costs) / costs[0] - 1) for costs in zip(*(values[kind, count] for count in WORKERS), strict=True)
        ]
        figures.append(Figure.over(f"workers/{kind}/more", f"{kind}, most above 1 worker", more, "%"))
    return figures


def one_core(rig: Rig) -> list[Figure]:
    """Everything on one core, scraping every second: at rest, and with 200 streams a second."""
    pods = rig.pods(64)
    figures = []
    for transport in ("h2", "grpcio"):
        rig.progress(f"{transport}: starting")
        lab = rig.router(pods, scrape_seconds=1.0, workers=1, transport=transport, strategy=DEFAULT_STRATEGY)
        pids = all_pids(lab)
        if transport == "h2":
            time.sleep(1.5)  # the first pages of a fleet cost more
            rig.progress("at rest")
            figures.append(
                Figure("one-core/idle", "at rest, 64 pods a second", rig.busy_cores(pids, 2 * rig.seconds), "cores")
            )
        latencies, cores = [], []
        for number in range(rig.rounds):
            rig.progress(f"{transport}: 200 streams a second, round {number + 1} of {rig.rounds}")
            server = Server(lab.worker_addresses[0], pids)
            load = rig.load(server, "-size", 4096, "-c", 64, "-rate", 200, seconds=2 * rig.seconds / rig.rounds)
            latencies.append(load.latency_microseconds)
            cores.append(load.cpu_seconds / load.seconds)
        figures += [
            Figure.over(
                f"one-core/{transport}/{name}", f"{transport}, 200 streams/s: {name}",
                [each[name] / 1000 for each in latencies], "ms",
            )
            for name in ("p50", "p99")
        ]  # fmt: skip
        figures.append(Figure.over(f"one-core/{transport}/cpu", f"{transport}, 200 streams/s: CPU", cores, "cores"))
        lab.stop_process(lab.router)
    return figures


def scrape(rig: Rig) -> list[Figure]:
    """One page, and a hundred pods a second."""
    rig.progress("reading one page")
    done = subprocess.run(
        ["taskset", "-c", str(server_core()), sys.executable, "-m", "bench.page_cost", "--json", "--runs", "5"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BenchError(f"bench.page_cost failed: {done.stderr.strip()[-500:]}")
    costs = json.loads(done.stdout)["microseconds of CPU"]
    lab = rig.router(rig.pods(100), scrape_seconds=1.0, workers=1)
    time.sleep(1.5)
    rig.progress("100 pods a second")
    everybody, scraper = all_pids(lab), [lab.router_children()["scraper"]]
    of_all, of_scraper, seconds = cpu_seconds(everybody), cpu_seconds(scraper), 2 * rig.seconds
    time.sleep(seconds)
    of_all, of_scraper = cpu_seconds(everybody) - of_all, cpu_seconds(scraper) - of_scraper
    return [
        Figure("scrape/page", "one page of 51 KB, layout known", costs["known page"], "µs"),
        Figure("scrape/page/new", "one page with a new layout", costs["page with a new layout"], "µs"),
        Figure("scrape/page/prometheus", "the same by prometheus_client", costs["prometheus_client"], "µs"),
        Figure(
            "scrape/poll", "a poll in all: HTTP, page, window, shared memory", of_scraper / seconds / 100 * 1e6, "µs"
        ),
        Figure("scrape/100-pods", "100 pods a second, all processes", of_all / seconds, "cores"),
        Figure("scrape/100-pods/scraper", "the scraper alone", of_scraper / seconds, "cores"),
    ]


def strategies(rig: Rig) -> list[Figure]:
    """How evenly the load strategies use pods that are all alike."""
    pods = rig.pods(16)
    lab = rig.router(pods, scrape_seconds=1.0, workers=2)
    server = Server(",".join(lab.worker_addresses), ())
    figures, unused = [], 0
    for name in LOAD_STRATEGIES:
        rig.progress(name)
        # Errors raise, so a figure here means that there was none.
        load = rig.load(server, "-size", 1024, "-c", 16, "-strategy", name, seconds=rig.seconds / 3)
        counts = [load.targets.get(pod, 0) for pod in pods]
        unused += counts.count(0)
        even = mean(counts)
        farthest = 100 * max(abs(count / even - 1) for count in counts)
        figures.append(
            Figure(
                f"strategies/{name}", f"{name}: pod farthest from even", farthest, "%",
                note=f"{min(counts)} to {max(counts)} of {sum(counts)} streams a pod",
            )
        )  # fmt: skip
    return [
        Figure("strategies/errors", "failed streams, all strategies", 0, ""),
        Figure("strategies/unused", "pods without a stream, all strategies", unused, ""),
        *figures,
    ]


def memory(rig: Rig) -> list[Figure]:
    """Start to ready, and the memory of each process."""
    pods = rig.pods(64)
    starts: list[float] = []
    settings = rig.settings(pods, 5.0)
    moments: list[float] = []

    def waiting(_what: str) -> None:
        moments.append(time.monotonic())

    for _ in range(rig.rounds):
        lab = Lab(pods=0, with_envoy=False, workers=2, strategy=DEFAULT_STRATEGY, settings=settings, progress=waiting)
        with lab:
            # The lab says what it waits for: first that the router is ready, then the first polls.
            starts.append(moments[-1] - moments[-2])
            processes = {"supervisor": lab.router.pid, **lab.router_children()}
            resident = {name: memory_mib(pid) for name, pid in processes.items()}
            own = {name: memory_mib(pid, "Pss") for name, pid in processes.items()}
    figures = [Figure.over("memory/start", "start to ready, 2 workers", starts, "s")]
    for name in sorted(processes):
        note = f"shares counted once: {own[name]:.0f} MiB"
        figures.append(Figure(f"memory/{name}", f"RSS of {name}", resident[name], "MiB", note=note))
    return [*figures, Figure("memory/all", "all together, what they share counted once", sum(own.values()), "MiB")]
