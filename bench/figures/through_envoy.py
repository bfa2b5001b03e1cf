"""Through a real Envoy: the router's CPU per request, the time it adds, and what a worker's death costs."""

import asyncio
import http.client
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import orjson

from bench.figures.figure import Figure
from bench.figures.rig import MODEL, BenchError, Missing, Rig, all_pids, cpu_seconds, load_core, pin, run, tool
from bench.lab import Lab, free_ports
from workers.config import Config, ConfigError
from workers.envoy import bootstrap
from workers.envoy_binary import envoy_path

STRATEGY = "marginal-delay"
WAYS = {"tcp": "over TCP", "unix": "over a unix socket"}
"""From Envoy to the router."""
BARE = "bare"
CHATS = "/v1/chat/completions"
REQUESTS_PER_SECOND = 20
KILLS = 2

# wrk's own language. Each prompt has a beginning that others share, one of 200, and an end of its own.
WRK_SCRIPT = """
local pad = string.rep("All work and no play makes Jack a dull boy. ", 100)
local headers = {["content-type"] = "application/json", ["routing-strategy"] = "{strategy}"}
local turn = 0
request = function()
  turn = turn + 1
  local own = string.format("%08d ", turn * 7919 % 100000000)
  local text = string.format("session %04d ", turn % 200) .. pad:sub(1, 1300) .. own .. pad:sub(1, 550)
  local body = '{"model":"{model}","max_tokens":64,"messages":[{"role":"user","content":"' .. text .. '"}]}'
  return wrk.format("POST", "/v1/chat/completions", headers, body)
end
"""


def envoy(rig: Rig) -> list[Figure]:
    """CPU per request and added latency."""
    binary, wrk = envoy_binary(), tool("wrk", "wrk")
    pods = rig.pods(64)
    own = {"worker_listen": f"unix:{rig.new_file('.{i}.sock')}"}
    lab = rig.router(pods, workers=1, strategy=STRATEGY, more=own)
    envoys = {}
    for way in WAYS:
        rig.progress(f"starting Envoy, {way}")
        config = envoys[way] = envoy_of(lab.config, way)
        rig.envoy(binary, with_bare_route(bootstrap(config), pods))
    return [*_cpu_per_request(rig, lab, envoys, wrk), *_added_latency(rig, envoys)]


def envoy_of(config: Config, way: str) -> Config:
    """The configuration of a router with one worker for one more Envoy, which reaches it in this way."""
    listen, admin = (f"127.0.0.1:{port}" for port in free_ports(2))
    envoy = config.envoy.model_copy(update={"listen": listen, "admin": admin})
    reached = config.listen if way == "tcp" else config.worker_listen
    return config.model_copy(update={"envoy": envoy, "worker_listen": reached})


def _cpu_per_request(rig: Rig, lab: Lab, envoys: Mapping[str, Config], wrk: str) -> list[Figure]:
    router = all_pids(lab)
    rates: dict[str, list[float]] = {way: [] for way in envoys}
    with tempfile.TemporaryDirectory() as folder:

        def cell(way: str, strategy: str) -> Callable[[], float]:
            script = Path(folder) / f"{strategy}.lua"
            script.write_text(WRK_SCRIPT.replace("{strategy}", strategy).replace("{model}", MODEL))
            url = f"http://{envoys[way].envoy.listen}"

            def measured() -> float:
                before = cpu_seconds(router)
                count, seconds = run_wrk(wrk, url, script, rig.seconds / rig.rounds)
                rates[way].append(count / seconds)
                return (cpu_seconds(router) - before) / count * 1e6

            return measured

        cells = {(way, strategy): cell(way, strategy) for way in envoys for strategy in ("least-request", STRATEGY)}
        for measured in cells.values():
            measured()  # opens the connections
        for rate in rates.values():
            rate.clear()
        values = rig.take_turns(cells)
    return [
        Figure.over(
            f"envoy/{way}/cpu/{strategy}",
            f"2 KB, wrk -c32: the router's CPU a request, {strategy}, {WAYS[way]}",
            values[way, strategy],
            "µs",
            f"{median(rates[way]):,.0f} requests/s; Envoy, pods and wrk fill the other core",
        )
        for way, strategy in cells
    ]


