"""Fuzz the HTTP/2 engine with coverage guidance.

    pip install atheris
    python -m bench.fuzz.h2_engine -runs=200000 [corpus folder]

One input is one connection: a list of frames, mostly of a sensible shape, sometimes raw bytes, cut into reads anywhere,
between which answers come, time passes and the socket fills. Without atheris
`python -m bench.fuzz.h2_engine --random N [seed]` plays N random inputs, which finds less but runs everywhere.

What must hold whatever comes: `receive` raises nothing and returns whole frames; no DATA goes beyond the client's
windows; nothing follows the end of a stream; when the connection is lost every call has been closed exactly once and
nothing is counted as open, buffered or pending.
"""

import logging
import random
import struct
import sys
from collections.abc import Awaitable, Callable

import structlog

from workers.calls import CallError, Metadata, Method, Push, Reply
from workers.h2.call_handler import Result
from workers.h2.connection import Connection
from workers.h2.limits import TransportCounters, TransportLimits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LIMITS = TransportLimits(
    max_message_bytes=5000,
    max_buffered_bytes=20_000,
    max_concurrent_streams=8,
    max_header_list_bytes=2000,
    stream_window_bytes=20_000,
    connection_window_bytes=80_000,
    max_pending_send_bytes=3000,
    max_pending_push_bytes=2000,
    control_frames_burst=200,
    control_frames_per_second=10,
    stall_seconds=5,
    linger_seconds=2,
)
_PATHS = (b"/fuzz/Echo", b"/fuzz/Watch", b"/fuzz/None")
_EXTRA = (
    b"\0\x0ccontent-type\x10application/grpc",
    b"\x40\x0cgrpc-timeout\x023S",
    b"\0\x0econtent-length\x0212",
    b"\x40\x01x\x01y",
    b"\xbe",
    b"\x20",
    b"\0\x01X\x01y",
)
WORDS = (b"hello", b"finish", b"idle", b"wait", b"fail", b"crash", b"silent", b"twice", b"long")


