"""Soak the HTTP/2 transport: mixed and hostile load for a while, then look for what was left behind.

    python -m bench.soak_h2 --seconds 600

A server process serves calls that echo. This process runs, all at once: well-behaved gRPC streams, calls cancelled in
the middle, connections cut with messages half sent, readers that do not read, streams reset before an answer, and
connections that say nothing. At the end every stream, connection, call and buffered byte must be gone, and the server's
memory must not have grown since the first third. Exits with 1 otherwise.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import struct
import sys
from collections import Counter
from pathlib import Path

import grpc
import grpc.aio
import hpack
import uvloop

from workers.calls import Metadata, Method, Reply
from workers.h2.limits import COUNTED, TransportLimits
from workers.h2.server import H2Server

ECHO = "/soak/Echo"
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0\0\0\0\4\1\0\0\0\0"
GROWTH_ALLOWED = 1.15


class SoakCall:
    open_calls = 0

    def __init__(self, metadata: Metadata) -> None:
        SoakCall.open_calls += 1
        self.finished = False
        self.idle = False

    def receive(self, message: bytes) -> Reply | asyncio.Future[Reply]:
        if message == b"finish":
            self.finished = True
        elif message == b"wait":
            answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.05, _answer, answer)
            return answer
        elif message == b"long":
            return bytes(100_000)
        return message

    def half_close(self) -> None:
        return None

    def close(self) -> None:
        SoakCall.open_calls -= 1


def _answer(answer: "asyncio.Future[Reply]") -> None:
    if not answer.done():
        answer.set_result(b"waited")


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def serve() -> None:
    """The server process: prints its address, then its state once a second, as JSON lines."""
    server = H2Server({ECHO: Method(SoakCall)}, limits=TransportLimits(stall_seconds=3, handshake_seconds=3))
    await server.listen("127.0.0.1:0")
    print(json.dumps(server.addresses[0]), flush=True)
    while True:
        await asyncio.sleep(1)
        counters = {name: getattr(server.counters, name) for name in COUNTED}
        print(json.dumps({**counters, "rss_mib": rss_mib(), "open_calls": SoakCall.open_calls}), flush=True)


class Load:
    def __init__(self, address: str, seconds: float) -> None:
        self.address = address
        host, _, port = address.rpartition(":")
        self.host, self.port = host, int(port)
        self.done: Counter[str] = Counter()
        self.end = asyncio.get_running_loop().time() + seconds

    def running(self) -> bool:
        return asyncio.get_running_loop().time() < self.end

    async def polite(self, seed: int) -> None:
        """Streams of a few messages of 1 B to 300 KB, on a channel that is renewed now and then."""
        chance = random.Random(seed)
        while self.running():
            async with grpc.aio.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                for _ in range(200):
                    call = channel.stream_stream(ECHO)(timeout=30)
                    size = chance.choice((1, 1000, 20_000, 300_000))
                    for word in (bytes(size), b"wait", b"finish" if chance.random() < 0.5 else b"more"):
                        await call.write(word)
                        reply = await call.read()
                        assert reply == (b"waited" if word == b"wait" else word), "wrong reply"
                    await call.done_writing()
                    assert await call.code() is grpc.StatusCode.OK
                    self.done["polite streams"] += 1
                    if not self.running():
                        return

    async def cancelling(self, seed: int) -> None:
        chance = random.Random(seed)
        async with grpc.aio.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            while self.running():
                call = channel.stream_stream(ECHO)(timeout=chance.choice((0.02, 5)))
                try:
                    await call.write(bytes(chance.randint(0, 100_000)))
                    await call.write(b"wait")
                    await asyncio.sleep(chance.random() * 0.05)
                except (grpc.RpcError, asyncio.InvalidStateError):
                    pass
                call.cancel()
                self.done["cancelled streams"] += 1

    async def _connect(self, wire: bytes, *, receive_buffer: int = 0) -> socket.socket:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, (self.host, self.port))
            await asyncio.wait_for(loop.sock_sendall(sock, wire), 5)
        except (OSError, TimeoutError):
            pass
        return sock

    async def killing(self, seed: int) -> None:
        """Many streams, the last message of each cut in half, then a TCP reset or a silent close."""
        chance = random.Random(seed)
        while self.running():
            wire = HELLO + b"".join(
                open_stream(i) + data(i, b"wait", bytes(chance.randint(1, 5000)), cut=chance.randint(0, 20))
                for i in range(1, 2 * chance.randint(1, 60), 2)
            )
            sock = await self._connect(wire[: chance.randint(100, len(wire) + 5000)])
            await asyncio.sleep(chance.random() * 0.1)
            if chance.random() < 0.7:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            self.done["killed connections"] += 1

    async def unread(self, seed: int) -> None:
        """Ask for long replies and read nothing: through a closed window, or through a full socket."""
        chance = random.Random(seed)
        while self.running():
            tiny = frame(4, 0, 0, b"\0\4" + struct.pack(">I", chance.choice((0, 1, 100, 1 << 20))))
            wide = frame(8, 0, 0, struct.pack(">I", 1 << 30))
            wire = HELLO + tiny + wide + b"".join(open_stream(i) + data(i, b"long", b"long") for i in range(1, 60, 2))
            sock = await self._connect(wire, receive_buffer=4096)
            await asyncio.sleep(chance.random() * 5)
            sock.close()
            self.done["slow readers"] += 1

    async def resetting(self, seed: int) -> None:
        while self.running():
            wire = HELLO + b"".join(open_stream(i) + frame(3, 0, i, bytes(4)) for i in range(1, 2001, 2))
            sock = await self._connect(wire)
            await asyncio.sleep(0.3)
            sock.close()
            self.done["reset streams"] += 1000

    async def silent(self, seed: int) -> None:
        while self.running():
            sock = await self._connect(HELLO[: seed % 40])
            await asyncio.sleep(4)
            sock.close()
            self.done["silent connections"] += 1


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


_BLOCK = hpack.Encoder().encode(
    hpack.NeverIndexedHeaderTuple(name, value)
    for name, value in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", ECHO),
        ("content-type", "application/grpc"),
    ]
)


def open_stream(stream_id: int) -> bytes:
    return frame(1, 4, stream_id, _BLOCK)


def data(stream_id: int, *messages: bytes, cut: int = 0) -> bytes:
    """Messages in one DATA frame, without the last `cut` bytes of the last one."""
    payload = b"".join(b"\0" + struct.pack(">I", len(m)) + m for m in messages)
    return frame(0, 0, stream_id, payload[: len(payload) - cut])


async def soak(seconds: float) -> int:
    command = (sys.executable, "-m", "bench.soak_h2", "--serve")
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert server.stdout is not None
    load = Load(json.loads(await server.stdout.readline()), seconds)
    samples: list[dict[str, float]] = []

    async def watch() -> None:
        assert server.stdout is not None
        while line := await server.stdout.readline():
            samples.append(json.loads(line))
            if len(samples) % 15 == 0:
                print({name: round(value) for name, value in samples[-1].items() if isinstance(value, int | float)})

    watching = asyncio.create_task(watch())
    kinds = [load.polite] * 4 + [load.cancelling] * 2 + [load.killing] * 2 + [load.unread] * 3
    kinds += [load.resetting, load.silent, load.silent]
    try:
        await asyncio.gather(*(kind(seed) for seed, kind in enumerate(kinds, 1)))
        await asyncio.sleep(8)
    finally:
        server.terminate()
        await server.wait()
        await watching
    last = samples[-1]
    early = max(sample["rss_mib"] for sample in samples[: max(1, len(samples) // 3)])
    print("load:", dict(load.done))
    print("server:", last)
    print(f"memory: {early:.1f} MiB in the first third, {last['rss_mib']:.1f} MiB at the end")
    left = {name: last[name] for name in ("streams_open", "connections_open", "buffered_bytes", "open_calls")}
    if any(left.values()):
        print("LEFT BEHIND:", left)
        return 1
    if last["rss_mib"] > early * GROWTH_ALLOWED:
        print("MEMORY GREW")
        return 1
    print("nothing left behind")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve())
    else:
        sys.exit(uvloop.run(soak(arguments.seconds)))
