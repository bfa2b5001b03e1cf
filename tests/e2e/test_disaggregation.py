"""Prefill and decode apart, through a real Envoy: who does which part, that the answer is whole, and that nothing fails
when a pod that prefills is killed."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

import bench.lab
from bench.figures.accounting import as_aibrix
from bench.lab import Lab, get
from workers.envoy import bootstrap

pytestmark = pytest.mark.envoy

ROLESETS = ((2, 1), (1, 2))
"""Pods 0 and 1 prefill for 2, pod 3 for 4 and 5."""
DECODED_BY = {"pod-0": {"pod-2"}, "pod-1": {"pod-2"}, "pod-3": {"pod-4", "pod-5"}}


def duplex(document: dict[str, Any]) -> dict[str, Any]:
    """Our bootstrap, but bodies come and go in pieces."""
    manager = document["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"][0]["typed_config"]["processing_mode"] |= {
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
    }
    return document


@pytest.fixture(scope="module", params=["access-log", "stream", "aibrix", "duplex"])
def divided(request: pytest.FixtureRequest) -> Iterator[Lab]:
    patch = pytest.MonkeyPatch()
    mode: str = request.param
    if mode in ("aibrix", "duplex"):
        change = as_aibrix if mode == "aibrix" else duplex
        patch.setattr(bench.lab, "bootstrap", lambda config: change(bootstrap(config)))
    with Lab(
        pods=6,
        rolesets=ROLESETS,
        workers=2,
        strategy="pd",
        accounting="access-log" if mode == "access-log" else "stream",
        process_per_pod=True,
        settings={"pd": {"timeout_seconds": 10}},
    ) as running:
        patch.undo()
        yield running


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=40)) as session:
        yield session


async def ask(client: aiohttp.ClientSession, lab: Lab, text: str, **more: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"model": lab.model, "messages": [{"role": "user", "content": text}], "max_tokens": 20, **more}
    async with client.post(f"{lab.envoy_url}/v1/chat/completions", json=body) as answer:
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}, await answer.read()


def computed(lab: Lab, number: int) -> float:
    """Prompt tokens that a pod has computed itself."""
    page = get(lab.addresses[number], "/metrics")[1].decode()
    lines = [line for line in page.splitlines() if line.startswith("vllm:request_prefill_kv_computed_tokens_sum")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def in_flight(lab: Lab) -> int:
    return sum(pod["own"]["requests"] for pod in lab.believed_pods())


async def test_one_pod_prefills_and_another_of_its_roleset_answers(divided: Lab, client: aiohttp.ClientSession) -> None:
    text = "Tell me everything about disaggregation. " * 60
    before = [computed(divided, number) for number in range(6)]
    status, headers, body = await ask(client, divided, text)
    answer = json.loads(body)
    assert status == 200
    assert answer["choices"][0]["finish_reason"] and answer["usage"]["completion_tokens"] == 20
    prefill, decode = headers["prefill-target-pod"], headers["target-pod"]
    assert decode in DECODED_BY[prefill]
    assert headers["x-pod"] == headers["target-pod-ip"] == divided.addresses[int(decode[-1])]
    assert (headers["prefill-target-pod-ip"], headers["routing-strategy"]) == ("127.0.0.1", "pd")
    more = [computed(divided, number) - then for number, then in enumerate(before)]
    assert more[int(prefill[-1])] > 300
    assert more[int(decode[-1])] == 1
    assert sum(more) == more[int(prefill[-1])] + 1


async def test_a_prompt_with_the_same_prefix_is_prefilled_where_the_first_was(
    divided: Lab, client: aiohttp.ClientSession
) -> None:
    texts = [f"What {name} has said before is said again. " * 400 for name in ("Ann", "Bob", "Cy", "Di")]
    firsts = [(await ask(client, divided, text))[1]["prefill-target-pod"] for text in texts]
    await asyncio.sleep(1.5)  # what the pods were promised is done, whatever it was taken to last
    again = [(await ask(client, divided, text + "More."))[1]["prefill-target-pod"] for text in texts]
    # One may go elsewhere all the same, where a pod seems to be busy for a moment.
    assert sum(one == other for one, other in zip(firsts, again, strict=True)) >= 3, (firsts, again)


async def test_a_stream_comes_whole_and_long_bodies_pass(divided: Lab, client: aiohttp.ClientSession) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    status, headers, body = await ask(client, divided, "long " * 20_000, **options)
    assert status == 200 and headers["prefill-target-pod"] in DECODED_BY
    assert body.endswith(b"data: [DONE]\n\n") and b'"completion_tokens":20' in body


async def test_a_body_without_a_length_is_changed_too(divided: Lab, client: aiohttp.ClientSession) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model": "%b", "max_tokens": 5, "messages": ' % divided.model.encode()
        yield b'[{"role": "user", "content": "in pieces"}]}'

    headers = {"content-type": "application/json"}
    async with client.post(f"{divided.envoy_url}/v1/chat/completions", data=pieces(), headers=headers) as answer:
        assert answer.status == 200 and answer.headers["prefill-target-pod"] in DECODED_BY
        assert (await answer.json())["usage"]["completion_tokens"] == 5


async def test_many_at_once_are_all_answered_and_leave_nothing_behind(
    divided: Lab, client: aiohttp.ClientSession
) -> None:
    answers = await asyncio.gather(*(ask(client, divided, f"{number} times " * 200) for number in range(40)))
    assert {status for status, *_ in answers} == {200}
    assert {headers["prefill-target-pod"] for _, headers, _ in answers} == set(DECODED_BY)
    await until_idle(divided)


async def test_a_client_that_leaves_while_its_prompt_is_prefilled(divided: Lab, client: aiohttp.ClientSession) -> None:
    work = [asyncio.ensure_future(ask(client, divided, f"{number} " * 60_000)) for number in range(8)]
    await asyncio.sleep(0.3)
    for each in work:
        each.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    await until_idle(divided)


async def test_a_worker_that_dies_meanwhile_leaves_no_charges(divided: Lab, client: aiohttp.ClientSession) -> None:
    work = [asyncio.ensure_future(ask(client, divided, f"{number} " * 30_000)) for number in range(6)]
    async with asyncio.timeout(30):
        while not in_flight(divided):
            await asyncio.sleep(0.02)
    killed = divided.worker_pids()[0]
    os.kill(killed, signal.SIGKILL)
    answers = await asyncio.gather(*work)
    assert {status for status, *_ in answers} <= {200, 503, 504}
    async with asyncio.timeout(30):
        while killed in divided.worker_pids() or len(divided.worker_pids()) < 2:
            await asyncio.sleep(0.05)
    await until_idle(divided)
    assert (await ask(client, divided, "And then?"))[0] == 200


async def until_idle(lab: Lab) -> None:
    async with asyncio.timeout(30):
        while in_flight(lab):
            await asyncio.sleep(0.1)


async def test_it_is_told_in_the_metrics(divided: Lab, client: aiohttp.ClientSession) -> None:
    assert (await ask(client, divided, "one more"))[0] == 200
    page = get(divided.config.admin, "/metrics")[1].decode()
    assert 'pointsman_prefills_total{result="ok"}' in page
    assert "pointsman_prefill_seconds_count" in page


async def test_when_a_prefill_pod_is_killed_nothing_fails(divided: Lab, client: aiohttp.ClientSession) -> None:
    """The last test of the lab: its pod does not come back."""
    text = "This one is known to a pod that will be killed. " * 100
    killed = (await ask(client, divided, text))[1]["prefill-target-pod"]
    process = divided.pod_processes[int(killed[-1])]
    divided.processes.remove(process)
    process.popen.kill()
    process.popen.wait()
    for number in range(12):
        status, headers, body = await ask(client, divided, f"{text} {number}")
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 20
        assert headers.get("prefill-target-pod") != killed
    await until_idle(divided)
