"""What sends prefills: kept connections and their bound, timeouts, answers of all kinds."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web
from exchanges import Contract, Said
from fleet import chat, make_record, read, request_body, request_headers

from router.fleet import Pod
from router.handover import PrefillFailed, Prefills
from workers import prefill
from workers.prefill import PrefillSender

PATH = "/v1/chat/completions"


class Engine:
    """A pod that answers with `status` and `answer` when it may."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.connections: set[object] = set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.status, self.answer = 200, b'{"kv_transfer_params": {}}'
        self.left = 0
        self.pod = Pod(make_record(0))

    async def serve(self, request: web.Request) -> web.Response:
        self.connections.add(request.transport)
        self.asked.append(
            (
                request.path_qs,
                {name.lower(): each for name, each in request.headers.items()},
                json.loads(await request.read()),
            )
        )
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        return web.Response(status=self.status, body=self.answer)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Engine]:
    found = Engine()
    app = web.Application()
    app.router.add_post("/{path:.*}", found.serve)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.pod = Pod(make_record(0, address="127.0.0.1:{1}".format(*runner.addresses[0])))
    yield found
    found.may_answer.set()
    await runner.cleanup()


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with serving() as found:
        yield found


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., PrefillSender]]:
    made: list[PrefillSender] = []

    def sender(timeout_seconds: float = 20.0, connections: int = 8) -> PrefillSender:
        made.append(PrefillSender(timeout_seconds, connections))
        return made[-1]

    yield sender
    for each in made:
        await each.close()


Make = Callable[..., PrefillSender]


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not happened():
            await asyncio.sleep(0.005)


async def result(work: Awaitable[bytes]) -> str:
    try:
        await work
    except PrefillFailed as error:
        return error.result
    return "ok"


async def test_prompts_are_sent_on_connections_that_are_kept(engine: Engine, make: Make) -> None:
    sender = make()
    for number in range(3):
        answer = await sender.post(engine.pod, PATH, {"x-request-id": "r"}, b"[%d]" % number)
        assert answer == engine.answer
    assert len(engine.connections) == 1
    path, headers, body = engine.asked[-1]
    assert (path, headers["x-request-id"], body) == (PATH, "r", [2])


async def test_no_more_connections_than_allowed_are_opened_to_a_pod(engine: Engine, make: Make) -> None:
    engine.may_answer.clear()
    sender = make(connections=2)
    work = [asyncio.ensure_future(sender.post(engine.pod, PATH, {}, b"1")) for _ in range(6)]
    await until(lambda: len(engine.asked) == 2)
    engine.may_answer.set()
    await asyncio.gather(*work)
    assert len(engine.asked) == 6 and len(engine.connections) == 2


@pytest.mark.parametrize(
    ("status", "outcome"), [(200, "ok"), (400, "refused"), (404, "refused"), (500, "failed"), (302, "failed")]
)
async def test_what_an_answer_says(engine: Engine, make: Make, status: int, outcome: str) -> None:
    engine.status = status
    assert await result(make().post(engine.pod, PATH, {}, b"1")) == outcome
    assert len(engine.asked) == 1


async def test_a_pod_that_does_not_answer_in_time_is_left(engine: Engine, make: Make) -> None:
    engine.may_answer.clear()
    assert await result(make(timeout_seconds=0.2).post(engine.pod, PATH, {}, b"1")) == "timeout"
    await until(lambda: engine.left == 1)


async def test_a_pod_that_is_gone(engine: Engine, make: Make) -> None:
    nobody = Pod(make_record(0, address="127.0.0.1:1"))
    assert await result(make().post(nobody, PATH, {}, b"1")) == "failed"


async def test_an_answer_without_end_is_not_kept(engine: Engine, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "MAX_ANSWER_BYTES", 1000)
    engine.answer = b"x" * 1001
    assert await result(make().post(engine.pod, PATH, {}, b"1")) == "failed"


async def test_whoever_leaves_takes_the_prefill_along(engine: Engine, make: Make) -> None:
    engine.may_answer.clear()
    work = asyncio.ensure_future(make().post(engine.pod, PATH, {}, b"1"))
    await until(lambda: len(engine.asked) == 1)
    work.cancel()
    await until(lambda: engine.left == 1)
    assert work.cancelled()


