"""Listening, TLS, taking over and stopping, with real sockets."""

import asyncio
import errno
import functools
import gc
import inspect
import socket
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop
from h2_wire import RST_STREAM, Peer, frame

from workers.calls import Metadata, Method
from workers.h2.limits import TransportLimits
from workers.h2.server import H2Server

TLS = Path(__file__).parents[2] / "fixtures" / "tls"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HELLO = PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\4\1\0\0\0\0"


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on uvloop, as in production, and on asyncio's own loop."""
    loops = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}

    @functools.wraps(test)
    def run(loop: str, **arguments: Any) -> None:
        with asyncio.Runner(loop_factory=loops[loop]) as runner:
            runner.run(asyncio.wait_for(test(**arguments), 60))

    parameters = list(inspect.signature(test).parameters.values())
    own = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = inspect.Signature([*parameters, own])  # type: ignore[attr-defined]
    return pytest.mark.parametrize("loop", loops)(run)


class Named:
    """Answers with the server's name."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.finished = False
        self.idle = True

    def receive(self, message: bytes) -> bytes:
        return self.name

    def half_close(self) -> None:
        return None

    def close(self) -> None:
        return None


def server(name: bytes = b"server", limits: TransportLimits | None = None) -> H2Server:
    def open_call(metadata: Metadata) -> Named:
        return Named(name)

    return H2Server({"/test/Name": Method(open_call)}, limits=limits)


async def ask(address: str, credentials: grpc.ChannelCredentials | None = None) -> bytes:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "localhost")]
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, options=options[:1])
    else:
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    async with channel:
        return bytes(await channel.unary_unary("/test/Name")(b"", timeout=10))


async def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(1000):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


async def read_all(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.read(), 20)


# Addresses.


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0"])
@on_both_loops
async def test_tcp(address: str) -> None:
    one = server()
    await one.listen(address)
    assert await ask(one.addresses[0]) == b"server"
    await one.stop(0)


@on_both_loops
async def test_ipv6() -> None:
    one = server()
    try:
        await one.listen("[::1]:0")
    except OSError:
        pytest.skip("no IPv6 here")
    assert one.addresses[0].startswith("[::1]:")
    assert await ask(one.addresses[0]) == b"server"
    await one.stop(0)


@pytest.mark.parametrize("address", ["", "nothing", "host:port", "::1:80", "127.0.0.1:"])
@on_both_loops
async def test_an_address_that_cannot_be_read(address: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        await server().listen(address)


@on_both_loops
async def test_an_address_that_cannot_be_bound(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        await server().listen(f"unix:{tmp_path}/no/such/folder")
    with pytest.raises(OSError):
        await server().listen("192.0.2.1:0")


@on_both_loops
async def test_several_servers_share_a_port() -> None:
    one, two = server(), server()
    await one.listen("127.0.0.1:0")
    await two.listen(one.addresses[0])
    assert one.addresses == two.addresses
    await one.stop(0)
    assert await ask(two.addresses[0]) == b"server"
    await two.stop(0)


@on_both_loops
async def test_nagle_is_off() -> None:
    one = server()
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    assert await eventually(lambda: len(one._live) == 1)
    (protocol,) = one._live
    accepted = protocol._transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
    await one.stop(0)


# Unix sockets.


@on_both_loops
async def test_a_successor_takes_over_the_path_while_the_predecessor_serves(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/sock"
    one, two = server(b"one"), server(b"two")
    await one.listen(address)
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as old:
        assert await old.unary_unary("/test/Name")(b"", timeout=10) == b"one"
        await two.listen(address)
        assert await ask(address) == b"two"
        assert await old.unary_unary("/test/Name")(b"", timeout=10) == b"one"
        assert [path.name for path in tmp_path.iterdir()] == ["sock"]
    await one.stop(0)
    assert await ask(address) == b"two"
    await two.stop(0)
    assert list(tmp_path.iterdir()) == []


@on_both_loops
async def test_the_longest_path_that_a_configuration_may_have(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    if len(path) > 100:
        pytest.skip("the folder's name is too long")
    path += "s" * (100 - len(path))
    one = server()
    await one.listen(f"unix:{path}")
    assert await ask(f"unix:{path}") == b"server"
    await one.stop(0)


# TLS.


def tls(client_certificates: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    if client_certificates:
        context.load_verify_locations(TLS / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@on_both_loops
async def test_tls() -> None:
    one = server()
    await one.listen("127.0.0.1:0", tls())
    credentials = grpc.ssl_channel_credentials((TLS / "ca.pem").read_bytes())
    assert await ask(one.addresses[0], credentials) == b"server"
    await one.stop(1)


@on_both_loops
async def test_tls_with_client_certificates() -> None:
    one = server()
    await one.listen("127.0.0.1:0", tls(client_certificates=True))
    ca, key, certificate = ((TLS / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem"))
    assert await ask(one.addresses[0], grpc.ssl_channel_credentials(ca, key, certificate)) == b"server"
    with pytest.raises(grpc.RpcError):
        await ask(one.addresses[0], grpc.ssl_channel_credentials(ca))
    await one.stop(0)


@on_both_loops
async def test_a_tls_client_that_does_not_choose_h2_is_turned_away() -> None:
    one = server()
    await one.listen("127.0.0.1:0", tls())
    host, port = one.addresses[0].split(":")
    context = ssl.create_default_context(cafile=str(TLS / "ca.pem"))
    context.set_alpn_protocols(["http/1.1"])
    try:
        _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")
    except OSError:
        pass
    else:
        writer.close()
    assert await eventually(lambda: one.counters.protocol_errors + one.counters.connections_refused == 1)
    assert await eventually(lambda: one.counters.connections_open == 0)
    await one.stop(0)


# Connections.


@on_both_loops
async def test_connections_over_the_limit_are_closed() -> None:
    one = server(limits=TransportLimits(max_connections=2))
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    ends = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
    assert await eventually(lambda: one.counters.connections_open == 2)
    reader, writer = await asyncio.open_connection(host, int(port))
    with pytest.raises(ConnectionError):
        if await read_all(reader) == b"":
            raise ConnectionResetError
    assert one.counters.connections_refused == 1
    for end in [writer, *(writer for _, writer in ends)]:
        end.close()
    await one.stop(0)
    assert one.counters.connections_open == 0


@on_both_loops
async def test_connections_for_which_there_is_no_file_descriptor_are_accepted_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept = socket.socket.accept
    failures = [errno.EMFILE, errno.ENFILE, errno.EMFILE]

    def accept_if_possible(sock: socket.socket) -> Any:
        if failures:
            raise OSError(failures.pop(), "Too many open files")
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", accept_if_possible)
    one = server()
    await one.listen("127.0.0.1:0")
    assert await ask(one.addresses[0]) == b"server"
    assert failures == []
    await one.stop(0)


@on_both_loops
async def test_a_client_that_says_nothing_is_sent_away_in_time() -> None:
    one = server(limits=TransportLimits(handshake_seconds=0.1))
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    assert b"no SETTINGS in time" in await read_all(reader)
    writer.close()
    await one.stop(0)


@on_both_loops
async def test_the_last_words_of_a_connection_error_reach_a_client_that_goes_on_writing() -> None:
    one = server()
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(HELLO + b"\0\0\0\6\0\0\0\0\0" + bytes(200_000))
    assert b"PING of wrong size" in await read_all(reader)
    writer.close()
    await one.stop(0)


@on_both_loops
async def test_a_client_that_does_not_read_is_not_read_either() -> None:
    one = server(limits=TransportLimits(write_buffer_bytes=1 << 14, control_frames_burst=10**9, stall_seconds=0.5))
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (host, int(port)))
    pings = b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)

    async def flood() -> None:
        await loop.sock_sendall(sock, HELLO)
        while True:
            await loop.sock_sendall(sock, pings * 10_000)

    # The flood ends because the server does not read, and then because it has waited long enough.
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(flood(), 20)
    sock.close()
    assert one.counters.abuse_closes == {"unread socket": 1}
    await one.stop(0)


# Awaited answers.


@on_both_loops
async def test_a_stream_may_be_reset_before_the_wait_for_its_answer_has_begun() -> None:
    closed = []

    class Slow(Named):
        async def later(self) -> bytes:
            return self.name

        def receive(self, message: bytes) -> Any:
            return self.later()

        def close(self) -> None:
            closed.append(True)

    one = H2Server({"/test/Name": Method(lambda metadata: Slow(b"slow"))})
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    peer = Peer(greet=False)
    writer.write(HELLO + peer.open(1, path="/test/Name") + peer.say(1, b"a") + frame(RST_STREAM, 0, 1, bytes(4)))
    assert await eventually(lambda: closed == [True])
    gc.collect()  # a coroutine that was never awaited would warn
    writer.close()
    await one.stop(0)


# Stopping.


@on_both_loops
async def test_connections_in_the_backlog_are_served_before_the_listener_closes() -> None:
    one = server(limits=TransportLimits(linger_seconds=0.1))
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    socks = [socket.create_connection((host, int(port))) for _ in range(5)]
    # Nothing has been accepted: the event loop has not run since.
    await one.stop(0)
    assert one.counters.connections_opened == 5
    for sock in socks:
        assert sock.recv(100)[:4] == b"\0\0\x12\x04"
        sock.close()


@on_both_loops
async def test_after_stopping_nobody_listens() -> None:
    one = server()
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    await one.stop(0)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))
    assert one.addresses == []


@on_both_loops
async def test_a_tls_handshake_that_nobody_finishes_does_not_put_off_the_drain() -> None:
    one = server(limits=TransportLimits(linger_seconds=0.1, handshake_seconds=600))
    await one.listen("127.0.0.1:0", tls())
    host, port = one.addresses[0].split(":")
    context = ssl.create_default_context(cafile=str(TLS / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")
    writer.write(HELLO)
    await reader.readexactly(27)
    silent = socket.create_connection((host, int(port)))
    assert await eventually(lambda: len(one._accepting) == 1)
    stopping = asyncio.ensure_future(one.stop(300))
    while b"draining" not in await asyncio.wait_for(reader.read(1 << 16), 20):
        pass
    assert not stopping.done()
    silent.close()
    writer.close()
    await asyncio.wait_for(stopping, 20)


@on_both_loops
async def test_tls_handshakes_that_nobody_finishes_end_with_the_grace() -> None:
    one = server(limits=TransportLimits(linger_seconds=0.1, handshake_seconds=600))
    await one.listen("127.0.0.1:0", tls())
    host, port = one.addresses[0].split(":")
    silent = socket.create_connection((host, int(port)))
    assert await eventually(lambda: len(one._accepting) == 1)
    await asyncio.wait_for(one.stop(0.1), 20)
    assert not one._accepting
    silent.close()


@on_both_loops
async def test_tls_handshakes_that_nobody_finishes_are_bounded() -> None:
    one = server(limits=TransportLimits(linger_seconds=0.1, max_connections=3))
    await one.listen("127.0.0.1:0", tls())
    host, port = one.addresses[0].split(":")
    socks = [socket.create_connection((host, int(port))) for _ in range(5)]
    assert await eventually(lambda: one.counters.connections_refused == 2)
    assert len(one._accepting) == 3
    for sock in socks:
        sock.close()
    assert await eventually(lambda: not one._accepting)
    assert one.counters.connections_refused == 5
    await one.stop(0)


@on_both_loops
async def test_a_client_that_ignores_goaway_is_cut_after_the_grace() -> None:
    one = server(limits=TransportLimits(linger_seconds=0.1))
    await one.listen("127.0.0.1:0")
    host, port = one.addresses[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(HELLO)
    await reader.readexactly(27)
    await asyncio.wait_for(one.stop(0.2), 20)
    assert one.counters.connections_open == 0
    assert (await read_all(reader)).count(b"\x07\0\0\0\0\0") == 2
    writer.close()
