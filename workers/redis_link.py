"""One connection to Redis (or Valkey) on which a worker's scripts run, pipelined, and which is never waited for.

Requests of all streams go out on one connection, many per system call, and their replies come back in order. It
takes 23 to 30 µs of the worker's CPU a call (redis-py: 110; `pytest tests/workers/test_limits_redis.py -k cost
--benchmark-enable --benchmark-timer=time.process_time` for 64 calls).

    call()  -> a future of the reply; or None at once while there is no connection

A reply that is not there within `timeout_seconds` ends the connection, and with it every call that waits on it: they
get LOST, and so do the calls after them, at once, until a new connection has answered. So a Redis that hangs costs its
timeout to those who asked in that moment, and nothing to those who come later. Connecting again is tried for ever, in
the background, with a growing pause.

A server that answers but takes no writes (a replica after a failover that kept our connection, one that is loading) is
as good as none: the connection ends, and the next attempt looks the name up again. Other errors are told in the log.

Replies are values, errors among them (`ReplyError`): a future whose stream has gone is nobody's unretrieved exception.
RESP 2 only. No cluster, no sentinel: an address or a socket, by URL.
"""

import asyncio
import contextlib
import math
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Callable
from hashlib import sha1
from typing import Any, Final, NamedTuple, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import structlog

from workers.address import join_address

log = structlog.get_logger()

HANDSHAKE_SECONDS: Final = 1.0
FIRST_PAUSE_SECONDS: Final = 0.05
MAX_PAUSE_SECONDS: Final = 1.0
STEADY_SECONDS: Final = 5.0
"""A connection that lasted as long was all right: its end is told in the log, and a new one is tried soon."""
COMPLAIN_SECONDS: Final = 10.0
"""Between two lines in the log about calls that the server refused."""
MAX_WAITING: Final = 8192
"""Calls without a reply on one connection; further ones are LOST."""
_GRACE_SECONDS: Final = 0.002
_UNUSABLE: Final = re.compile(r"(?:.* -)?(?:READONLY|MASTERDOWN|LOADING|NOAUTH)\b")
"""What a server says that is of no use to anybody; before Redis 7 scripts say it somewhere in the text."""
_PROBE: Final = (b"EXPIRE", b"pointsman-probe", b"1")
"""A write that changes nothing: there is no such key."""


class ReplyError:
    """Redis refused a command. `text` begins with the kind: NOSCRIPT, READONLY, WRONGTYPE ..."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    @property
    def unusable(self) -> bool:
        """Whether the server would say so to any call."""
        return _UNUSABLE.match(self.text) is not None

    def __repr__(self) -> str:
        return f"ReplyError({self.text!r})"


LOST: Final = ReplyError("LOST the connection to Redis")
"""The reply of a call that will get none. Whether it was carried out is not known."""


class Script:
    """A Lua script that is called with arguments alone. It makes the names of its keys by itself."""

    __slots__ = ("evalsha", "sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.sha = sha1(self.text, usedforsecurity=False).hexdigest()
        self.evalsha = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n$1\r\n0\r\n" % self.sha.encode()


class RedisAddress(NamedTuple):
    """A URL taken apart: redis://[user:password@]host[:port][/db], rediss:// for TLS, unix://[user:password@]/path."""

    host: str
    port: int
    path: str
    tls: bool
    username: str
    password: str
    database: int

    @property
    def place(self) -> str:
        """Where it is, without user and password."""
        if self.path:
            return f"unix://{self.path}"
        return f"redis{'s' if self.tls else ''}://{join_address(self.host, self.port)}/{self.database}"


def without_password(url: str) -> str:
    """A URL that `parse_redis_url` takes, to be shown."""
    parts = urlsplit(url)
    who, _, host = parts.netloc.rpartition("@")
    name, colon, _ = who.partition(":")
    return urlunsplit(parts._replace(netloc=f"{name}:***@{host}")) if colon else url


def parse_redis_url(url: str) -> RedisAddress:
    """Raises ValueError that says what is wrong, without the password."""
    parts = None
    with contextlib.suppress(ValueError):  # its text may have the password
        parts = urlsplit(url)
    if parts is None or parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("not a Redis URL: write redis://host:port/0, rediss://... for TLS, or unix:///path")
    if parts.scheme != "unix" and "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("not a Redis URL: in user and password write / as %2F, ? as %3F and # as %23")
    if parts.query or parts.fragment:
        raise ValueError(
            "not a Redis URL: nothing may come after the database's number; user and password stand before the host, "
            "redis://user:password@host:port/0"
        )
    username, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.scheme == "unix":
        if not parts.path or parts.netloc.rpartition("@")[2]:
            raise ValueError("not a Redis URL: a unix socket needs its whole path, such as unix:///run/redis.sock")
        return RedisAddress("", 0, unquote(parts.path), False, username, password, 0)
    try:
        port = parts.port or 6379
    except ValueError:
        raise ValueError("not a Redis URL: the port must be a number up to 65535") from None
    database = parts.path.strip("/") or "0"
    if not database.isascii() or not database.isdigit():
        raise ValueError(f"not a Redis URL: the path must be a database's number, not {database!r}")
    host = parts.hostname or "localhost"
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f"not a Redis URL: {host!r} is not a valid host name") from None
    return RedisAddress(host, port, "", parts.scheme == "rediss", username, password, int(database))


