import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from workers.scrape.poll import Poller, PollError

PAGE = (Path(__file__).parents[2] / "fixtures" / "vllm-0.32" / "metrics-after-evictions.txt").read_bytes()

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine to its end on each kind of loop; what it leaves unhandled is an error."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        problems: list[dict[str, Any]] = []
        runner.get_loop().set_exception_handler(lambda _, context: problems.append(context))
        yield runner.run
        assert problems == []


class Server:
    """An HTTP server played by hand. Each connection gets the next of `scripts`, the last one for good."""

    def __init__(self, *scripts: Callable[["Peer"], Awaitable[None]]) -> None:
        self.scripts = list(scripts)
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            await script(Peer(self, reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class Peer:
    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server, self._reader, self._writer = server, reader, writer

    async def hear(self) -> None:
        self._server.requests.append(await self._reader.readuntil(b"\r\n\r\n"))

    async def gone(self) -> None:
        """Wait until the client has closed."""
        await self._reader.read()

    async def say(self, *parts: bytes) -> None:
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()
            await asyncio.sleep(0)

    async def page(self, page: bytes, headers: bytes = b"") -> None:
        await self.hear()
        await self.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n" % (len(page), headers), page)


@asynccontextmanager
async def serving(*scripts: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[Server]:
    played = Server(*scripts)
    server = await asyncio.start_server(played.serve, "127.0.0.1", 0)
    played.port = server.sockets[0].getsockname()[1]
    async with server:
        yield played


async def pages(peer: Peer) -> None:
    while True:
        await peer.page(PAGE)


def answering(*parts: bytes, then_close: bool = False) -> Callable[[Peer], Awaitable[None]]:
    async def script(peer: Peer) -> None:
        await peer.hear()
        await peer.say(*parts)
        if not then_close:
            await peer.gone()

    return script


async def failing(poller: Poller) -> PollError:
    with pytest.raises(PollError) as caught:
        await poller.poll()
    return caught.value


def test_polls_of_a_real_server_share_one_connection(run: Run) -> None:
    async def check() -> None:
        peers = set()

        async def metrics(request: web.Request) -> web.Response:
            assert request.transport is not None
            peers.add(request.transport.get_extra_info("peername"))
            assert request.headers["Host"] == f"127.0.0.1:{port}"
            return web.Response(body=PAGE, content_type="text/plain")

        application = web.Application()
        application.router.add_get("/metrics", metrics)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        poller = Poller("127.0.0.1", port)
        try:
            for _ in range(5):
                assert await poller.poll() == PAGE
            assert (await failing(Poller("127.0.0.1", port, "/nothing"))).reason == "status"
        finally:
            poller.close()
            await runner.cleanup()
        assert len(peers) == 1 and poller.connects == 1

    run(check())


def test_the_request_is_a_plain_get(run: Run) -> None:
    async def check() -> None:
        async with serving(pages) as server:
            poller = Poller("localhost", server.port, "/prometheus/metrics?x=1")
            await poller.poll()
            poller.close()
            lines = server.requests[0].split(b"\r\n")
            assert lines[0] == b"GET /prometheus/metrics?x=1 HTTP/1.1"
            assert b"Host: localhost:%d" % server.port in lines
            assert b"Accept-Encoding: identity" in lines

    run(check())


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx 1.0",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nx 1\r\n2;note=a\r\n.0\r\n0\r\nTrailer: 1\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx 1.0",
    ],
    ids=["sized", "chunked", "early hints"],
)
def test_a_page_may_come_in_any_pieces(run: Run, response: bytes) -> None:
    async def check() -> None:
        async with serving(answering(*(response[i : i + 1] for i in range(len(response))))) as server:
            poller = Poller("127.0.0.1", server.port)
            assert await poller.poll() == b"x 1.0"
            poller.close()

    run(check())


def test_a_page_may_end_with_its_connection(run: Run) -> None:
    async def check() -> None:
        async with serving(answering(b"HTTP/1.0 200 OK\r\n\r\n", b"x 1\n", then_close=True)) as server:
            poller = Poller("127.0.0.1", server.port)
            assert await poller.poll() == b"x 1\n"
            assert await poller.poll() == b"x 1\n"
            assert server.connections == 2

    run(check())


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno", "status"),
        (b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /metrics/\r\nContent-Length: 0\r\n\r\n", "status"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "status"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "malformed"),
        (b"\x16\x03\x01\x00\xa5", "malformed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx 1\r\n0\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nx", "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", "malformed"),
    ],
)
def test_what_is_no_page_is_an_error_with_a_reason(run: Run, response: bytes, reason: str) -> None:
    async def check() -> None:
        async with serving(answering(response)) as server:
            poller = Poller("127.0.0.1", server.port)
            assert (await failing(poller)).reason == reason
            server.scripts = [pages]
            poller.close()
            assert await poller.poll() == PAGE
            poller.close()

    run(check())


