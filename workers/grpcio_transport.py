"""The reference transport: grpc.aio on uvloop, with generic handlers on bytes.

It is here to be compared with: the same methods, the same tests, somebody else's HTTP/2. A two-message stream costs
it some 0.5 ms of CPU, ten times our own transport.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable

import grpc
import structlog

from workers.calls import Call, CallError, Metadata, Method, Methods, Reply

log = structlog.get_logger()

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class GrpcioServer:
    """Serves `methods` on any number of addresses. The same interface as `workers.h2.server.H2Server`."""

    def __init__(self, methods: Methods, *, max_message_bytes: int) -> None:
        self._methods = methods
        self._servers: list[grpc.aio.Server] = []
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
            raise ValueError("the grpcio transport serves no TLS; use transport: h2")
        server = grpc.aio.server(handlers=[_Handler(self, self._methods)], options=self._options)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise OSError(f"cannot listen on {address}")
        await server.start()
        self._servers.append(server)

    async def stop(self, grace_seconds: float) -> None:
        """Take no new streams, end with OK those that nobody waits for, give the others `grace_seconds`."""
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
        self._reader: asyncio.Task[object] | None = None
        self._pushed: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1024)

    def end_if_idle(self) -> None:
        """For draining: a stream that nobody waits for ends with OK."""
        if self._call is not None and self._call.idle and self._reader is not None:
            self._reader.cancel()

    async def run(self) -> None:
        context = self._context
        metadata: Metadata = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        call = self._call = self._method.open(metadata)
        pusher: asyncio.Task[None] | None = None
        try:
            if self._method.pushes:
                call.start(self._pushed.put_nowait)  # type: ignore[attr-defined]
                pusher = asyncio.ensure_future(self._push())
            await self._converse(call)
        except CallError as error:
            await context.abort(_CODES.get(error.code, grpc.StatusCode.UNKNOWN), error.message)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            log.exception("a call failed")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")
        finally:
            if pusher is not None:
                pusher.cancel()
            call.close()

    async def _converse(self, call: Call) -> None:
        while not call.finished:
            self._reader = asyncio.ensure_future(self._context.read())
            try:
                message = await self._reader
            except asyncio.CancelledError:
                if call.idle and not self._context.cancelled():
                    return
                raise
            if message is grpc.aio.EOF:
                await self._send(call.half_close())
                if self._method.pushes:
                    await asyncio.Event().wait()
                return
            if not isinstance(message, bytes):
                return
            answer = call.receive(message)
            if isinstance(answer, Awaitable):
                answer = await answer
            await self._send(answer)

    async def _send(self, reply: Reply) -> None:
        if reply is None:
            return
        for message in (reply,) if isinstance(reply, bytes) else reply:
            await self._context.write(message)

    async def _push(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await self._context.write(await self._pushed.get())