def _command(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


class _Call:
    __slots__ = ("arguments", "deadline", "future", "script")

    def __init__(
        self, future: "asyncio.Future[Any]", deadline: float, script: Script | None, arguments: tuple[bytes, ...]
    ) -> None:
        self.future = future
        self.deadline = deadline
        self.script = script
        self.arguments = arguments


class _Connection(asyncio.Protocol):
    """One connection: writes commands, hands the replies to the calls that wait, in order."""

    def __init__(self, timeout_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_seconds = timeout_seconds
        self._waiting: deque[_Call] = deque()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None
        self._suspect: _Call | None = None
        self.lost: asyncio.Future[str] = self._loop.create_future()
        """Done, with the reason, when the connection has ended."""
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when its socket is closed, too."""
        self.on_error: Callable[[ReplyError], None] = lambda _: None
        """Told of every error that a call gets for a reply."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods alone

    def use_timeout(self, seconds: float) -> None:
        """From now on, while nothing waits."""
        self._timeout_seconds = seconds
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send(
        self, message: bytes, script: Script | None = None, arguments: tuple[bytes, ...] = ()
    ) -> "asyncio.Future[Any]":
        """Write one command. The future never has an exception."""
        future = self._loop.create_future()
        if self._transport is None or self.lost.done() or len(self._waiting) >= MAX_WAITING:
            future.set_result(LOST)
            return future
        deadline = self._loop.time() + self._timeout_seconds
        self._waiting.append(_Call(future, deadline, script, arguments))
        self._transport.write(message)
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._look)
        return future

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at = 0
        try:
            while at < len(buffer) and not self.lost.done():
                value, at = _parse(buffer, at)
                self._on_reply(value)
        except _Incomplete:
            pass
        except (ValueError, IndexError, RecursionError):
            self.end("it sent something that is not a reply")
            return
        self._buffer = buffer[at:]

    def _on_reply(self, value: Any) -> None:
        call = self._waiting.popleft()
        if call.script is not None and isinstance(value, ReplyError) and value.text.startswith("NOSCRIPT"):
            self._send_whole(call)
            return
        if not call.future.done():  # else the stream that asked has gone
            call.future.set_result(value)
        if isinstance(value, ReplyError):
            if value.unusable:
                self.end(value.text)
            else:
                self.on_error(value)

    def _send_whole(self, call: _Call) -> None:
        """The server has forgotten the script (it restarted, or somebody flushed its scripts)."""
        assert call.script is not None and self._transport is not None
        self._waiting.append(_Call(call.future, self._loop.time() + self._timeout_seconds, None, ()))
        self._transport.write(_command(b"EVAL", call.script.text, b"0", *call.arguments))

    def _look(self) -> None:
        """Is the oldest call overdue? Only if it still is after data that lies ready has been read: after a pause of
        this process the timers come first."""
        self._timer = None
        if not self._waiting:
            return
        oldest = self._waiting[0]
        if oldest is self._suspect:
            self.end(f"no reply within {self._timeout_seconds * 1000:.0f} ms")
        elif oldest.deadline <= self._loop.time():
            self._suspect = oldest
            self._timer = self._loop.call_later(_GRACE_SECONDS, self._look)
        else:
            self._timer = self._loop.call_at(oldest.deadline, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(str(exc) if exc else "the server closed it")
        self.closed.set_result(None)

    def end(self, reason: str) -> None:
        """Close, and let everybody know who waits."""
        if self.lost.done():
            return
        self.lost.set_result(reason)
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        while self._waiting:
            future = self._waiting.popleft().future
            if not future.done():
                future.set_result(LOST)


class RedisLink:
    """See the head of this file. Raises ValueError for a URL that is none."""

    def __init__(self, url: str, timeout_seconds: float, scripts: tuple[Script, ...]) -> None:
        self._address = parse_redis_url(url)
        self._tls = ssl.create_default_context() if self._address.tls else None  # reading all authorities takes 50 ms
        self._timeout = timeout_seconds
        self._scripts = scripts
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        self._complained = -math.inf
        self._uncomplained = 0

    @property
    def up(self) -> bool:
        """Whether there is a connection that has answered and is not overdue."""
        return self._connection is not None

    async def start(self) -> None:
        """Connect, and stay connected in the background. Returns after the first attempt, whatever came of it."""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())
        await self._tried.wait()

    async def close(self) -> None:
        """End the connection; what still waits is LOST."""
        connection = self._connection
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if connection is not None:
            await connection.closed

    def call(self, script: Script, *arguments: bytes) -> "asyncio.Future[Any] | None":
        """Run a script. None while there is no connection."""
        connection = self._connection
        if connection is None:
            return None
        tail = b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])
        return connection.send(b"*%d\r\n%b%b" % (3 + len(arguments), script.evalsha, tail), script, arguments)

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        told = False
        while True:
            connection, reason = await self._connect()
            if connection is not None and not connection.lost.done():
                if told:
                    log.info("Redis is back")
                since = time.monotonic()
                self._connection = connection
                connection.lost.add_done_callback(self._forget)
                self._tried.set()
                try:
                    reason = await asyncio.shield(connection.lost)
                finally:
                    self._connection = None
                    connection.end("closed here")
                if time.monotonic() - since > STEADY_SECONDS:
                    pause, told = FIRST_PAUSE_SECONDS, False
            self._tried.set()
            if not told:
                log.warning("Redis cannot be reached", address=self._address.place, reason=reason)
                told = True
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _complain(self, error: ReplyError) -> None:
        """Say what the server has against a call, but not for each of thousands."""
        now = time.monotonic()
        if now - self._complained < COMPLAIN_SECONDS:
            self._uncomplained += 1
            return
        log.warning("Redis refuses a call", reply=error.text, more_since_last_told=self._uncomplained)
        self._complained, self._uncomplained = now, 0

    def _forget(self, _: "asyncio.Future[str]") -> None:
        self._connection = None

    async def _connect(self) -> tuple[_Connection | None, str]:
        """A connection that has answered, or why there is none."""
        address = self._address
        loop = asyncio.get_running_loop()
        connection = _Connection(HANDSHAKE_SECONDS)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                if address.path:
                    await loop.create_unix_connection(lambda: connection, address.path)
                else:
                    await loop.create_connection(lambda: connection, address.host, address.port, ssl=self._tls)
                refusal = await self._greet(connection)
        except asyncio.CancelledError:
            connection.end("closed here")
            raise
        except Exception as error:  # whatever it is, there may be a connection next time
            connection.end("could not be made")
            return None, (str(error) or "timed out") if isinstance(error, OSError) else repr(error)
        if refusal is not None:
            connection.end("could not be made")
            return None, connection.lost.result() if refusal is LOST else refusal.text
        connection.use_timeout(self._timeout)
        connection.on_error = self._complain
        return connection, ""

    async def _greet(self, connection: _Connection) -> ReplyError | None:
        """Log in, choose the database, bring the scripts and see that writes are taken; all in one round trip."""
        address = self._address
        commands = []
        if address.password:
            name = (address.username.encode(),) if address.username else ()
            commands.append((b"AUTH", *name, address.password.encode()))
        if address.database:
            commands.append((b"SELECT", b"%d" % address.database))
        commands += [(b"SCRIPT", b"LOAD", script.text) for script in self._scripts]
        commands += [(b"PING",), _PROBE]
        replies = await asyncio.gather(*(connection.send(_command(*command)) for command in commands))
        *others, probe = replies
        if isinstance(probe, ReplyError) and (
            probe.unusable or probe is LOST
        ):  # not for a key that is no business of ours
            others.append(probe)
        return next((reply for reply in others if isinstance(reply, ReplyError)), None)


class _Incomplete(Exception):
    """The reply goes on in the next piece."""


def _parse(buffer: bytes, at: int) -> tuple[Any, int]:
    """One RESP 2 reply and where it ends: int, bytes, None, list, or ReplyError. Simple strings are bytes, too."""
    end = buffer.find(b"\r\n", at)
    if end < 0:
        raise _Incomplete
    kind = buffer[at]
    line = buffer[at + 1 : end]
    at = end + 2
    if kind == 0x3A:  # ':'
        return int(line), at
    if kind == 0x24:  # '$'
        length = int(line)
        if length < 0:
            return None, at
        if len(buffer) < at + length + 2:
            raise _Incomplete
        return buffer[at : at + length], at + length + 2
    if kind == 0x2A:  # '*'
        length = int(line)
        if length < 0:
            return None, at
        values = []
        for _ in range(length):
            value, at = _parse(buffer, at)
            values.append(value)
        return values, at
    if kind == 0x2B:  # '+'
        return line, at
    if kind == 0x2D:  # '-'
        return ReplyError(line.decode("utf-8", "replace")), at
    raise ValueError(kind)
