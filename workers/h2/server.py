"""Listening, and the life of a server: `H2Server` is what the rest of the program knows of this folder.

The server accepts by itself instead of through `loop.create_server`: on shutdown the connections that wait in the
backlog are taken in before the socket is closed (a closed listener resets them).
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import cast

from workers.calls import Methods
from workers.h2.limits import TransportCounters, TransportLimits
from workers.h2.protocol import H2Protocol
from workers.unix_path import UnixPath

_BACKLOG = 1024
_ACCEPTS_PER_WAKE = 64
_TICK_SECONDS = 0.1
"""How late a deadline may be noticed."""


class _Listener:
    __slots__ = ("place", "sock", "ssl_context")

    def __init__(self, sock: socket.socket, ssl_context: ssl.SSLContext | None, place: UnixPath | None = None) -> None:
        self.sock = sock
        self.ssl_context = ssl_context
        self.place = place
        """None for TCP."""


class H2Server:
    """Serves gRPC `methods` over HTTP/2, cleartext with prior knowledge or TLS with ALPN."""

    def __init__(
        self, methods: Methods, *, limits: TransportLimits | None = None, counters: TransportCounters | None = None
    ) -> None:
        self.limits = limits or TransportLimits()
        self.counters = counters or TransportCounters()
        self._methods = methods
        self._listeners: list[_Listener] = []
        self._live: set[H2Protocol] = set()
        self._accepting: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle | None = None

    @property
    def addresses(self) -> list[str]:
        """Where the server listens, with the ports that the kernel chose for port 0."""
        names = []
        for listener in self._listeners:
            if listener.place is not None:
                names.append(f"unix:{listener.place.path}")
            else:
                host, port = listener.sock.getsockname()[:2]
                names.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        return names

    async def listen(self, address: str, ssl_context: ssl.SSLContext | None = None) -> None:
        """Listen on "host:port", "[v6]:port" or "unix:/path". May be called several times.

        `ssl_context` must ask for client certificates itself if they are wanted; ALPN is set here. Raises
        `ValueError` for an address that cannot be read, `OSError` for one that cannot be bound.
        """
        loop = asyncio.get_running_loop()
        if ssl_context is not None:
            ssl_context.set_alpn_protocols(["h2"])
        if address.startswith("unix:"):
            place = UnixPath(Path(address.removeprefix("unix:")))
            listeners = [_Listener(_bind_unix(place), ssl_context, place)]
        else:
            host, port = _split(address)
            infos = await loop.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
            )
            listeners = [_Listener(_bind_tcp(info[0], info[4]), ssl_context) for info in infos[:1]]
        for listener in listeners:
            self._listeners.append(listener)
            loop.add_reader(listener.sock, self._accept, listener)
        if self._ticker is None:
            self._ticker = loop.call_later(_TICK_SECONDS, self._tick)

    async def stop(self, grace_seconds: float) -> None:
        """Stop listening, let calls end for `grace_seconds`, end the others with UNAVAILABLE, close."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener.sock)
            for _ in range(_BACKLOG // _ACCEPTS_PER_WAKE + 1):  # others may go on connecting
                if not self._accept(listener):
                    break
            listener.sock.close()
            if listener.place is not None:
                listener.place.release()
        self._listeners.clear()
        # Connections whose TLS handshake is under way are asked to leave as soon as they can be.
        await self._until_empty(H2Protocol.drain, grace_seconds)
        await self._until_empty(H2Protocol.abandon, self.limits.linger_seconds)
        for task in self._accepting:
            task.cancel()
        for protocol in list(self._live):
            protocol.abort()
        while self._live or self._accepting:  # noqa: ASYNC110
            await asyncio.sleep(0)
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None

    async def _until_empty(self, ask: Callable[[H2Protocol], None], seconds: float) -> None:
        """Ask all connections, and those that join them, until there are none or the time is over."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (self._live or self._accepting) and loop.time() < until:
            for protocol in list(self._live):
                ask(protocol)
            await asyncio.sleep(0.02)

    def _accept(self, listener: _Listener) -> int:
        """Take in what waits in the backlog, within reason. Returns how many connections that were."""
        loop = asyncio.get_running_loop()
        for count in range(_ACCEPTS_PER_WAKE):
            try:
                sock, _ = listener.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return count
            except OSError:
                # Out of file descriptors: the backlog keeps the rest until the next try.
                self.counters.connections_refused += 1
                loop.remove_reader(listener.sock)
                loop.call_later(_TICK_SECONDS, self._listen_again, listener)
                return count
            if len(self._accepting) >= self.limits.max_connections:  # handshakes of TLS that nobody finishes
                self.counters.connections_refused += 1
                sock.close()
                continue
            sock.setblocking(False)
            if listener.place is None:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._adopt(sock, listener.ssl_context))
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)
        return _ACCEPTS_PER_WAKE

    def _listen_again(self, listener: _Listener) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.sock, self._accept, listener)

    async def _adopt(self, sock: socket.socket, ssl_context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: cast(asyncio.Protocol, H2Protocol(self._methods, self.limits, self.counters, loop, self._live)),
                sock,
                ssl=ssl_context,
                ssl_handshake_timeout=self.limits.handshake_seconds if ssl_context is not None else None,
            )
        except (OSError, asyncio.CancelledError):
            # A TLS handshake that failed or took too long, or a client that left at once.
            self.counters.connections_refused += 1
            sock.close()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(_TICK_SECONDS, self._tick)
        now = loop.time()
        for protocol in [protocol for protocol in self._live if protocol.alarm <= now]:
            protocol.tick(now)


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        raise ValueError(f'address "{address}": expected host:port, [v6]:port or unix:/path')
    return host.removeprefix("[").removesuffix("]"), int(port)


def _bind_tcp(family: int, sockaddr: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if sockaddr[0] != "::" else 0)
        sock.bind(sockaddr)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(place: UnixPath) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(place.temporary))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        place.take()
    except OSError:
        sock.close()
        place.release()
        raise
    return sock
