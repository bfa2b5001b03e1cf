"""Requests through a real Envoy to simulated pods, on the configuration that `pointsman envoy` writes."""

import asyncio
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from client import chat, in_flight, send

from bench.lab import Lab, get

pytestmark = pytest.mark.envoy


@pytest.fixture
async def session() -> Iterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as opened:
        yield opened


async def test_a_json_answer_comes_back_with_what_the_router_chose(lab: Lab, session: aiohttp.ClientSession) -> None:
    async with session.post(lab.envoy_url + "/v1/chat/completions", json=chat(lab.model)) as answer:
        assert answer.status == 200
        document = await answer.json()
        headers = answer.headers
    assert document["choices"][0]["message"]["content"]
    assert headers["target-pod-ip"] == headers["x-pod"]
    assert headers["target-pod"] == f"pod-{lab.addresses.index(headers['x-pod'])}"
    assert headers["routing-strategy"] == "least-request"
    assert len(headers["request-id"]) == 36


async def test_an_sse_answer_comes_whole_and_in_pieces(lab: Lab, session: aiohttp.ClientSession) -> None:
    pieces = []
    body = chat(lab.model, stream=True, max_tokens=30)
    async with session.post(lab.envoy_url + "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = [piece async for piece in answer.content.iter_any()]
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
    assert len(pieces) > 5


def test_the_openai_client_works(lab: Lab) -> None:
    with openai.OpenAI(base_url=lab.envoy_url + "/v1", api_key="x", max_retries=0) as client:
        completion = client.completions.create(model=lab.model, prompt="once", max_tokens=4)
        assert completion.usage is not None and completion.usage.completion_tokens <= 4
        stream = client.chat.completions.create(
            model=lab.model, messages=[{"role": "user", "content": "hi"}], max_tokens=5, stream=True
        )
        assert len(list(stream)) >= 2
        assert [model.id for model in client.models.list()] == [lab.model]
        assert client.models.retrieve(lab.model).id == lab.model
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="unheard-of", messages=[{"role": "user", "content": "hi"}])
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("header", ["target-pod", "x-gateway-destination-endpoint", "model"])
async def test_a_client_cannot_choose_its_pod(lab: Lab, session: aiohttp.ClientSession, header: str) -> None:
    forged = {header: "127.0.0.1:1"}
    async with session.post(lab.envoy_url + "/v1/chat/completions", json=chat(lab.model), headers=forged) as answer:
        assert answer.status == 200
        assert answer.headers["x-pod"] in lab.addresses
    preflight = {header: lab.addresses[0], "access-control-request-method": "POST"}
    async with session.options(lab.envoy_url + "/v1/files", headers=preflight) as answer:
        assert answer.status == 503
        assert "x-pod" not in answer.headers


async def test_unknown_paths_models_and_bodies_are_answered_in_openais_shape(
    lab: Lab, session: aiohttp.ClientSession
) -> None:
    async def refused(path: str, data: bytes) -> tuple[int, dict[str, object]]:
        async with session.post(lab.envoy_url + path, data=data) as answer:
            assert answer.headers["content-type"] == "application/json"
            return answer.status, json.loads(await answer.read())["error"]

    status, error = await refused("/v1/unheard-of", b"{}")
    assert (status, error["type"]) == (501, "api_error")
    status, error = await refused("/v1/chat/completions", b'{"model": "m", ')
    assert (status, error["type"]) == (400, "invalid_request_error")
    status, error = await refused("/v1/chat/completions", json.dumps(chat("unheard-of")).encode())
    assert (status, error["code"]) == (400, "model_not_found")
    status, error = await refused("/elsewhere", b"{}")
    assert status == 404


async def test_a_body_beyond_the_limit_is_refused_and_one_of_5_mb_passes(
    lab: Lab, session: aiohttp.ClientSession
) -> None:
    async def padded(size: int) -> tuple[int, dict[str, Any]]:
        body = io.BytesIO(json.dumps(chat(lab.model, padding="x" * size)).encode())
        async with session.post(lab.envoy_url + "/v1/chat/completions", data=body) as answer:
            return answer.status, await answer.json()

    assert (await padded(5_000_000))[0] == 200
    status, answer = await padded(lab.config.envoy.body_limit_bytes + 1)
    assert status == 413
    assert answer["error"] == {
        "message": "request body is too large", "type": "api_error", "code": None, "param": None,
    }  # fmt: skip


async def test_in_flight_counts_follow_the_requests(lab: Lab, session: aiohttp.ClientSession) -> None:
    body = chat(lab.model, stream=True, max_tokens=60)
    async with session.post(lab.envoy_url + "/v1/chat/completions", json=body) as answer:
        await answer.content.readany()
        assert sum(in_flight(lab)) == 1
        await answer.read()
    lab.until(lambda: sum(in_flight(lab)) == 0, "the charge to be released")