class Source:
    """Decisions read from the fuzzer's bytes; zeros when they run out."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def left(self) -> bool:
        return self.pos < len(self.data)

    def byte(self) -> int:
        self.pos += 1
        return self.data[self.pos - 1] if self.pos <= len(self.data) else 0

    def number(self) -> int:
        return self.byte() << 8 | self.byte()

    def bytes(self, count: int) -> bytes:
        self.pos += count
        return self.data[self.pos - count : self.pos]


class FuzzCall:
    def __init__(self, world: "World") -> None:
        self.world = world
        self.finished = False
        self.idle = False
        self.closed = 0
        self.half_closed = 0
        self.awaited = False
        self.unheard = False
        self.push: Push | None = None
        world.calls.append(self)

    def start(self, push: Push) -> None:
        self.push = push

    def receive(self, message: bytes) -> Reply | Awaitable[Reply]:
        assert not self.closed and not self.finished and not self.awaited, "receive while closed or waiting"
        if message == b"finish":
            self.finished = True
        elif message == b"idle":
            self.idle = True
        elif message == b"wait":
            self.awaited = True
            return Answer(self)
        elif message == b"fail":
            raise CallError(3, "no")
        elif message == b"crash":
            raise ValueError("a bug")
        elif message == b"silent":
            return None
        elif message == b"twice":
            return b"1", b"2"
        elif message == b"long":
            return bytes(40_000)
        return message

    def half_close(self) -> Reply:
        assert not self.closed and not self.half_closed and not self.awaited
        self.half_closed += 1
        return b"bye" if self.idle else None

    def close(self) -> None:
        self.closed += 1

    def late(self, message: bytes | None) -> None:
        assert self.closed and not self.unheard, "late without an end, or after the last word"
        self.unheard = message is None
        if message == b"crash":
            raise ValueError("a bug")


class Answer:
    def __init__(self, call: FuzzCall) -> None:
        self.call = call
        self.done: Callable[[Result], None] | None = None
        call.world.answers.append(self)

    def cancel(self) -> None:
        self.done = None

    def __await__(self):  # type: ignore[no-untyped-def]
        raise NotImplementedError


class World:
    """One connection and everything around it."""

    def __init__(self) -> None:
        self.calls: list[FuzzCall] = []
        self.answers: list[Answer] = []
        self.now = 100.0
        self.counters = TransportCounters()
        methods = {
            "/fuzz/Echo": Method(self._open, listens=True),
            "/fuzz/Watch": Method(self._open, pushes=True),
        }
        self.connection = Connection(methods, LIMITS, self.counters, lambda: self.now)
        self.connection.wait = self._wait
        self.connection_room = 65_535
        self.ended: set[int] = set()
        """Streams that the server has ended."""
        self.check(self.connection.take())

    def _open(self, metadata: Metadata) -> FuzzCall:
        return FuzzCall(self)

    def _wait(self, awaitable: Awaitable[Reply], done: Callable[[Result], None]) -> Answer:
        assert isinstance(awaitable, Answer)
        awaitable.done = done
        return awaitable

    def check(self, out: bytes) -> None:
        while out:
            size = int.from_bytes(out[:3], "big")
            assert len(out) >= 9 + size, "half a frame"
            assert size <= 1 << 20
            if out[3] == 0:
                self.connection_room -= size
                assert self.connection_room >= 0, "DATA beyond the connection's window"
            if out[3] <= 1:
                stream_id = int.from_bytes(out[5:9], "big")
                assert stream_id not in self.ended, "something after the end of a stream"
                if out[4] & 1:
                    self.ended.add(stream_id)
            out = out[9 + size :]

    def end(self) -> None:
        self.connection.lost()
        connection, counters = self.connection, self.counters
        assert [call.closed for call in self.calls] == [1] * len(self.calls), "calls not closed exactly once"
        assert counters.streams_open == 0
        assert counters.buffered_bytes == 0, "bytes counted that nobody holds"
        assert connection.pending_bytes == 0
        assert not (connection.streams or connection.blocked or connection.lingering or connection._queue)


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def _message(source: Source) -> bytes:
    choice = source.byte()
    if choice < 200:
        body = WORDS[choice % len(WORDS)]
    elif choice < 230:
        body = bytes(source.number() % 6000)
    else:
        return source.bytes(source.byte() % 20)
    return bytes((choice == 199,)) + len(body).to_bytes(4, "big") + body


def _block(source: Source) -> bytes:
    path = _PATHS[source.byte() % 8 % 3]
    block = b"\x83\x86\x04" + bytes((len(path),)) + path + _EXTRA[0]
    extra = source.byte()
    if extra & 0x80:
        block += _EXTRA[extra % len(_EXTRA)]
    if extra == 0x7F:
        block = source.bytes(source.byte() % 60)
    return block


def _next(source: Source, world: World) -> bytes:
    kind = source.byte() % 16
    stream_id = 2 * (source.byte() % 12) + 1
    flags = source.byte()
    if kind < 4:
        body = _message(source) + (_message(source) if flags & 2 else b"")
        if flags & 4:
            body = body[: source.byte()]
        if flags & 8:
            body = bytes((flags >> 4,)) + body + bytes(flags >> 4)
        return _frame(0, flags & 9, stream_id, body)
    if kind < 8:
        block = _block(source)
        cut = source.byte() if flags & 2 else 0
        if cut:
            return _frame(1, flags & 1, stream_id, block[:cut]) + _frame(9, 4, stream_id, block[cut:])
        return _frame(1, flags & 1 | 4, stream_id, block)
    if kind == 8:
        return _frame(3, 0, stream_id, bytes(4))
    if kind == 9:
        key, value = source.byte() % 7, source.number() << (source.byte() % 16)
        if key == 4 and value > 1 << 30:
            value = 1
        return _frame(4, 0, 0, struct.pack(">HI", key, value & 0xFFFFFFFF))
    if kind == 10:
        return _frame(6, flags & 1, 0, bytes(8))
    if kind < 13:
        increment = source.number()
        target = 0 if flags & 1 else stream_id
        if target == 0:
            world.connection_room += increment
        return _frame(8, 0, target, increment.to_bytes(4, "big"))
    if kind == 13:
        return _frame(source.byte(), flags, stream_id & flags, source.bytes(source.byte() % 30))
    if kind == 14:
        return source.bytes(source.byte() % 40)
    return b""


def play(data: bytes) -> None:
    source = Source(data)
    world = World()
    connection = world.connection
    wire = PREFACE + _frame(4, 0, 0, b"") + _frame(4, 1, 0, b"") if source.byte() < 250 else b""
    while source.left() and not connection.done:
        wire += _next(source, world)
        event = source.byte()
        if event < 100:
            continue
        if event < 180 and wire:
            cut = source.byte() * len(wire) // 255
            world.check(connection.receive(wire[:cut]))
            wire = wire[cut:]
        elif event < 200:
            waiting = [answer for answer in world.answers if answer.done is not None]
            if waiting:
                answer = waiting[event % len(waiting)]
                done, answer.done, answer.call.awaited = answer.done, None, False
                assert done is not None
                answer.call.finished = event > 190
                done((b"late", None, CallError(8, "no"), ValueError(), (b"1", bytes(17_000), b"2"))[event % 5])
                world.check(connection.take())
        elif event < 210:
            world.now += event - 199
            connection.tick(world.now)
            world.check(connection.take())
        elif event < 220:
            world.check(connection.set_writable(event % 2 == 0))
        elif event < 230:
            for call in world.calls[-3:]:
                if call.push is not None:
                    call.finished = call.finished or event == 229
                    call.push(bytes(event))
            world.check(connection.take())
        elif event == 230:
            connection.start_drain()
            world.check(connection.take())
        elif event == 231:
            connection.abandon("over")
            world.check(connection.take())
    world.check(connection.receive(wire))
    world.end()


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    if len(sys.argv) > 2 and sys.argv[1] == "--random":
        generator = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 1)
        for number in range(int(sys.argv[2])):
            data = generator.randbytes(generator.randint(1, 600))
            try:
                play(data)
            except BaseException:
                print("input", number, data.hex())
                raise
        print("played", sys.argv[2], "random inputs")
        return
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    atheris.instrument_all()
    atheris.Setup(sys.argv, play)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