def _added_latency(rig: Rig, envoys: Mapping[str, Config]) -> list[Figure]:
    found = added_latency(rig, envoys)
    what = "4 KB, one at a time"
    return [
        *(
            Figure.over(f"envoy/{way}/{name}", f"{what}: added {name}, {WAYS[way]}", values, "ms")
            for way, (added, _) in found.items()
            for name, values in added.items()
        ),
        *(
            Figure.over(f"envoy/{way}/{name}/bare", f"without a router: {name}", values, "ms")
            for way, (_, bare) in list(found.items())[:1]
            for name, values in bare.items()
        ),
    ]


Milliseconds = dict[str, list[float]]
"""By quantile (p50, p99), what each round gave."""


def added_latency(rig: Rig, envoys: Mapping[str, Config]) -> dict[str, tuple[Milliseconds, Milliseconds]]:
    """What the router adds to a request through each of these Envoys, and what a request takes past it."""
    found: dict[str, tuple[Milliseconds, Milliseconds]] = {
        name: ({"p50": [], "p99": []}, {"p50": [], "p99": []}) for name in envoys
    }
    everywhere = os.sched_getaffinity(0)
    pin([os.getpid()], {load_core()})
    clients = {name: OneAtATime(*_host_and_port(config.envoy.listen)) for name, config in envoys.items()}
    try:
        for client in clients.values():
            client.measure(0.5)  # opens the connections to all pods, on both ways
        for number in range(rig.rounds):
            for name, client in clients.items():
                rig.progress(f"added latency, round {number + 1} of {rig.rounds} {name}")
                ours, none = client.measure(2 * rig.seconds / rig.rounds)
                added, bare = found[name]
                for quantile, place in (("p50", 49), ("p99", 98)):
                    with_router, without = quantiles(ours, n=100)[place], quantiles(none, n=100)[place]
                    added[quantile].append((with_router - without) * 1000)
                    bare[quantile].append(without * 1000)
    finally:
        pin([os.getpid()], everywhere)
        for client in clients.values():
            client.close()
    return found


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def envoy_binary() -> str:
    """Raises Missing without Envoy."""
    try:
        return envoy_path()
    except ConfigError as error:
        raise Missing(str(error)) from None


def with_bare_route(document: dict[str, Any], pods: list[str]) -> dict[str, Any]:
    """Our bootstrap and, beside its own route, /bare/: to the same pods, but past the router."""
    manager = document["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    disabled = {"@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute",
                "disabled": True}  # fmt: skip
    manager["route_config"]["virtual_hosts"][0]["routes"].insert(
        0,
        {
            "match": {"prefix": f"/{BARE}/"},
            "route": {"cluster": BARE, "prefix_rewrite": "/", "timeout": "0s"},
            "typed_per_filter_config": {"envoy.filters.http.ext_proc": disabled},
        },
    )
    places = [address.rpartition(":") for address in pods]
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in places
    ]
    cluster = {"name": BARE, "type": "STATIC", "lb_policy": "RANDOM", "connect_timeout": "5s",
               "load_assignment": {"cluster_name": BARE, "endpoints": [{"lb_endpoints": endpoints}]}}  # fmt: skip
    document["static_resources"]["clusters"].append(cluster)
    return document


