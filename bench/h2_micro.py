"""What the HTTP/2 engine costs without a socket: CPU microseconds in `Connection.receive` and the call behind it.

    python -m bench.h2_micro

The client's bytes are those of a gRPC client in lockstep: one read per message, each with the WINDOW_UPDATE and the
PING that grpc-go sends along, then its end and a reset. The calls answer with constants and do nothing else. Numbers
are the best of several rounds.
"""

import gc
import time
from collections.abc import Callable

import hpack

from workers.calls import Metadata, Method
from workers.h2.connection import Connection
from workers.h2.hpack_decoder import HpackDecoder
from workers.h2.limits import TransportCounters, TransportLimits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FIELDS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/envoy.service.ext_proc.v3.ExternalProcessor/Process"),
    (":authority", "127.0.0.1:50052"),
    ("content-type", "application/grpc"),
    ("user-agent", "grpc-go/1.85.0"),
    ("te", "trailers"),
]
STREAMS = 400
ROUNDS = 7


class Constant:
    __slots__ = ("finished", "idle")

    def __init__(self, metadata: Metadata) -> None:
        self.finished = False
        self.idle = False

    def receive(self, message: bytes) -> bytes:
        return b"a constant reply of forty bytes or about"

    def half_close(self) -> None:
        return None

    def close(self) -> None:
        return None


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def message_frames(stream_id: int, size: int) -> bytes:
    wire = b"\0" + size.to_bytes(4, "big") + bytes(size)
    return b"".join(frame(0, 0, stream_id, wire[at : at + 16384]) for at in range(0, len(wire), 16384))


def best(round_: Callable[[], int]) -> float:
    """Microseconds per item of the fastest round; `round_` does its items and says how many."""
    times = []
    for _ in range(ROUNDS):
        gc.collect()
        start = time.process_time()
        count = round_()
        times.append((time.process_time() - start) / count * 1e6)
    return min(times)


def lockstep(sizes: list[int]) -> float:
    """Microseconds per stream of messages of these sizes."""
    encoder = hpack.Encoder()
    noise = frame(8, 0, 0, (60).to_bytes(4, "big")) + frame(6, 0, 0, b"bdp ping")
    reads = [PREFACE + frame(4, 0, 0) + frame(4, 1, 0)]
    for number in range(STREAMS):
        stream_id = 2 * number + 1
        head = frame(1, 4, stream_id, encoder.encode(FIELDS))
        for size in sizes:
            wire = head + message_frames(stream_id, size)
            # A socket gives at most 256 KB at a time.
            whole = noise + wire
            reads += [whole[at : at + (1 << 18)] for at in range(0, len(whole), 1 << 18)]
            head = b""
        reads.append(noise + frame(0, 1, stream_id) + frame(3, 0, stream_id, b"\0\0\0\x08"))
    methods = {FIELDS[2][1]: Method(Constant)}

    def once() -> int:
        receive = Connection(methods, TransportLimits(), TransportCounters(), time.monotonic).receive
        for read in reads:
            receive(read)
        return STREAMS

    return best(once)


def as_envoy() -> float:
    """Microseconds per stream that the server ends after the second message, and Envoy resets."""
    encoder = hpack.Encoder()
    reads = [PREFACE + frame(4, 0, 0) + frame(4, 1, 0)]
    for stream_id in range(1, 2 * STREAMS, 2):
        reads.append(frame(1, 4, stream_id, encoder.encode(FIELDS)) + message_frames(stream_id, 400))
        reads.append(message_frames(stream_id, 1024))
        reads.append(frame(3, 0, stream_id, b"\0\0\0\2"))

    class Ending(Constant):
        __slots__ = ()

        def receive(self, message: bytes) -> bytes:
            self.finished = len(message) == 1024
            return super().receive(message)

    methods = {FIELDS[2][1]: Method(Ending)}

    def once() -> int:
        receive = Connection(methods, TransportLimits(), TransportCounters(), time.monotonic).receive
        for read in reads:
            receive(read)
        return STREAMS

    return best(once)


def header_blocks() -> tuple[float, float]:
    """Microseconds to decode a block with one new literal that enters the table: ours, and the `hpack` library's."""
    encoder = hpack.Encoder()
    blocks = [encoder.encode([*FIELDS, ("grpc-timeout", f"{19_000_000 + i}u")]) for i in range(2000)]

    def ours() -> int:
        decoder = HpackDecoder(1 << 14)
        for block in blocks:
            decoder.decode(block)
        return len(blocks)

    def library() -> int:
        decoder = hpack.Decoder()
        for block in blocks:
            decoder.decode(block)
        return len(blocks)

    return best(ours), best(library)


def main() -> None:
    gc.freeze()
    for size in (1024, 4096, 65536, 220_000):
        print(f"stream of two messages, the second of {size:>7} bytes: {lockstep([400, size]):7.1f} us")
    print(f"the same with 1024 bytes, ended as with Envoy:        {as_envoy():7.1f} us")
    few, many = lockstep([400, 1024]), lockstep([400, 1024] + [250] * 100)
    print(f"one more message of 250 bytes and its reply:          {(many - few) / 100:7.1f} us")
    ours, library = header_blocks()
    print(f"header block with a new deadline:                     {ours:7.1f} us (hpack library {library:.1f} us)")


if __name__ == "__main__":
    main()
