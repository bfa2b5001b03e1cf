"""Models that sleep: whom their requests wake, and that it neither waits nor repeats itself."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from exchanges import Contract
from fleet import chat, make_record

from router.fleet import Pod
from workers.wake import Waker

CLAIM = "modelclaim.aibrix.ai/a-claim"


class Runtime:
    """What listens beside the engine. Answers when `may_answer` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.may_answer = asyncio.Event()
        self.reply = b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n"
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
        self.asked.append((head.partition("\r\n")[0], json.loads(await reader.readexactly(length))))
        await self.may_answer.wait()
        writer.write(self.reply)
        await self.hang_up(writer)

    @staticmethod
    async def hang_up(writer: asyncio.StreamWriter) -> None:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    found = Runtime()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    yield found
    found.may_answer.set()
    server.close()
    await server.wait_closed()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        await task


def sleeper(**changes: object) -> Pod:
    return Pod(make_record(0, address="127.0.0.1:8000", **changes))


async def until_asked(runtime: Runtime, times: int) -> None:
    async with asyncio.timeout(10):
        while len(runtime.asked) < times:
            await asyncio.sleep(0.01)


async def settled(waker: Waker) -> None:
    async with asyncio.timeout(10):
        while waker._asking:
            await asyncio.sleep(0.01)


async def test_a_pod_is_asked_once_until_it_has_answered(runtime: Runtime) -> None:
    waker = Waker(runtime.port, pause_seconds=0.0)
    for _ in range(5):
        waker.ask(sleeper(), "qwen")
    await until_asked(runtime, 1)
    waker.ask(sleeper(), "qwen")
    waker.ask(sleeper(), "llama")
    await until_asked(runtime, 2)
    request, body = runtime.asked[0]
    assert request == "POST /v1/runtime/models/wake HTTP/1.1"
    assert body["model_name"] == "qwen"
    assert body["operation_id"].startswith("gateway-wake/standalone/pod-0/qwen/")
    runtime.may_answer.set()
    await settled(waker)
    waker.ask(sleeper(), "qwen")
    await until_asked(runtime, 3)
    await settled(waker)
    assert [body["model_name"] for _, body in runtime.asked] == ["qwen", "llama", "qwen"]
    assert runtime.asked[2][1]["operation_id"] != runtime.asked[0][1]["operation_id"]


@pytest.mark.parametrize("reply", [b"", b"nonsense\r\n", b"HTTP/1.1 500 No\r\n\r\n", b"x" * 5000, b"HTTP/1.1 x\r\n"])
async def test_no_answer_does_harm(runtime: Runtime, reply: bytes) -> None:
    runtime.reply = reply
    runtime.may_answer.set()
    waker = Waker(runtime.port, pause_seconds=0.0)
    waker.ask(sleeper(), "qwen")
    await until_asked(runtime, 1)
    await settled(waker)


async def test_nobody_listens_or_nobody_answers(runtime: Runtime) -> None:
    silent, nobody = Waker(runtime.port, timeout_seconds=0.05, pause_seconds=0.0), Waker(1, pause_seconds=0.0)
    silent.ask(sleeper(), "qwen")
    nobody.ask(sleeper(), "qwen")
    await settled(silent)
    await settled(nobody)


async def test_closing_forgets_what_is_under_way(runtime: Runtime) -> None:
    waker = Waker(runtime.port, pause_seconds=0.0)
    waker.ask(sleeper(), "qwen")
    await until_asked(runtime, 1)
    waker.close()
    await settled(waker)


def asked_for(contract: Contract, model: str) -> list[tuple[str, str]]:
    """Whom a request for this model would wake, after its refusal."""
    asked: list[tuple[str, str]] = []
    contract.scheduler.wake = lambda pod, name: asked.append((pod.name, name))
    assert contract.routed(body=chat(model)).last.status == 503
    return asked


@pytest.mark.parametrize(
    ("states", "woken"),
    [
        (["sleeping"], ["pod-0"]),
        (["activating"], []),
        (["failed"], []),
        (["failed", "sleeping", "sleeping"], ["pod-1"]),
        (["sleeping", "activating"], []),
    ],
)
def test_a_request_for_a_sleeping_model_wakes_one_of_its_pods(states: list[str], woken: list[str]) -> None:
    records = [
        make_record(slot, models=("llama", "qwen"), labels={CLAIM: json.dumps({"model": "qwen", "state": state})})
        for slot, state in enumerate(states)
    ]
    contract = Contract(records=records)
    assert asked_for(contract, "qwen") == [(pod, "qwen") for pod in woken]
    assert contract.routed().last.kind == "request_body"


def test_a_model_that_sleeps_by_its_settings_wakes_its_first_pod() -> None:
    contract = Contract(2, settings={"llama": {"state": "sleeping"}})
    assert asked_for(contract, "llama") == [("pod-0", "llama")]


async def test_after_an_answer_a_pod_is_left_alone_for_a_while(runtime: Runtime) -> None:
    waker = Waker(runtime.port, pause_seconds=60.0)
    runtime.may_answer.set()
    for _ in range(50):
        waker.ask(sleeper(), "qwen")
        await asyncio.sleep(0.001)
    await until_asked(runtime, 1)
    await asyncio.sleep(0.05)
    waker.ask(sleeper(), "qwen")
    await asyncio.sleep(0.05)
    assert len(runtime.asked) == 1
    waker.close()
    await settled(waker)
