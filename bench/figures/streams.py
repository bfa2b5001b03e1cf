"""The request path alone: one worker on one core, streams one after the other or as many as it can take.

Both of our transports and two yardsticks are driven in the same run: a grpc.aio server that routes nothing, and our
own HTTP/2 server with the same nothing behind it, which shows what of a stream is transport.
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from bench.figures.bars import BODY_KILOBYTES
from bench.figures.figure import Figure
from bench.figures.rig import MODEL, BenchError, Rig, Server, all_pids, cpu_seconds, run, tool
from protos.ext_proc_pb2 import ProcessingRequest

PODS = 64
AT_ONCE = 16
STRATEGIES = ("least-request", "marginal-delay")
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


def _servers(rig: Rig, *names: str) -> dict[str, Server]:
    """Start servers by name: our transports h2 and grpcio, and the yardsticks grpc.aio and no-routing."""
    pods = rig.pods(PODS)
    servers = {}
    for name in names:
        rig.progress(f"starting {name}")
        if name == "grpc.aio":
            servers[name] = rig.program("bench.grpc_aio_baseline")
        elif name == "no-routing":
            servers[name] = rig.program("bench.h2_server")
        else:
            lab = rig.router(pods, workers=1, transport=name, strategy="least-request")
            servers[name] = Server(lab.worker_addresses[0], all_pids(lab))
    return servers


def lockstep(rig: Rig) -> list[Figure]:
    """CPU of a two-message stream."""
    servers = _servers(rig, "h2", "grpcio", "grpc.aio", "no-routing")
    kinds = {name: (servers["h2"], name) for name in STRATEGIES}
    kinds |= {
        "grpcio transport": (servers["grpcio"], "least-request"),
        "grpc.aio, no routing": (servers["grpc.aio"], ""),
        "our HTTP/2, no routing": (servers["no-routing"], ""),
    }

    def cell(server: Server, strategy: str, size: int) -> Callable[[], float]:
        options = ("-size", size * 1024, "-c", AT_ONCE, "-strategy", strategy)
        return lambda: rig.load(server, *options).cpu_microseconds

    cells = {(kind, size): cell(*kinds[kind], size) for size in BODY_KILOBYTES for kind in kinds}
    values = rig.take_turns(cells)
    figures = []
    for size in BODY_KILOBYTES:
        yardstick = values["grpc.aio, no routing", size]
        figures += [
            Figure.over(f"streams/{kind}/{size}", f"{kind}, {size} KB", values[kind, size], "µs") for kind in kinds
        ]
        for kind in STRATEGIES:
            shares = [ours / theirs for ours, theirs in zip(values[kind, size], yardstick, strict=True)]
            what = f"{kind} as a share of grpc.aio, {size} KB"
            figures.append(Figure.over(f"streams/{kind}/{size}/share", what, shares, ""))
    return figures


def saturation(rig: Rig) -> list[Figure]:
    """Streams that a second of CPU carries when nobody waits."""
    h2load = tool("h2load", "nghttp2-client")
    servers = _servers(rig, "h2", "grpcio", "grpc.aio", "no-routing")
    with tempfile.NamedTemporaryFile() as body:
        body.write(two_messages(2048))
        body.flush()

        def cell(name: str) -> Callable[[], float]:
            def measured() -> float:
                cost, rate = saturated(h2load, servers[name], Path(body.name), rig.seconds / rig.rounds)
                rates.setdefault(name, []).append(rate)
                return 1e6 / cost

            return measured

        rates: dict[str, list[float]] = {}
        values = rig.take_turns({name: cell(name) for name in servers})
    ratios = [ours / theirs for ours, theirs in zip(values["h2"], values["grpcio"], strict=True)]
    names = {"h2": "h2, least-request", "grpcio": "grpcio, least-request", "grpc.aio": "grpc.aio, no routing",
             "no-routing": "our HTTP/2, no routing"}  # fmt: skip
    figures = [
        Figure.over(f"saturation/{key}", what, values[key], "streams/s", f"{median(rates[key]):,.0f} by the clock")
        for key, what in names.items()
    ]
    return [*figures, Figure.over("saturation/ratio", "h2 over grpcio", ratios, "x")]


def two_messages(body_bytes: int, *more_headers: tuple[str, str]) -> bytes:
    """The gRPC messages of a stream back to back: request headers, and a chat of so many bytes."""
    start, end = f'{{"model":"{MODEL}","max_tokens":64,"messages":[{{"role":"user","content":"', '"}]}'
    chat = start + "x" * (body_bytes - len(start) - len(end)) + end
    headers = ProcessingRequest()
    listed = headers.request_headers.headers.headers
    for key, value in (
        (":authority", "llm.example.com"), (":path", "/v1/chat/completions"), (":method", "POST"), (":scheme", "http"),
        ("content-type", "application/json"), ("content-length", str(len(chat))), ("user-agent", "OpenAI/Python 1.50"),
        ("authorization", "Bearer sk-12345678901234567890"), ("accept", "application/json"), *more_headers,
    ):  # fmt: skip
        listed.add(key=key, raw_value=value.encode())
    body = ProcessingRequest()
    body.request_body.body, body.request_body.end_of_stream = chat.encode(), True
    serialised = (headers.SerializeToString(), body.SerializeToString())
    return b"".join(b"\0" + len(each).to_bytes(4, "big") + each for each in serialised)


def saturated(h2load: str, server: Server, body: Path, seconds: float, at_once: int = 16) -> tuple[float, float]:
    """Microseconds of the server's CPU per stream, and streams per second of the clock: four connections in all, shared
    out among its addresses, with so many streams at once on each."""
    addresses = server.address.split(",")
    before = cpu_seconds(server.pids)

    def drive(address: str) -> str:
        return run(
            [h2load, f"-c{4 // len(addresses)}", f"-m{at_once}", "--duration", f"{max(1, round(seconds))}",
             "-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{address}{PROCESS}"],
            timeout=60,
        )  # fmt: skip

    with ThreadPoolExecutor(len(addresses)) as at_the_same_time:
        said = list(at_the_same_time.map(drive, addresses))
    used = cpu_seconds(server.pids) - before
    streams, per_second = 0, 0.0
    for each in said:
        rate = re.search(r"finished in [^,]+, ([\d.]+) req/s", each)
        counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", each)
        if rate is None or counts is None or any(int(count) for count in counts.groups()[1:]):
            raise BenchError(f"h2load: {each.strip()[-600:]}")
        streams += int(counts[1])
        per_second += float(rate[1])
    return used / streams * 1e6, per_second


def chunks(rig: Rig) -> list[Figure]:
    """CPU of an SSE answer of 100 chunks, each a message."""
    servers = _servers(rig, "h2", "grpcio", "grpc.aio")
    counted: Mapping[str, Callable[[], float]] = {name: _chunk_cell(rig, server) for name, server in servers.items()}
    values = rig.take_turns(counted)
    figures = [
        Figure.over("chunks/h2", "h2", values["h2"], "µs"),
        Figure.over("chunks/grpcio", "grpcio", values["grpcio"], "µs"),
        Figure.over("chunks/grpc.aio", "grpc.aio, no routing", values["grpc.aio"], "µs"),
    ]
    return figures


def _chunk_cell(rig: Rig, server: Server) -> Callable[[], float]:
    def cell() -> float:
        load = rig.load(server, "-size", 4096, "-c", AT_ONCE, "-chunks", 100)
        return load.cpu_seconds / load.chunks * 1e6

    return cell


def bodies(rig: Rig) -> list[Figure]:
    """Streams with 220 KB bodies that a second of CPU carries."""
    servers = _servers(rig, "h2", "grpc.aio")
    kinds = {name: (servers["h2"], name) for name in STRATEGIES} | {"grpc.aio": (servers["grpc.aio"], "")}
    rates: dict[str, list[float]] = {}

    def cell(kind: str) -> Callable[[], float]:
        server, strategy = kinds[kind]

        def measured() -> float:
            load = rig.load(server, "-size", 220 * 1024, "-c", AT_ONCE, "-strategy", strategy)
            rates.setdefault(kind, []).append(load.streams_per_second)
            return 1e6 / load.cpu_microseconds

        return measured

    values = rig.take_turns({kind: cell(kind) for kind in kinds})
    figures = []
    for kind in kinds:
        what = kind if kind in STRATEGIES else f"{kind}, no routing"
        note = f"{median(rates[kind]):,.0f} by the clock; the load generator, too, has one core"
        figures.append(Figure.over(f"bodies/{kind}", what, values[kind], "streams/s", note))
    return figures
