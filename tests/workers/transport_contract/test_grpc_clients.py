"""What every transport does for a real gRPC client, in its blocking and its asyncio form."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from structlog.testing import capture_logs

STREAM, WATCH = "/test.Echo/Stream", "/test.Echo/Watch"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


@pytest.fixture
def channel(served: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address, options=OPTIONS) as channel:
        yield channel


def ask(channel: grpc.Channel, *messages: bytes, **options: Any) -> list[bytes]:
    """Send all messages and collect all replies."""
    return list(channel.stream_stream(STREAM)(iter(messages), timeout=options.pop("timeout", 20), **options))


def test_messages_are_answered_in_order(channel: grpc.Channel) -> None:
    words = [b"%d" % i for i in range(50)]
    assert ask(channel, *words) == words


def test_an_empty_message_is_a_message(channel: grpc.Channel) -> None:
    assert ask(channel, b"", b"a", b"") == [b"", b"a", b""]


def test_a_unary_call(channel: grpc.Channel) -> None:
    assert channel.unary_unary(STREAM)(b"hello", timeout=20) == b"hello"


def test_a_call_without_messages(channel: grpc.Channel, served: Any) -> None:
    assert ask(channel) == []
    assert served.calls[0].half_closed == 1


def test_large_messages(channel: grpc.Channel) -> None:
    bodies = [bytes([i]) * size for i, size in enumerate([100_000, 3_000_000, 8 << 20, 70_000])]
    assert ask(channel, *bodies) == bodies


def test_a_message_over_the_limit(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, bytes((8 << 20) + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_no_reply_and_several_replies(channel: grpc.Channel) -> None:
    assert ask(channel, b"silent", b"twice", b"silent", b"a") == [b"one", b"two", b"a"]


def test_a_last_reply_after_the_clients_end(channel: grpc.Channel) -> None:
    assert ask(channel, b"a", metadata=[("farewell", "1")]) == [b"a", b"farewell"]


def test_metadata(channel: grpc.Channel, served: Any) -> None:
    ask(channel, metadata=[("x-key", "value"), ("x-key", "other"), ("x-bin", b"\0\1")])
    metadata = served.calls[0].metadata
    assert metadata["x-key"] in ("value, other", "value,other")
    assert "x-bin" not in metadata
    assert not any(name.startswith(":") for name in metadata)


def test_a_finished_call_ends_with_ok_though_the_client_could_go_on(channel: grpc.Channel, served: Any) -> None:
    import queue

    words: queue.Queue[bytes] = queue.Queue()
    words.put(b"a")
    words.put(b"finish")
    call = channel.stream_stream(STREAM)(iter(words.get, None), timeout=20)
    assert list(call) == [b"a", b"finish"]
    assert call.code() is grpc.StatusCode.OK
    assert served.until(lambda: served.calls[0].closed == 1)
    words.put(b"")
    assert ask(channel, b"next") == [b"next"]


def test_errors_carry_code_and_text(channel: grpc.Channel) -> None:
    replies = channel.stream_stream(STREAM)(iter([b"a", b"fail", b"never"]), timeout=20)
    assert next(replies) == b"a"
    with pytest.raises(grpc.RpcError) as caught:
        next(replies)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "nicht schön: 100 %"


def test_a_bug_in_a_call_is_internal_and_hides_its_text(channel: grpc.Channel) -> None:
    with capture_logs() as logs, pytest.raises(grpc.RpcError) as caught:
        ask(channel, b"crash")
    assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert "bug" not in caught.value.details()
    assert ["a call failed" in line["event"] for line in logs] == [True]


def test_a_method_may_refuse_to_open(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, b"a", metadata=[("refuse", "1")])
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_unknown_methods(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/test.Echo/Nothing")(b"a", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_awaited_answers_keep_their_order_and_do_not_hold_up_others(channel: grpc.Channel) -> None:
    waiting = channel.stream_stream(STREAM)(iter([b"wait", b"after", b"wait"]), timeout=20)
    assert ask(channel, b"meanwhile") == [b"meanwhile"]
    assert list(waiting) == [b"wait", b"after", b"wait"]


def test_an_awaited_error(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, b"wait-fail", b"held")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_deadline(channel: grpc.Channel, served: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, b"forever", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert served.until(lambda: served.calls[0].closed == 1)


def test_a_cancelled_call_is_closed(channel: grpc.Channel, served: Any) -> None:
    import queue

    words: queue.Queue[bytes] = queue.Queue()
    words.put(b"a")
    call = channel.stream_stream(STREAM)(iter(words.get, b"stop"), timeout=20)
    assert next(call) == b"a"
    call.cancel()
    words.put(b"stop")
    assert served.until(lambda: served.calls[0].closed == 1)


def test_a_call_whose_channel_goes_away_is_closed(served: Any) -> None:
    import queue

    words: queue.Queue[bytes] = queue.Queue()
    words.put(b"a")
    with grpc.insecure_channel(served.address, options=OPTIONS) as channel:
        call = channel.stream_stream(STREAM)(iter(words.get, b"stop"), timeout=20)
        assert next(call) == b"a"
    words.put(b"stop")
    assert served.until(lambda: served.calls[0].closed == 1)


def test_pushed_messages(channel: grpc.Channel, served: Any) -> None:
    call = channel.unary_stream(WATCH)(b"silent", timeout=20)
    assert next(call) == b"started"
    watching = served.calls[0]
    assert served.until(lambda: watching.half_closed == 1)
    served.loop.call_soon_threadsafe(watching.push, b"news")
    assert next(call) == b"news"
    assert watching.closed == 0

    def say_goodbye() -> None:
        watching.finished = True
        watching.push(b"last")

    served.loop.call_soon_threadsafe(say_goodbye)
    assert list(call) == [b"last"]
    assert call.code() is grpc.StatusCode.OK


def test_compressed_messages_are_not_supported(served: Any) -> None:
    options = [*OPTIONS, ("grpc.default_compression_algorithm", grpc.Compression.Gzip)]
    with grpc.insecure_channel(served.address, options=options) as channel:
        try:
            assert ask(channel, bytes(10_000)) == [bytes(10_000)]
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_a_successor_takes_a_unix_path_over_and_keeps_it(served: Any, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/sock"

    def asked() -> list[bytes]:
        with grpc.insecure_channel(address, options=OPTIONS) as channel:
            return ask(channel, b"a")

    served.run(served.server.listen(address))
    assert asked() == [b"a"]
    successor = served.another()
    served.run(successor.listen(address))
    served.run(served.server.stop(0))
    assert asked() == [b"a"]
    assert [path.name for path in tmp_path.iterdir()] == ["sock"]
    served.run(successor.stop(0))
    assert list(tmp_path.iterdir()) == []


async def test_many_streams_at_once(served: Any) -> None:
    async with grpc.aio.insecure_channel(served.address, options=OPTIONS) as channel:

        async def one(i: int) -> bool:
            call = channel.stream_stream(STREAM, request_serializer=None, response_deserializer=None)(timeout=20)
            for word in (b"%d" % i, bytes(i * 100), b"wait"):
                await call.write(word)
                if await call.read() != word:
                    return False
            await call.done_writing()
            return await call.read() is grpc.aio.EOF and await call.code() is grpc.StatusCode.OK

        assert all(await asyncio.gather(*(one(i) for i in range(100))))


async def test_stopping_ends_idle_calls_with_ok_and_lets_the_others_finish(served: Any) -> None:
    async with grpc.aio.insecure_channel(served.address, options=OPTIONS) as channel:
        idle = channel.stream_stream(STREAM)(timeout=20)
        busy = channel.stream_stream(STREAM)(timeout=20)
        for call, word in ((idle, b"idle"), (busy, b"busy")):
            await call.write(word)
            assert await call.read() == word
        stopped = asyncio.run_coroutine_threadsafe(served.server.stop(10), served.loop)
        assert await idle.read() is grpc.aio.EOF
        assert await idle.code() is grpc.StatusCode.OK
        await busy.write(b"finish")
        assert await busy.read() == b"finish"
        assert await busy.read() is grpc.aio.EOF
        assert await busy.code() is grpc.StatusCode.OK
        await asyncio.wrap_future(stopped)


async def test_stopping_without_grace_is_unavailable_for_open_calls(served: Any) -> None:
    async with grpc.aio.insecure_channel(served.address, options=OPTIONS) as channel:
        call = channel.stream_stream(STREAM)(timeout=20)
        await call.write(b"a")
        assert await call.read() == b"a"
        await asyncio.to_thread(served.run, served.server.stop(0))
        with pytest.raises(grpc.RpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
            raise grpc.aio.AioRpcError(await call.code(), None, None)
        assert await call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
