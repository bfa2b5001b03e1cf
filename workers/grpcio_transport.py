"""The reference transport: grpc.aio on uvloop, with generic handlers on bytes.

It is here to be compared with: the same methods, the same tests, somebody else's HTTP/2. A two-message stream costs
it some 0.6 ms of CPU, twenty times what our own transport takes (`pointsman bench streams`).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import structlog

from protos import MessageError
from workers.calls import Call, CallError, Method, Methods, Reply, Status, status_of
from workers.unix_path import UnixPath

log = structlog.get_logger()

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class GrpcioServer:
    """Serves `methods` on any number of addresses. The same interface as `workers.h2.server.H2Server`."""

    def __init__(self, methods: Methods, *, max_message_bytes: int) -> None:
        self._methods = methods
        self._servers: list[grpc.aio.Server] = []
        self._places: list[UnixPath] = []
        self.addresses: list[str] = []
        """Where the server listens, with the ports that the kernel chose for port 0."""
        self._open: set[_Stream] = set()
        self._options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", 1 << 20),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ]

    async def listen(self, address: str, ssl_context: ssl.SSLContext | None = None) -> None:
        """Accept connections on "host:port" or "unix:/path". Raises OSError when the address cannot be had."""
        if ssl_context is not None:
            raise ValueError("the grpcio transport does not serve TLS; use transport: h2")
        server = grpc.aio.server(handlers=[_Handler(self, self._methods)], options=self._options)
        # gRPC removes the file of a unix socket that it has bound when it stops, whosever it is by then.
        place = UnixPath(Path(address.removeprefix("unix:"))) if address.startswith("unix:") else None
        try:
            port = server.add_insecure_port(address if place is None else f"unix:{place.temporary}")
        except RuntimeError:
            port = 0
        if port == 0:
            raise OSError(f"cannot listen on {address}")
        await server.start()
        self._servers.append(server)
        if place is not None:
            place.take()
            self._places.append(place)
        self.addresses.append(f"{address.rpartition(':')[0]}:{port}" if place is None else address)

    async def stop(self, grace_seconds: float) -> None:
        """Take no new streams, end with OK those that nobody waits for, give the others `grace_seconds`."""
        for place in self._places:
            place.release()
        stopping = asyncio.gather(*(server.stop(grace_seconds) for server in self._servers))
        while not stopping.done():
            for stream in list(self._open):
                stream.end_if_idle()
            await asyncio.wait([stopping], timeout=0.05)
        await stopping

    def entered(self, stream: "_Stream") -> None:
        """A stream began."""
        self._open.add(stream)

    def left(self, stream: "_Stream") -> None:
        """A stream is over."""
        self._open.discard(stream)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, server: GrpcioServer, methods: Methods) -> None:
        self._handlers = {
            path: grpc.stream_stream_rpc_method_handler(_serve(server, method)) for path, method in methods.items()
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(details.method)


def _serve(server: GrpcioServer, method: Method):  # type: ignore[no-untyped-def]
    async def handler(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        stream = _Stream(method, context)
        server.entered(stream)
        try:
            await stream.run()
        finally:
            server.left(stream)

    return handler


class _Stream:
    """One open stream: reads, asks the call, writes."""

    def __init__(self, method: Method, context: grpc.aio.ServicerContext) -> None:
        self._method = method
        self._context = context
        self._call: Call | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._pushed: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1024)

    def end_if_idle(self) -> None:
        """For draining: a stream that nobody waits for ends with OK."""
        if self._call is not None and self._call.idle and self._waiting is not None:
            self._waiting.cancel()

    async def run(self) -> None:
        context = self._context
        metadata: dict[str, str] = {}
        for key, value in context.invocation_metadata() or ():
            if isinstance(value, str):
                metadata[key] = f"{metadata[key]}, {value}" if key in metadata else value
        pusher: asyncio.Task[None] | None = None
        try:
            call = self._call = self._method.open(metadata)
            if self._method.pushes:
                call.start(self._pushed.put_nowait)  # type: ignore[attr-defined]
                pusher = asyncio.ensure_future(self._push(call))
            await self._converse(call, pusher)
        except (CallError, MessageError) as error:
            code, said = status_of(error) or (Status.UNKNOWN, "")
            await context.abort(_CODES.get(code, grpc.StatusCode.UNKNOWN), said)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            log.exception("a call failed")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")
        finally:
            if pusher is not None:
                pusher.cancel()
            if self._call is not None:
                self._call.close()

    async def _converse(self, call: Call, pusher: asyncio.Task[None] | None) -> None:
        while not call.finished:
            message = await self._wait(call, asyncio.ensure_future(self._context.read()))
            if message is grpc.aio.EOF:
                await self._send(call.half_close())
                if pusher is not None:
                    await self._wait(call, pusher)
                return
            if not isinstance(message, bytes):
                return
            answer = call.receive(message)
            if isinstance(answer, Awaitable):
                answer = await answer
            await self._send(answer)

    async def _wait(self, call: Call, task: asyncio.Task[Any]) -> object:
        """The task's result; None when draining ended it."""
        self._waiting = task
        try:
            return await task
        except asyncio.CancelledError:
            if call.idle and task.cancelled() and not self._context.cancelled():
                return None
            raise

    async def _send(self, reply: Reply) -> None:
        if reply is None:
            return
        for message in (reply,) if isinstance(reply, bytes) else reply:
            await self._context.write(message)

    async def _push(self, call: Call) -> None:
        while not (call.finished and self._pushed.empty()):
            await self._context.write(await self._pushed.get())