def posting(sender: PrefillSender, engine: Engine, ended: list[str]) -> Callable[..., Coroutine[Any, Any, str]]:
    """Work for `start` that notes what became of it."""

    async def work(written: Callable[[], None]) -> str:
        ended.append(await result(sender.post(engine.pod, PATH, {}, b"1", written)))
        return ended[0]

    return work


async def test_what_is_begun_is_waited_for_until_it_is_on_its_way(engine: Engine, make: Make) -> None:
    engine.may_answer.clear()
    sender = make()
    ended: list[str] = []
    work = posting(sender, engine, ended)

    assert await sender.start(work) == ""
    assert not ended
    engine.may_answer.set()
    await until(lambda: ended == ["ok"])


async def test_what_cannot_be_begun_says_so(make: Make) -> None:
    sender = make()

    async def work(written: Callable[[], None]) -> str:
        return await result(sender.post(Pod(make_record(0, address="127.0.0.1:1")), PATH, {}, b"1", written))

    assert await sender.start(work) == "failed"


async def test_whoever_leaves_before_it_is_on_its_way_ends_it(make: Make) -> None:
    sender = make()
    ended = asyncio.Event()

    async def work(written: Callable[[], None]) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        ended.set()
        return "cancelled"

    waiting = asyncio.ensure_future(sender.start(work))
    await asyncio.sleep(0.01)
    waiting.cancel()
    async with asyncio.timeout(20):
        await ended.wait()


async def test_a_pod_is_told_again_since_it_may_not_know_yet(
    engine: Engine, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "TELL_SECONDS", (0.0, 0.01))
    make().tell(engine.pod, "/abort_request", b'{"rid": "r"}')
    await until(lambda: len(engine.asked) == 2)
    assert engine.asked[0][0] == "/abort_request" and engine.asked[1][2] == {"rid": "r"}


async def test_a_draining_worker_waits_for_what_is_under_way(engine: Engine, make: Make) -> None:
    engine.may_answer.clear()
    sender = make()
    ended: list[str] = []
    work = posting(sender, engine, ended)

    await sender.start(work)
    closing = asyncio.ensure_future(sender.close(20.0))
    engine.may_answer.set()
    await closing
    assert ended == ["ok"]


# With the router around it


def sglang(sender: PrefillSender, *prefill: str, decode: Engine) -> Contract:
    addresses = [("prefill", address) for address in prefill] + [("decode", decode.pod.address)]
    contract = Contract(
        strategy="pd",
        records=[
            make_record(slot, address=address, role=role, roleset="rs", engine="sglang")
            for slot, (role, address) in enumerate(addresses)
        ],
    )
    contract.scheduler.prefills = Prefills(sender)
    return contract


async def asked_of(contract: Contract) -> Said:
    stream = contract.exchange()
    stream.exchange.receive(request_headers())
    reply = stream.exchange.receive(request_body(chat()))
    assert isinstance(reply, Awaitable)
    (message,) = read(await reply)
    return Said(message)


async def test_sglangs_decode_pod_hears_of_a_prefill_that_fails_after_both_were_asked(
    engine: Engine, make: Make
) -> None:
    engine.may_answer.clear()
    engine.status = 500
    async with serving() as decode:
        contract = sglang(make(), engine.pod.address, decode=decode)
        reply = await asked_of(contract)
        await until(lambda: len(engine.asked) == 1)
        assert not decode.asked
        engine.may_answer.set()
        await until(lambda: len(decode.asked) == 1)
        sent = json.loads(reply.body)
        assert engine.asked[0][2]["bootstrap_room"] == sent["bootstrap_room"]
        assert (decode.asked[0][0], decode.asked[0][2]) == ("/abort_request", {"rid": sent["rid"]})


async def test_sglangs_pods_that_cannot_be_reached_are_known_before_the_decode_pod_is_asked(
    engine: Engine, make: Make
) -> None:
    async with serving() as decode:
        contract = sglang(make(), "127.0.0.1:1", "127.0.0.1:1", decode=decode)
        assert (await asked_of(contract)).status == 503
        contract = sglang(make(), "127.0.0.1:1", engine.pod.address, decode=decode)
        for _ in range(4):
            assert json.loads((await asked_of(contract)).body)["bootstrap_host"] == "127.0.0.1"
        await until(lambda: len(engine.asked) == 4)
        assert not decode.asked