def run_wrk(wrk: str, url: str, script: Path, seconds: float) -> tuple[int, float]:
    """Requests answered, and in how many seconds. Raises BenchError if one was not answered well."""
    said = run([wrk, "-t1", "-c32", f"-d{max(1, round(seconds))}s", "-s", str(script), url], timeout=60)
    done = re.search(r"(\d+) requests in ([\d.]+)s", said)
    if done is None or not int(done[1]) or "Non-2xx" in said or "Socket errors" in said:
        raise BenchError(f"wrk: {said.strip()[-500:]}")
    return int(done[1]), float(done[2])


class OneAtATime:
    """One client on one connection, which takes the two ways in turns."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=10)
        self._turn = 0

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def measure(self, seconds: float) -> tuple[list[float], list[float]]:
        """Seconds of each request through the router, and past it."""
        through: list[float] = []
        bare: list[float] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._turn += 1
            body = self._body()
            through.append(self._post(CHATS, body))
            bare.append(self._post(f"/{BARE}{CHATS}", body))
        return through, bare

    def _body(self) -> bytes:
        text = f"session {self._turn % 200:04} " + "word " * 560 + f"{self._turn * 7919:08} " + "word " * 230
        return orjson.dumps({"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": text}]})

    def _post(self, path: str, body: bytes) -> float:
        began = time.perf_counter()
        self._connection.request("POST", path, body, {"content-type": "application/json"})
        response = self._connection.getresponse()
        response.read()
        took = time.perf_counter() - began
        if response.status != 200:
            raise BenchError(f"{path} was answered {response.status}")
        return took


def failover(rig: Rig) -> list[Figure]:
    """Requests that fail when a worker is killed."""
    envoy_binary()
    seconds = max(4.0, 2 * rig.seconds)
    with Lab(pods=4, workers=2, strategy=STRATEGY, progress=rig.progress) as lab:
        failures, sent, back = asyncio.run(_killed_under_load(lab, seconds, rig.progress))
    note = "; ".join(sorted(set(failures))[:3])
    return [
        Figure("failover/failed", "failed requests a kill", len(failures) / KILLS, "", note=note),
        Figure("failover/sent", "requests sent, two workers killed one after the other", sent, ""),
        Figure.over("failover/back", "the worker is back after", back, "s"),
    ]


async def _killed_under_load(
    lab: Lab, seconds: float, progress: Callable[[str], None]
) -> tuple[list[str], int, list[float]]:
    """Streamed answers at a steady rate through Envoy, during which each worker is killed in turn."""
    failures: list[str] = []
    back: list[float] = []
    timeout = aiohttp.ClientTimeout(total=30)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def ask(number: int) -> None:
            text = f"session {number % 10} " + "word " * 400 + str(number)
            body = {"model": lab.model, "stream": True, "max_tokens": 64, "ignore_eos": True,
                    "messages": [{"role": "user", "content": text}]}  # fmt: skip
            try:
                async with session.post(lab.envoy_url + CHATS, json=body) as response:
                    answer = await response.read()
                    if response.status != 200:
                        failures.append(f"{response.status}: {answer[:100].decode(errors='replace')}")
                    elif not answer.endswith(b"data: [DONE]\n\n"):
                        failures.append("the answer was cut")
            except (aiohttp.ClientError, TimeoutError) as error:
                failures.append(f"{type(error).__name__}: {error}")

        async def kill(number: int, after: float) -> None:
            await asyncio.sleep(after)
            progress(f"killing worker {number}")
            victim = lab.worker_pids()[number]
            began = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            while len(pids := lab.worker_pids()) < lab.workers or victim in pids:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            back.append(time.monotonic() - began)

        kills = [asyncio.create_task(kill(number, seconds * (number + 1) / (KILLS + 1))) for number in range(KILLS)]
        asked = []
        began = time.monotonic()
        for number in range(round(seconds * REQUESTS_PER_SECOND)):
            await asyncio.sleep(max(0.0, began + number / REQUESTS_PER_SECOND - time.monotonic()))
            asked.append(asyncio.create_task(ask(number)))
        await asyncio.gather(*asked, *kills)
    return failures, len(asked), back
