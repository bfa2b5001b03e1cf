"""What the default strategy does with prefixes, through a real Envoy, over all workers."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from client import chat, send

from bench.lab import Lab

pytestmark = pytest.mark.envoy


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as opened:
        yield opened


def story(name: object) -> str:
    """Some 2,000 tokens that no other name shares."""
    return f"{name} is a name that has a long story. " * 200


async def idle(lab: Lab) -> None:
    """Until nothing is in flight, by the router's account and by the last poll of each pod."""
    async with asyncio.timeout(20):
        while any(pod["own"]["requests"] or pod["engine_metrics"]["running"] for pod in lab.believed_pods()):
            await asyncio.sleep(0.05)


async def explained(session: aiohttp.ClientSession, lab: Lab, body: dict[str, Any]) -> dict[str, int]:
    """Cached tokens that the router believes each pod to have of a prompt."""
    headers = {"x-pointsman-explain": "only"}
    async with session.post(lab.envoy_url + "/v1/chat/completions", json=body, headers=headers) as answer:
        receipt = json.loads(await answer.text())
    return {pod["pod"]: pod["matched_tokens"] for pod in receipt["candidates"]}


async def test_a_prompt_follows_its_beginning_whichever_worker_takes_it(session: aiohttp.ClientSession) -> None:
    with Lab(pods=4, workers=3) as lab:
        first = {}
        for name in range(8):
            first[name] = (await send(session, lab.envoy_url, chat(lab.model, story(name)))).pod
        assert len(set(first.values())) > 1, "that are different go to different pods"
        for turn in range(6):
            for name, pod in first.items():
                await idle(lab)
                assert (await send(session, lab.envoy_url, chat(lab.model, story(name) + f"Turn {turn}."))).pod == pod


async def test_a_prompt_does_not_follow_its_beginning_to_a_loaded_pod(session: aiohttp.ClientSession) -> None:
    with Lab(pods=3, workers=2) as lab:
        first = await send(session, lab.envoy_url, chat(lab.model, story("x")))
        await idle(lab)
        bodies = [chat(lab.model, story("x") + f"{n}", stream=True, max_tokens=300) for n in range(90)]
        answers = await asyncio.gather(*(send(session, lab.envoy_url, body) for body in bodies))
        assert all(answer.ok for answer in answers)
        pods = Counter(answer.pod for answer in answers)
        assert len(pods) > 1
        assert pods[first.pod] < 80


async def test_a_pod_that_restarts_is_believed_to_hold_nothing(session: aiohttp.ClientSession) -> None:
    with Lab(pods=3, workers=2, process_per_pod=True, settings={"explain": True}) as lab:
        body = chat(lab.model, story("x"))
        first = await send(session, lab.envoy_url, body)
        number = lab.addresses.index(first.pod)
        before = await explained(session, lab, body)
        assert before[f"pod-{number}"] > 1500
        await asyncio.to_thread(lab.restart_pod, number)
        async with asyncio.timeout(20):
            while any((await explained(session, lab, body)).values()):
                await asyncio.sleep(0.1)
        await idle(lab)
        again = await send(session, lab.envoy_url, body)
        assert again.ok
        assert (await explained(session, lab, body))[f"pod-{lab.addresses.index(again.pod)}"] > 1500