def test_a_response_cut_short_is_an_error(run: Run) -> None:
    async def check() -> None:
        for response in (b"", b"HTTP/1.1 20", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx 1"):
            async with serving(answering(response, then_close=True)) as server:
                assert (await failing(Poller("127.0.0.1", server.port))).reason == "closed"
                assert server.connections == 1  # a fresh connection is not tried again

    run(check())


@pytest.mark.parametrize("sized", [True, False])
def test_a_page_has_a_bounded_size(run: Run, sized: bool) -> None:
    async def endless(peer: Peer) -> None:
        await peer.hear()
        await peer.say(
            b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 1000000000000\r\n\r\n" if sized else b"\r\n"),
        )
        while True:
            await peer.say(b"x" * 10_000)

    async def check() -> None:
        async with serving(endless) as server:
            error = await failing(Poller("127.0.0.1", server.port, max_bytes=200_000))
            assert error.reason == "too-large"
        async with serving(pages) as server:
            assert (await failing(Poller("127.0.0.1", server.port, max_bytes=len(PAGE) - 1))).reason == "too-large"
            poller = Poller("127.0.0.1", server.port, max_bytes=len(PAGE))
            assert await poller.poll() == PAGE
            poller.close()

    run(check())


def test_endless_headers_are_cut_off(run: Run) -> None:
    async def endless(peer: Peer) -> None:
        await peer.hear()
        await peer.say(b"HTTP/1.1 200 OK\r\n")
        while True:
            await peer.say(b"X-Header: %s\r\n" % (b"x" * 1000))

    async def check() -> None:
        async with serving(endless) as server:
            error = await failing(Poller("127.0.0.1", server.port, max_bytes=1000))
            assert error.reason in ("too-large", "malformed")

    run(check())


def test_a_connection_closed_between_polls_is_replaced(run: Run) -> None:
    async def once(peer: Peer) -> None:
        await peer.page(PAGE)

    async def check() -> None:
        async with serving(once) as server:
            poller = Poller("127.0.0.1", server.port)
            for _ in range(3):
                assert await poller.poll() == PAGE
                await asyncio.sleep(0.01)  # let the close arrive
            assert server.connections == 3 and len(server.requests) == 3

    run(check())


def test_a_close_that_crosses_the_request_is_answered_by_asking_once_more(run: Run) -> None:
    async def closes_when_asked_again(peer: Peer) -> None:
        await peer.page(PAGE)
        await peer.hear()

    async def check() -> None:
        async with serving(closes_when_asked_again, pages) as server:
            poller = Poller("127.0.0.1", server.port)
            assert await poller.poll() == PAGE
            assert await poller.poll() == PAGE
            assert server.connections == 2 and len(server.requests) == 3
            poller.close()

    async def check_once_only() -> None:
        async with serving(closes_when_asked_again, answering(then_close=True)) as server:
            poller = Poller("127.0.0.1", server.port)
            assert await poller.poll() == PAGE
            assert (await failing(poller)).reason == "closed"
            assert server.connections == 2

    run(check())
    run(check_once_only())


def test_a_half_answered_request_is_not_sent_again(run: Run) -> None:
    async def breaks_off(peer: Peer) -> None:
        await peer.page(PAGE)
        await peer.hear()
        await peer.say(b"HTTP/1.1 200 OK\r\n")

    async def check() -> None:
        async with serving(breaks_off, pages) as server:
            poller = Poller("127.0.0.1", server.port)
            await poller.poll()
            assert (await failing(poller)).reason == "closed"
            assert server.connections == 1
            assert await poller.poll() == PAGE
            poller.close()

    run(check())


def test_connection_close_is_obeyed(run: Run) -> None:
    async def says_close(peer: Peer) -> None:
        await peer.page(PAGE, b"Connection: close\r\n")
        await peer.gone()

    async def check() -> None:
        async with serving(says_close) as server:
            poller = Poller("127.0.0.1", server.port)
            await poller.poll()
            await poller.poll()
            assert server.connections == 2

    run(check())


def test_what_nobody_asked_for_ends_the_connection(run: Run) -> None:
    extra = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nlies 1"

    async def together(peer: Peer) -> None:
        await peer.hear()
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nx 1" + extra)
        await peer.gone()

    async def later(peer: Peer) -> None:
        await peer.page(b"x 1")
        await peer.say(extra)
        await peer.gone()

    async def check() -> None:
        async with serving(together, later, pages) as server:
            poller = Poller("127.0.0.1", server.port)
            assert await poller.poll() == b"x 1"
            assert await poller.poll() == b"x 1"
            await asyncio.sleep(0.01)
            assert await poller.poll() == PAGE
            assert server.connections == 3
            poller.close()

    run(check())


def test_a_silent_server_runs_into_the_timeout(run: Run) -> None:
    async def falls_silent(peer: Peer) -> None:
        await peer.page(PAGE)
        await peer.hear()
        await peer.gone()

    async def check() -> None:
        async with serving(falls_silent, pages) as server:
            poller = Poller("127.0.0.1", server.port, timeout=0.1)
            assert await poller.poll() == PAGE
            assert (await failing(poller)).reason == "timeout"
            assert await poller.poll() == PAGE  # over a new connection
            assert server.connections == 2
            poller.close()

    run(check())


def test_a_cancelled_poll_leaves_no_answer_for_the_next(run: Run) -> None:
    async def slow(peer: Peer) -> None:
        await peer.page(PAGE)
        await peer.hear()
        await asyncio.sleep(0.05)
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nold 1")
        await peer.gone()

    async def check() -> None:
        async with serving(slow, pages) as server:
            poller = Poller("127.0.0.1", server.port)
            assert await poller.poll() == PAGE
            task = asyncio.ensure_future(poller.poll())
            while len(server.requests) < 2:
                await asyncio.sleep(0.001)
            with pytest.raises(RuntimeError, match="being polled already"):
                await poller.poll()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await poller.poll() == PAGE
            assert server.connections == 2
            poller.close()

    run(check())


def test_nobody_there_is_a_connect_error_and_a_return_is_noticed(run: Run) -> None:
    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        poller = Poller("127.0.0.1", port)
        assert (await failing(poller)).reason == "connect"
        server = Server(pages)
        async with await asyncio.start_server(server.serve, "127.0.0.1", port):
            assert await poller.poll() == PAGE
            poller.close()

    run(check())


def test_a_name_is_resolved_for_each_connection(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with serving(answering(b"HTTP/1.0 200 OK\r\n\r\nx 1\n", then_close=True)) as server:
            loop = asyncio.get_running_loop()
            asked = []
            resolve = socket.getaddrinfo

            def counting(host: Any, *args: Any, **kwargs: Any) -> Any:
                asked.append(host)
                return resolve(host, *args, **kwargs)

            if type(loop).__module__.startswith("uvloop"):
                pytest.skip("libuv asks the system directly")
            monkeypatch.setattr(socket, "getaddrinfo", counting)
            poller = Poller("localhost", server.port)
            await poller.poll()
            await poller.poll()
            assert asked == ["localhost", "localhost"]

            def unknown(*args: Any, **kwargs: Any) -> Any:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

            monkeypatch.setattr(socket, "getaddrinfo", unknown)
            assert (await failing(poller)).reason == "connect"

    run(check())


@pytest.mark.parametrize(
    ("host", "path"), [("a b", "/"), ("a\r\nX: 1", "/"), ("a", "/\n"), ("a", "metrics"), ("ä", "/")]
)
def test_a_request_cannot_be_smuggled_in(host: str, path: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a request"):
        Poller(host, 80, path)
