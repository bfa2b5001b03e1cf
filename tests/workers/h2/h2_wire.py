"""The client's side of a connection for tests: frames built by hand, answers taken apart, no socket.

Header blocks go through the `hpack` library in both directions, so that the server's own code is never its own judge.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from struct import pack, unpack

import hpack

from workers.calls import CallError, Metadata, Method, Push, Reply
from workers.h2.call_handler import Result
from workers.h2.connection import Connection
from workers.h2.limits import TransportCounters, TransportLimits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, PRIORITY_FLAG, ACK = 1, 4, 8, 0x20, 1
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR = 1, 3, 5, 6
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 7, 8, 9, 11
NO_ERROR, SETTINGS_TIMEOUT = 0, 4


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def settings(**values: int) -> bytes:
    numbers = {"table": 1, "push": 2, "streams": 3, "window": 4, "frame": 5, "list": 6}
    return frame(SETTINGS, 0, 0, b"".join(pack(">HI", numbers[name], value) for name, value in values.items()))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, pack(">I", increment))


def message(data: bytes) -> bytes:
    return b"\0" + pack(">I", len(data)) + data


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def code(self) -> int:
        """The error code of RST_STREAM or GOAWAY."""
        offset = 4 if self.kind == GOAWAY else 0
        return int(unpack(">I", self.payload[offset : offset + 4])[0])

    @property
    def last_stream_id(self) -> int:
        return int(unpack(">I", self.payload[:4])[0])


def parse(data: bytes) -> list[Frame]:
    frames = []
    while data:
        length = int.from_bytes(data[:3], "big")
        assert len(data) >= 9 + length, "the server wrote half a frame"
        frames.append(Frame(data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + length]))
        data = data[9 + length :]
    return frames


class EchoCall:
    """Says "<" + message + ">" to everything, unless the message asks for something else."""

    def __init__(self, log: "Log", metadata: Metadata) -> None:
        self.log = log
        self.metadata = metadata
        self.finished = False
        self.idle = False
        self.closed = 0
        self.got: list[bytes] = []
        self.heard_late: list[bytes | None] = []
        self.push: Push | None = None
        self.half_closed = 0

    def start(self, push: Push) -> None:
        self.push = push

    def receive(self, message: bytes) -> Reply | Awaitable[Reply]:
        assert not self.closed
        self.got.append(message)
        if message == b"finish":
            self.finished = True
        elif message == b"idle":
            self.idle = True
        elif message == b"silent":
            return None
        elif message == b"twice":
            return (b"one", b"two")
        elif message == b"error":
            raise CallError(3, "bad % thing\n")
        elif message == b"crash":
            raise RuntimeError("a bug")
        elif message.startswith(b"push and "):
            self.finished = True
            assert self.push is not None
            self.push(b"last")
            if message.endswith(b"crash"):
                raise RuntimeError("after the end")
        elif message.startswith(b"wait"):
            return self.log.future()
        elif message.startswith(b"long "):
            return b"x" * int(message[5:])
        return b"<" + message + b">"

    def half_close(self) -> Reply:
        assert not self.closed
        self.half_closed += 1
        return b"bye" if self.metadata.get("farewell") else None

    def close(self) -> None:
        self.closed += 1

    def late(self, message: bytes | None) -> None:
        assert self.closed or message is None
        if message == b"crash":
            raise RuntimeError("a bug")
        self.heard_late.append(message)


class Pending:
    """An awaited answer of a test: `done` is what the engine wants to be called with."""

    def __init__(self) -> None:
        self.done: Callable[[Result], None] | None = None
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self):  # type: ignore[no-untyped-def]
        raise NotImplementedError


class Log:
    def __init__(self) -> None:
        self.calls: list[EchoCall] = []
        self.pending: list[Pending] = []

    def open(self, metadata: Metadata) -> EchoCall:
        if metadata.get("refuse"):
            raise CallError(14, "not now")
        self.calls.append(EchoCall(self, metadata))
        return self.calls[-1]

    def future(self) -> Pending:
        self.pending.append(Pending())
        return self.pending[-1]


class Peer:
    """A client and the server's connection object, joined by function calls."""

    def __init__(self, limits: TransportLimits | None = None, *, greet: bool = True, **first_settings: int) -> None:
        self.log = Log()
        self.now = 1000.0
        self.counters = TransportCounters()
        methods = {
            "/test/Echo": Method(self.log.open),
            "/test/Watch": Method(self.log.open, pushes=True),
            "/test/Late": Method(self.log.open, listens=True),
        }
        self.connection = Connection(methods, limits or TransportLimits(), self.counters, lambda: self.now)
        self.connection.wait = self._wait
        self.wakes = 0
        self.connection.wake = self._wake
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.hello = parse(self.connection.take())
        if greet:
            self.hello += self.send(PREFACE + settings(**first_settings) + frame(SETTINGS, ACK, 0))

    def _wake(self) -> None:
        self.wakes += 1

    def _wait(self, awaitable: Awaitable[Reply], done: Callable[[Result], None]) -> Pending:
        assert isinstance(awaitable, Pending)
        awaitable.done = done
        return awaitable

    def answer(self, number: int, result: Result) -> list[Frame]:
        """An awaited answer comes."""
        done = self.log.pending[number].done
        assert done is not None
        done(result)
        return parse(self.connection.take())

    def send(self, *data: bytes) -> list[Frame]:
        return parse(self.connection.receive(b"".join(data)))

    def later(self, seconds: float) -> list[Frame]:
        self.now += seconds
        self.connection.tick(self.now)
        return parse(self.connection.take())

    def block(self, *extra: tuple[str, str], path: str = "/test/Echo", drop: Iterable[str] = ()) -> bytes:
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "server"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        return self.encoder.encode([field for field in fields if field[0] not in drop] + list(extra))

    def open(self, stream_id: int, *extra: tuple[str, str], path: str = "/test/Echo", end: bool = False) -> bytes:
        flags = END_HEADERS | (END_STREAM if end else 0)
        return frame(HEADERS, flags, stream_id, self.block(*extra, path=path))

    def say(self, stream_id: int, *messages: bytes, end: bool = False) -> bytes:
        return frame(DATA, END_STREAM if end else 0, stream_id, b"".join(map(message, messages)))

    def headers(self, answer: Frame) -> dict[str, str]:
        assert answer.kind == HEADERS
        return {str(name): str(value) for name, value in self.decoder.decode(answer.payload)}

    @property
    def call(self) -> EchoCall:
        return self.log.calls[-1]


def messages(frames: Iterable[Frame], stream_id: int) -> list[bytes]:
    """The gRPC messages in a stream's DATA frames."""
    data = b"".join(f.payload for f in frames if f.kind == DATA and f.stream_id == stream_id)
    found = []
    while data:
        size = int.from_bytes(data[1:5], "big")
        assert data[0] == 0 and len(data) >= 5 + size
        found.append(data[5 : 5 + size])
        data = data[5 + size :]
    return found


def kinds(frames: Iterable[Frame]) -> list[int]:
    return [f.kind for f in frames]
