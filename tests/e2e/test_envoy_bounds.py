"""What clients can make Envoy hold is bounded, by the configuration that `pointsman envoy` writes."""

import asyncio
import json
from collections.abc import Iterator

import aiohttp
import pytest
from client import chat

from bench.lab import Lab

MIB = 1 << 20
HEAP_BYTES = 160 * MIB

pytestmark = pytest.mark.envoy


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(pods=1, workers=1, settings={"envoy": {"upload_seconds": 3, "heap_bytes": HEAP_BYTES}}) as lab:
        yield lab


async def begin(lab: Lab, megabytes: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request of so many MiB and one more, of which the last one does not come."""
    host, _, port = lab.config.envoy.listen.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {(megabytes + 1) * MIB}\r\n\r\n"
    writer.write(head.encode())
    for _ in range(megabytes):
        writer.write(b" " * MIB)
        await writer.drain()
    return reader, writer


async def ask(lab: Lab) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(lab.envoy_url + "/v1/chat/completions", json=chat(lab.model)) as answer,
    ):
        return answer.status, await answer.read()


async def test_a_client_that_sends_too_slowly_is_told_so(lab: Lab) -> None:
    reader, writer = await begin(lab, 0)
    answer = await asyncio.wait_for(reader.read(), 20)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["message"] == "request came too slowly"
    writer.close()


async def test_near_its_heaps_bound_envoy_refuses_and_takes_requests_again_after(lab: Lab) -> None:
    slow = [await begin(lab, 30) for _ in range(5)]
    async with asyncio.timeout(20):
        while (answer := await ask(lab))[0] == 200:
            await asyncio.sleep(0.1)
    status, body = answer
    assert (status, json.loads(body)["error"]["code"]) == (503, "service_unavailable")
    for reader, writer in slow:
        await asyncio.wait_for(reader.read(), 20)
        writer.close()
    async with asyncio.timeout(20):
        while (await ask(lab))[0] != 200:
            await asyncio.sleep(0.1)
