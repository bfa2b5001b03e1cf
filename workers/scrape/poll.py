"""Fetching a pod's metrics page over one kept-alive HTTP/1.1 connection.

Theory of operation. A `Poller` owns at most one connection and has at most one request on it. The request's
bytes are the same each time; the response is parsed by httptools (llhttp in C) and its body collected. A
connection that ended its response cleanly is kept for the next poll, any other is closed. Servers close idle
connections when they please, and a request may cross such a close on its way: if a *kept* connection ends before
one byte of response, the poll is sent once more on a fresh connection within the same deadline. A metrics page is
safe to ask for twice.

A host name is resolved each time a connection is made. All of a response is bounded: a server that sends more than
`max_bytes` is cut off.

Cost on uvloop: 0.04 to 0.07 ms of CPU for a 51 KB page that follows another at once, 0.3 ms alone (see `pace`);
`python -m bench.page_cost --pods 64` measures polling, reading and the window together.
"""

import asyncio
from typing import Literal, cast

import httptools

MAX_PAGE_BYTES = 4 * 1024 * 1024
_MAX_OVERHEAD_BYTES = 64 * 1024
"""Headers and chunk framing that may come on top of the page."""

Reason = Literal["connect", "timeout", "closed", "status", "malformed", "too-large"]


class PollError(Exception):
    """No page. `reason` is one short word for counters, the message is for a person."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class _Unanswered(PollError):
    """A kept connection ended before it said anything: the one case in which asking again is right."""


class _Connection(asyncio.Protocol):
    """One connection. httptools calls the `on_...` methods from inside `data_received`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[bytes] | None = None
        self._body: list[bytes] = []
        self._received = 0
        self._headers_done = False
        self._sized = False
        self._encoded = ""
        self.used = False
        """A response has come over this connection before."""

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def request(self, request: bytes) -> asyncio.Future[bytes]:
        """Send; the future gives the page or raises `PollError`."""
        if self._transport is None:
            raise _Unanswered("closed", "the connection is closed")
        self._waiter = waiter = self._loop.create_future()
        self._received = 0
        self._transport.write(request)
        return waiter

    def abort(self) -> None:
        """Close at once. A pending request is given up without a word."""
        self._waiter = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def close(self) -> None:
        self._waiter = None
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _fail(self, reason: Reason, message: str) -> None:
        waiter = self._waiter
        self.abort()
        if waiter is not None and not waiter.done():
            waiter.set_exception(PollError(reason, message))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            self.abort()  # nobody asked
            return
        self._received += len(data)
        if self._received > self._max_bytes + _MAX_OVERHEAD_BYTES:
            self._fail("too-large", f"the response is longer than {self._max_bytes} bytes")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail("malformed", f"not an HTTP response: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        waiter = self._waiter
        self.abort()
        if waiter is None or waiter.done():
            return
        if self._headers_done and not self._sized and error is None:
            # RFC 9112 section 6.3: a body without a length ends with the connection.
            self._deliver(waiter)
        elif self.used and not self._received:
            waiter.set_exception(_Unanswered("closed", "the server closed the kept connection"))
        else:
            where = "before the page was whole" if self._received else "without a response"
            waiter.set_exception(PollError("closed", f"the server closed the connection {where}"))

    # httptools

    def on_message_begin(self) -> None:
        if self._waiter is None:  # more than one response to one request
            self.abort()
        self._body = []
        self._headers_done = self._sized = False
        self._encoded = ""

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower in (b"content-length", b"transfer-encoding"):
            self._sized = True
        elif lower == b"content-encoding":
            self._encoded = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._headers_done = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        waiter = self._waiter
        if waiter is None or self._parser.get_status_code() < 200:
            return  # an interim response, or none that was asked for
        keep = self._parser.should_keep_alive()
        self.used = True
        self._deliver(waiter)
        if not keep:
            self.close()

    def _deliver(self, waiter: asyncio.Future[bytes]) -> None:
        self._waiter = None
        body = self._body
        self._body = []
        if waiter.done():
            return
        page = body[0] if len(body) == 1 else b"".join(body)
        status = self._parser.get_status_code()
        if status != 200:
            waiter.set_exception(PollError("status", f"status {status}"))
        elif self._encoded not in ("", "identity"):
            waiter.set_exception(PollError("malformed", f"content encoding {self._encoded}, which was not asked for"))
        elif len(page) > self._max_bytes:
            waiter.set_exception(PollError("too-large", f"the page is longer than {self._max_bytes} bytes"))
        else:
            waiter.set_result(page)


class Poller:
    """Polls one pod. `host` is a name or an address, `timeout` the seconds from call to page, connecting included."""

    def __init__(
        self,
        host: str,
        port: int,
        path: str = "/metrics",
        timeout: float = 5.0,
        max_bytes: int = MAX_PAGE_BYTES,
    ) -> None:
        if any(character <= " " or character > "~" for character in host + path) or not path.startswith("/"):
            raise ValueError(f"host {host!r} with path {path!r} cannot stand in a request")
        self.host = host
        self.port = port
        self._timeout = timeout
        self._max_bytes = max_bytes
        shown = f"[{host}]" if ":" in host else host
        self._request = (
            f"GET {path} HTTP/1.1\r\nHost: {shown}:{port}\r\nUser-Agent: pointsman\r\n"
            "Accept: text/plain;version=0.0.4\r\nAccept-Encoding: identity\r\n\r\n"
        ).encode("ascii")
        self._connection: _Connection | None = None
        self._polling = False
        self.connects = 0
        """Connections made."""

    async def poll(self) -> bytes:
        """The page. Raises `PollError`. One poll at a time; a cancelled poll closes the connection."""
        if self._polling:
            raise RuntimeError(f"{self.host}:{self.port} is being polled already")
        self._polling = True
        try:
            async with asyncio.timeout(self._timeout):
                return await self._ask()
        except TimeoutError:
            raise PollError("timeout", f"no page within {self._timeout:g} s") from None
        finally:
            self._polling = False

    async def _ask(self) -> bytes:
        connection = self._connection
        if connection is not None and connection.open and connection.used:
            try:
                return await self._exchange(connection)
            except _Unanswered:
                pass
        return await self._exchange(await self._connect())

    async def _exchange(self, connection: _Connection) -> bytes:
        try:
            return await connection.request(self._request)
        except asyncio.CancelledError:  # the deadline, or the caller's
            connection.abort()
            raise

    async def _connect(self) -> _Connection:
        self.close()
        self.connects += 1
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._max_bytes), self.host, self.port
            )
        except OSError as error:
            raise PollError("connect", f"cannot connect to {self.host}:{self.port}: {error}") from error
        self._connection = connection
        return connection

    def close(self) -> None:
        """Close the connection, if there is one. A later poll makes a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
