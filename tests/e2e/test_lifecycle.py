"""The whole life of a request through a real Envoy, set up as AIBrix sets it up and as we do.

`aibrix` is AIBrix's processing mode (SEND, BUFFERED, SEND, STREAMED) without mode overrides, `aibrix-overrides` the
same where they are allowed, `stream` and `access-log` what `pointsman envoy` writes.
"""

import asyncio
import gzip
import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import openai
import pytest
import yaml
from scripted_pod import EVENTS, FLAT_ERROR, ScriptedPod
from yarl import URL

import bench.lab
from bench.figures.accounting import as_aibrix
from bench.lab import Lab, free_ports, get
from workers.envoy import bootstrap

pytestmark = pytest.mark.envoy

MODES = ("aibrix", "aibrix-overrides", "stream", "access-log")
SEEING_BODIES = ("aibrix", "aibrix-overrides", "stream")
USERS = {
    "users": [
        *({"name": f"ann-{each}", "rpm": 1000, "tpm": 30} for each in ("json", "sse", "large", "errors")),
        {"name": "ann-leaves", "rpm": 1000, "tpm": 10_000_000},
        {"name": "bob", "rpm": 2, "tpm": 0},
    ]
}


class Ground:
    """A lab with a scripted pod."""

    def __init__(self, lab: Lab, pod: ScriptedPod, mode: str) -> None:
        self.lab = lab
        self.pod = pod
        self.mode = mode

    async def ask(
        self, script: str = "json", path: str = "/v1/chat/completions", *, stream: bool = False, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request."""
        options = {"include_usage": True} if stream else None
        body = {"model": self.lab.model, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        sent = {**headers, "x-script": script, "content-type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=20)
        async with (
            aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session,
            session.post(
                self.lab.envoy_url + path, data=json.dumps({**body, "stream_options": options}), headers=sent
            ) as answer,
        ):
            found = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, found, await answer.read()

    def in_flight(self) -> int:
        return sum(pod["own"]["requests"] for pod in self.lab.believed_pods())

    def metrics(self) -> str:
        return get(self.lab.config.admin, "/metrics")[1].decode()


@pytest.fixture(scope="module", params=MODES)
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    mode: str = request.param
    users = tmp_path_factory.mktemp("users") / "users.yaml"
    users.write_text(yaml.safe_dump(USERS))
    patch = pytest.MonkeyPatch()
    accounting = mode
    if mode.startswith("aibrix"):
        accounting = "stream"
        overrides = mode == "aibrix-overrides"
        patch.setattr(bench.lab, "bootstrap", lambda config: as_aibrix(bootstrap(config), overrides=overrides))
    settings = {"limits": {"users_file": str(users)}, "explain": True}
    with ScriptedPod(free_ports(1)[0]) as pod, Lab(pods=0, workers=2, accounting=accounting, settings=settings) as lab:
        patch.undo()
        lab.write_endpoints([pod.address])
        lab.until(lambda: [p["health"] for p in lab.believed_pods()] == ["ready"], "the scripted pod")
        yield Ground(lab, pod, mode)


async def released(ground: Ground) -> None:
    await asyncio.to_thread(ground.lab.until, lambda: ground.in_flight() == 0, "the charges to be released")


async def test_a_reply_comes_with_what_was_chosen(ground: Ground) -> None:
    status, headers, body = await ground.ask()
    assert status == 200
    assert json.loads(body)["usage"]["total_tokens"] == 12
    assert headers["target-pod-ip"] == ground.pod.address
    assert headers["routing-strategy"] == ground.lab.config.strategy
    assert len(headers["request-id"]) == 36
    assert ground.pod.seen[-1]["x-request-id"] == headers["request-id"]
    assert ground.pod.seen[-1]["routing-strategy"] == ground.lab.config.strategy
    assert json.loads(ground.pod.seen[-1]["body"])["model"] == ground.lab.model
    for absent in ("x-session-id", "x-aibrix-config-profile", "x-pointsman-decision"):
        assert absent not in headers
    await released(ground)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stream_comes_whole(ground: Ground, stream: bool) -> None:
    status, _, body = await ground.ask("sse", stream=stream)
    assert (status, body) == (200, EVENTS)
    await released(ground)


async def test_a_large_reply_comes_whole(ground: Ground) -> None:
    for headers in ({}, {"user": "ann-large"}):
        status, _, body = await ground.ask("large", **headers)
        assert (status, len(json.loads(body)["data"])) == (200, 3000)
    await released(ground)


@pytest.mark.parametrize(
    ("script", "status", "message", "kind"),
    [
        ("error400", 400, "no such thing", "BadRequestError"),
        ("error500", 500, "CUDA out of memory", "X"),
        ("error401", 401, "the engine's own key", None),
        ("error429", 429, "no such thing", "BadRequestError"),
        ("pieces400", 400, "no such thing", "BadRequestError"),
        ("pieces503", 503, "the engine is full, come back later", "overloaded_error"),
        ("empty500", 500, "Internal server error", "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_pod_come_whole_and_in_one_shape(
    ground: Ground, script: str, status: int, message: str, kind: str | None, stream: bool
) -> None:
    found, headers, body = await ground.ask(script, stream=stream)
    assert found == status
    if ground.mode in SEEING_BODIES:
        error = json.loads(body)["error"]
        assert (error["message"], error["type"]) == (message, kind)
        assert headers["content-type"].startswith("application/json")
    elif script == "error400":
        assert json.loads(body) == FLAT_ERROR  # the router sees no responses here
    assert headers["target-pod-ip"] == ground.pod.address
    if script == "error429":
        assert headers["retry-after"] == "7"
    await released(ground)


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        ("error400", 400, "no such thing"),
        ("error500", 500, "CUDA out of memory"),
        ("pieces503", 503, "the engine is full, come back later"),
        ("vanish", 503, "disconnect/reset before headers"),
    ],
)
async def test_errors_of_limited_users_come_whole_in_every_mode(
    ground: Ground, script: str, status: int, message: str
) -> None:
    found, headers, body = await ground.ask(script, user="ann-errors")
    assert (found, headers["content-type"]) == (status, "application/json")
    assert message in json.loads(body)["error"]["message"]
    await released(ground)


async def test_a_compressed_error_is_left_alone(ground: Ground) -> None:
    status, headers, body = await ground.ask("gzip502")
    assert status == 502
    assert headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(body)) == FLAT_ERROR
    await released(ground)


async def test_a_201_is_no_error(ground: Ground) -> None:
    status, _, body = await ground.ask("created")
    assert (status, json.loads(body)) == (201, {"made": True})


async def test_an_error_of_envoys_own_has_the_shape_of_all_others(ground: Ground) -> None:
    status, _, body = await ground.ask("vanish")
    assert status == 503
    error = json.loads(body)["error"]
    assert "disconnect/reset before headers" in error.pop("message")
    assert error == {"type": "overloaded_error", "code": "service_unavailable", "param": None}
    refused, _, body = await ground.ask(**{"routing-strategy": "nonsense"})
    assert (refused, json.loads(body)["error"]["message"]) == (400, "incorrect routing strategy nonsense")
    await released(ground)


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
async def test_what_should_have_a_body_and_has_none_is_refused(ground: Ground, method: str) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, ground.lab.envoy_url + "/v1/chat/completions?x=1") as answer,
    ):
        assert answer.status == 400
        assert "takes a POST request with a body" in (await answer.json())["error"]["message"]


async def test_a_browser_that_asks_whether_it_may_ask_is_let_through(ground: Ground) -> None:
    headers = {"access-control-request-method": "POST", "origin": "http://chat.example"}
    async with (
        aiohttp.ClientSession() as session,
        session.options(ground.lab.envoy_url + "/v1/chat/completions", headers=headers) as answer,
    ):
        assert answer.status == 503  # no pod was chosen; another Envoy may have a filter that answers
        assert "x-pod" not in answer.headers


@pytest.mark.parametrize("path", ["/v1/files", "/v1/chat/completions", "/v1/../reset_prefix_cache"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_what_pods_are_not_asked_with_reaches_none(ground: Ground, method: str, path: str) -> None:
    url = URL(ground.lab.envoy_url + path, encoded=True)
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, headers={"target-pod": ground.pod.address}) as answer,
    ):
        assert answer.status == 404
        assert (await answer.json())["error"]["message"] == "unknown request path"
        assert "x-pod" not in answer.headers


async def test_clients_that_leave_before_the_decision_is_taken_leave_no_charge(ground: Ground) -> None:
    """Also where the response would have been watched, so that the stream stays open."""
    host, _, port = ground.lab.config.envoy.listen.rpartition(":")
    body = json.dumps({"model": ground.lab.model, "messages": [{"role": "user", "content": "hi " * 2000}]})
    request = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nuser: ann-leaves\r\nx-script: slow\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    )

    def leave() -> None:
        for number in range(60):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(request.encode())
                time.sleep(number * 5e-5)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    for _ in range(6):  # each worker sees once that this Envoy shows the responses that it is asked to show
        assert (await ground.ask(user="ann-leaves"))[0] == 200
    await asyncio.to_thread(leave)
    until = time.monotonic() + 12  # sooner than a charge is taken for lost
    while ground.in_flight() and time.monotonic() < until:
        await asyncio.sleep(0.1)
    assert ground.in_flight() == 0


async def test_a_request_counts_as_load_until_its_answer_ends(ground: Ground) -> None:
    body = {"model": ground.lab.model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(ground.lab.envoy_url + "/v1/chat/completions", json=body, headers={"x-script": "slow"}) as answer,
    ):
        await answer.content.readany()
        await asyncio.sleep(0.3)
        assert ground.in_flight() == 1
        assert (await answer.read()).endswith(b"[DONE]\n\n")
    await released(ground)


@pytest.mark.parametrize("script", ["json", "sse"])
async def test_tokens_of_limited_users_are_counted_in_every_mode(ground: Ground, script: str) -> None:
    """Ann may use 30 tokens a minute, and each request uses 12: after three of them she has to wait."""
    name = f"ann-{script}"
    answers = []
    while not answers or (answers[-1][0] == 200 and len(answers) < 7):
        answers.append(await ground.ask(script, stream=script == "sse", user=name))
    assert answers[-1][0] == 429
    assert 4 <= len(answers) <= 6, "more than 4 if a minute has begun meanwhile"
    if script == "json" and ground.mode != "aibrix":  # there headers have left when the body comes
        assert (answers[0][1]["x-update-rpm"], answers[0][1]["x-update-tpm"]) == ("1", "12")
    status, headers, body = await ground.ask(script, stream=script == "sse", user=name)
    assert status == 429
    assert headers["x-error-tpm-exceeded"] == "true"
    assert 1 <= int(headers["retry-after"]) <= 60
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    await released(ground)


async def test_requests_a_minute_are_one_count_for_all_workers(ground: Ground) -> None:
    statuses = [(await ground.ask(user="bob"))[0] for _ in range(5)]
    # A minute may begin in between; then it is two more.
    assert statuses.count(200) in (2, 3, 4)
    assert 429 in statuses


async def test_an_unknown_user_is_refused(ground: Ground) -> None:
    status, headers, _ = await ground.ask(user="mallory")
    assert (status, headers["x-error-user"]) == (401, "true")


async def test_a_session_and_a_receipt_are_told_in_every_mode(ground: Ground) -> None:
    status, headers, _ = await ground.ask(**{"routing-strategy": "session-affinity", "x-pointsman-explain": "1"})
    assert status == 200
    assert len(headers["x-session-id"]) == 22
    receipt = json.loads(headers["x-pointsman-decision"])
    assert receipt["strategy"] == "session-affinity"
    assert [row["pod"] for row in receipt["candidates"]] == [receipt["pod"]]


async def test_a_receipt_alone_charges_nobody(ground: Ground) -> None:
    status, _, body = await ground.ask(**{"x-pointsman-explain": "only", "x-mark": "of-the-receipt"})
    assert (status, json.loads(body)["of"]) == (200, 1)
    assert not any("x-mark" in seen for seen in ground.pod.seen)  # what others have left may still come


async def test_a_client_that_leaves_is_counted_as_499(ground: Ground) -> None:
    before = ground.metrics().count('status="499"')
    body = {"model": ground.lab.model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with aiohttp.ClientSession() as session:
        answer = await session.post(
            ground.lab.envoy_url + "/v1/chat/completions", json=body, headers={"x-script": "sse"}
        )
        await answer.content.readany()
        answer.close()
    await released(ground)
    if ground.mode in ("aibrix", "access-log"):  # in the others nothing tells an end from another
        await asyncio.to_thread(ground.lab.until, lambda: 'status="499"' in ground.metrics() or before > 0, "the 499")


def test_the_openai_client(ground: Ground) -> None:
    def client(script: str) -> openai.OpenAI:
        headers = {"x-script": script}
        return openai.OpenAI(base_url=ground.lab.envoy_url + "/v1", api_key="x", max_retries=0, default_headers=headers)

    messages: Any = [{"role": "user", "content": "hi"}]
    with client("sse") as one:
        chunks = list(one.chat.completions.create(model=ground.lab.model, messages=messages, stream=True))
        assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 12
    with client("error400") as one, pytest.raises(openai.BadRequestError, match="no such thing"):
        one.chat.completions.create(model=ground.lab.model, messages=messages)
    with client("error429") as one, pytest.raises(openai.RateLimitError):
        one.chat.completions.create(model=ground.lab.model, messages=messages, stream=True)
    with client("json") as one:
        assert one.embeddings.with_raw_response.create(model=ground.lab.model, input=["a", "b"]).status_code == 200
        with pytest.raises(openai.BadRequestError) as refused:
            one.chat.completions.create(model="unheard-of", messages=messages)
        assert refused.value.code == "model_not_found"
