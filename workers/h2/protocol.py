"""The asyncio side of one connection: a socket on one hand, a `Connection` on the other, and nothing decided here."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

from workers.calls import Methods, Reply
from workers.h2.call_handler import Result
from workers.h2.connection import Connection
from workers.h2.limits import TransportCounters, TransportLimits


class H2Protocol:
    """One read, one call of the engine, at most one write.

    An `asyncio.Protocol` in all but name: a compiled class has no interpreted parent.
    """

    def __init__(
        self,
        methods: Methods,
        limits: TransportLimits,
        counters: TransportCounters,
        loop: asyncio.AbstractEventLoop,
        live: set["H2Protocol"],
    ) -> None:
        self.connection = Connection(methods, limits, counters, loop.time)
        self._limits = limits
        self._counters = counters
        self._loop = loop
        self._live = live
        self._transport: asyncio.Transport | None = None
        self._flush_due = False
        self._closing = False
        self._full_since: float | None = None
        connection = self.connection
        connection.wake = self._wake
        connection.wait = self._wait
        self._receive = connection.receive

    # From the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        counters = self._counters
        counters.connections_opened += 1
        counters.connections_open += 1
        self._live.add(self)
        if len(self._live) > self._limits.max_connections:
            counters.connections_refused += 1
            self._transport.abort()
            return
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":  # RFC 9113 3.2
            counters.protocol_errors += 1
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)
        self._write(self.connection.take())

    def data_received(self, data: bytes) -> None:
        out = self._receive(data)
        if out:
            self._transport.write(out)  # type: ignore[union-attr]
        if self.connection.done:
            self._close()

    def eof_received(self) -> None:
        """The client says that it sends nothing more; what it did not finish cannot be finished."""

    def pause_writing(self) -> None:
        """The client does not read: neither do we."""
        self._full_since = self._loop.time()
        self.connection.set_writable(False)
        if self._transport is not None and not self._closing:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._full_since = None
        if self._transport is None or self._closing:
            return
        self._transport.resume_reading()
        self._write(self.connection.set_writable(True))

    def connection_lost(self, exc: Exception | None) -> None:
        self._counters.connections_open -= 1
        self._live.discard(self)
        self._closing = True
        self._transport = None
        self.connection.lost()

    # From the connection.

    def _wake(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self._write(self.connection.take())

    def _wait(self, awaitable: Awaitable[Reply], done: Callable[[Result], None]) -> asyncio.Future[Reply]:
        future = asyncio.ensure_future(awaitable, loop=self._loop)
        future.add_done_callback(partial(_report, done))
        return future

    # From the server.

    @property
    def alarm(self) -> float:
        return self.connection.alarm

    def tick(self, now: float) -> None:
        if self._full_since is not None and now - self._full_since >= self._limits.stall_seconds:
            self._counters.abuse("unread socket")
            self.abort()
            return
        self.connection.tick(now)
        self._write(self.connection.take())

    def drain(self) -> None:
        self.connection.start_drain()
        self._write(self.connection.take())

    def abandon(self) -> None:
        self.connection.abandon("the server is shutting down")
        self._write(self.connection.take())

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _write(self, out: bytes) -> None:
        if self._transport is None:
            return
        if out:
            self._transport.write(out)
        if self.connection.done:
            self._close()

    def _close(self) -> None:
        """Close so that the client can read our last words: a close with unread input would be a TCP reset."""
        transport = self._transport
        if self._closing or transport is None:
            return
        self._closing = True
        if not transport.can_write_eof():
            transport.close()
        else:
            try:
                transport.write_eof()
            except OSError:  # the client was faster
                transport.abort()
                return
            if self._full_since is not None:
                transport.resume_reading()
        self._loop.call_later(self._limits.linger_seconds, self.abort)


def _report(done: Callable[[Result], None], future: asyncio.Future[Reply]) -> None:
    """What became of an awaited answer. A cancelled wait is reported too, so that its call ends."""
    if future.cancelled():
        done(asyncio.CancelledError())
    else:
        done(future.exception() or future.result())
