"""A server of each transport, in a thread with an event loop of its own, serving calls that the tests can look at.

Another transport joins by one line in `TRANSPORTS`: a class with the interface of `workers.h2.server.H2Server`.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import uvloop

from workers.calls import CallError, Metadata, Method, Methods, Push, Reply
from workers.grpcio_transport import GrpcioServer
from workers.h2.limits import TransportLimits
from workers.h2.server import H2Server


def grpcio(methods: Methods, *, limits: TransportLimits) -> GrpcioServer:
    return GrpcioServer(methods, max_message_bytes=limits.max_message_bytes)


TRANSPORTS: dict[str, Callable[..., Any]] = {"h2": H2Server, "grpcio": grpcio}

LIMITS = TransportLimits(max_message_bytes=8 << 20)


class ContractCall:
    """Echoes; a few words make it do something else."""

    def __init__(self, log: "list[ContractCall]", metadata: Metadata) -> None:
        log.append(self)
        self.metadata = metadata
        self.finished = False
        self.idle = False
        self.got: list[int] = []
        self.half_closed = 0
        self.closed = 0
        self.push: Push | None = None

    def start(self, push: Push) -> None:
        self.push = push
        push(b"started")

    def receive(self, message: bytes) -> Reply | Awaitable[Reply]:
        self.got.append(len(message))
        word = message[:10]
        if word == b"finish":
            self.finished = True
        elif word == b"idle":
            self.idle = True
        elif word == b"silent":
            return None
        elif word == b"twice":
            return (b"one", b"two")
        elif word == b"fail":
            raise CallError(3, "nicht schön: 100 %")
        elif word == b"crash":
            raise RuntimeError("a bug in the call")
        elif word == b"wait":
            return self._later(message)
        elif word == b"wait-fail":
            return self._fail_later()
        elif word == b"forever":
            return self._never()
        return message

    async def _later(self, message: bytes) -> Reply:
        await asyncio.sleep(0.02)
        return message

    async def _fail_later(self) -> Reply:
        await asyncio.sleep(0.01)
        raise CallError(8, "no more")

    async def _never(self) -> Reply:
        await asyncio.Event().wait()
        return None

    def half_close(self) -> Reply:
        self.half_closed += 1
        return b"farewell" if "farewell" in self.metadata else None

    def close(self) -> None:
        self.closed += 1


@dataclass
class Served:
    """A running server."""

    loop: asyncio.AbstractEventLoop
    another: Callable[[], Any]
    """Makes a server of the same methods."""
    server: Any
    calls: list[ContractCall] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.server.addresses[0])

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine in the server's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Whether `condition` became true before a long time was over."""
        end = time.monotonic() + 10
        while not condition() and time.monotonic() < end:
            time.sleep(0.005)
        return condition()


def methods(calls: list[ContractCall]) -> dict[str, Method]:
    def open_call(metadata: Metadata) -> ContractCall:
        if "refuse" in metadata:
            raise CallError(14, "not now")
        return ContractCall(calls, metadata)

    return {"/test.Echo/Stream": Method(open_call), "/test.Echo/Watch": Method(open_call, pushes=True)}


@pytest.fixture(scope="module", params=list(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return TRANSPORTS[request.param]


@pytest.fixture
def served(transport: Callable[..., Any]) -> Iterator[Served]:
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    calls: list[ContractCall] = []
    served = Served(loop, another := partial(transport, methods(calls), limits=LIMITS), another(), calls)
    served.run(served.server.listen("127.0.0.1:0"))
    try:
        yield served
    finally:
        served.run(served.server.stop(0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
    assert all(call.closed == 1 for call in calls), "a call was not closed exactly once"