async def test_a_client_that_leaves_releases_its_charge(lab: Lab, session: aiohttp.ClientSession) -> None:
    body = chat(lab.model, stream=True, max_tokens=2_000)
    async with session.post(lab.envoy_url + "/v1/chat/completions", json=body) as answer:
        await answer.content.readany()
        assert sum(in_flight(lab)) == 1
        answer.close()
        await asyncio.to_thread(lab.until, lambda: sum(in_flight(lab)) == 0, "the charge to be released")
    assert b'status="499"' in get(lab.config.admin, "/metrics")[1]


@pytest.mark.parametrize("destination", ["metadata", "override-host"])
async def test_the_other_ways_to_name_the_pod(destination: str, session: aiohttp.ClientSession) -> None:
    with Lab(pods=2, workers=1, destination=destination, strategy="round-robin") as lab:
        forged = {"target-pod": "127.0.0.1:1", "x-gateway-destination-endpoint": "127.0.0.1:1"}
        seen = set()
        for _ in range(4):
            async with session.post(
                lab.envoy_url + "/v1/chat/completions", json=chat(lab.model), headers=forged
            ) as answer:
                assert answer.status == 200
                assert answer.headers["target-pod-ip"] == answer.headers["x-pod"]
                seen.add(answer.headers["x-pod"])
        assert seen == set(lab.addresses)
        if destination == "override-host":
            lab.stop_process(lab.router)
            started = time.monotonic()
            answered = [await send(session, lab.envoy_url, chat(lab.model)) for _ in range(4)]
            assert all(outcome.ok for outcome in answered), answered
            assert time.monotonic() - started < 10


@pytest.mark.parametrize("transport", ["h2", "grpcio"])
async def test_accounting_by_stream(transport: str, session: aiohttp.ClientSession) -> None:
    with Lab(pods=2, workers=1, accounting="stream", transport=transport) as lab:
        async with session.post(lab.envoy_url + "/v1/chat/completions", json=chat(lab.model)) as answer:
            assert answer.status == 200
            assert answer.headers["target-pod-ip"] == answer.headers["x-pod"]
            assert answer.headers["target-pod"].startswith("pod-")
        body = chat(lab.model, stream=True, max_tokens=60)
        async with session.post(lab.envoy_url + "/v1/chat/completions", json=body) as answer:
            await answer.content.readany()
            assert sum(in_flight(lab)) == 1
            await answer.read()
        lab.until(lambda: sum(in_flight(lab)) == 0, "the charge to be released")


@pytest.mark.parametrize(("name", "status"), [(None, 200), ("localhost", 200), ("other.example", 503)])
async def test_tls_with_client_certificates_between_envoy_and_the_workers(
    session: aiohttp.ClientSession, name: str | None, status: int
) -> None:
    pem = Path(__file__).parent.parent / "fixtures" / "tls"
    settings = {
        "tls": {
            "certificate": str(pem / "server.pem"),
            "key": str(pem / "server.key"),
            "client_ca": str(pem / "ca.pem"),
        },
        "envoy": {
            "router_ca": str(pem / "ca.pem"),
            "router_name": name,
            "client_certificate": str(pem / "client.pem"),
            "client_key": str(pem / "client.key"),
        },
    }
    with Lab(pods=1, workers=1, settings=settings) as lab:
        outcome = await send(session, lab.envoy_url, chat(lab.model, stream=True))
        assert outcome.status == status, outcome


async def test_the_router_tells_of_its_transport_and_its_strategy(lab: Lab, session: aiohttp.ClientSession) -> None:
    headers = {"routing-strategy": "marginal-delay"}
    async with session.post(lab.envoy_url + "/v1/chat/completions", json=chat(lab.model), headers=headers) as answer:
        assert answer.status == 200

    def told() -> bool:
        page = get(lab.config.admin, "/metrics")[1].decode()
        return all(
            f"\n{series}" in page
            for series in (
                'pointsman_transport_level{what="streams_open"} ',
                'pointsman_transport_events_total{event="streams_opened"} ',
                'pointsman_strategy_mode{mode="full",',
                "pointsman_prefix_forgotten_ratio 0.0",
            )
        )

    await asyncio.to_thread(lab.until, told, "the metrics of the transport and the strategy")


async def test_the_token_opens_and_nothing_else_does(session: aiohttp.ClientSession) -> None:
    with Lab(pods=1, workers=1, settings={"limits": {"bearer_token": "s3cret"}}) as lab:
        answers = []
        for given in ("Bearer s3cret", "Bearer other", ""):
            headers = {"authorization": given} if given else {}
            url = lab.envoy_url + "/v1/chat/completions"
            async with session.post(url, json=chat(lab.model), headers=headers) as answer:
                answers.append(answer.status)
    assert answers == [200, 401, 401]
