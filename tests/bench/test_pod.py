"""Simulated pods as real processes, driven as clients drive vLLM."""

import asyncio
import gzip
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from bench.engine import Engine, EngineRequest
from bench.engine_presets import PRESETS
from bench.pod import simulate_pod

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
SPEED = 20
NESTED = json.loads("[" * 300 + "]" * 300)


@contextmanager
def pods(*options: str) -> Iterator[list[str]]:
    """Addresses of pods in one process, which is gone afterwards and has not complained."""
    command = [sys.executable, "-m", "bench.pod", "--port", "0", *options]
    count = int(options[options.index("--count") + 1]) if "--count" in options else 1
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield [process.stdout.readline().split()[1] for _ in range(count)]
        finally:
            process.terminate()
            complaints = process.stderr.read()
        assert process.wait(10) == 0
        assert complaints == ""


@pytest.fixture(scope="module")
def fleet() -> Iterator[list[str]]:
    with pods("--count", "2", "--model", "llama", "--model", "adapter", "--speed", str(SPEED)) as addresses:
        yield addresses


@pytest.fixture
def pod(fleet: list[str]) -> str:
    return fleet[0]


def chat(content: str, **options: Any) -> dict[str, Any]:
    return {"model": "llama", "messages": [{"role": "user", "content": content}], "max_tokens": 8} | options


async def post(address: str, path: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as session, session.post(f"http://{address}{path}", data=data) as response:
        assert response.headers["x-pod"] == address
        return response.status, await response.json()


async def events(address: str, path: str, body: Any) -> list[Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{address}{path}", json=body | {"stream": True}) as response,
    ):
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        text = (await response.read()).decode()
    assert text.endswith("data: [DONE]\n\n")
    lines = text.split("\n\n")[:-2]
    assert all(line.startswith("data: {") for line in lines)
    return [json.loads(line[6:]) for line in lines]


async def metrics(address: str) -> dict[str, float]:
    """Every sample of the page: "name" or "name label value ..." without the labels all of them have."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as response:
        assert response.content_type == "text/plain"
        page = await response.text()
    samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = [f"{k}={v}" for k, v in sample.labels.items() if k not in ("engine", "model_name")]
            samples[" ".join([sample.name, *sorted(labels)])] = sample.value
    return samples


# Answers


async def test_chat(pod: str) -> None:
    status, answer = await post(pod, CHAT, chat("What is a pointsman?"))
    assert status == 200
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "llama"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and len(choice["message"]["content"]) == 8 * 4
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


async def test_streamed_chat(pod: str) -> None:
    whole = (await post(pod, CHAT, chat("Tell me.")))[1]
    chunks = await events(pod, CHAT, chat("Tell me."))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    first, *texts = [c["choices"][0] for c in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert "".join(t["delta"]["content"] for t in texts) == whole["choices"][0]["message"]["content"]
    assert [t["finish_reason"] for t in texts[:-1]] == [None] * (len(texts) - 1)
    assert texts[-1]["finish_reason"] == "length"
    assert not any("usage" in c for c in chunks)


async def test_streamed_usage(pod: str) -> None:
    body = chat("Usage, please.", stream_options={"include_usage": True})
    *chunks, last = await events(pod, CHAT, body)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert not any("usage" in c for c in chunks)
    body["stream_options"]["continuous_usage_stats"] = True
    *chunks, last = await events(pod, CHAT, body)
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts[0] == 0 and counts[-1] == 8 and counts == sorted(counts)
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 8


async def test_completion_of_several_prompts(pod: str) -> None:
    body = {"model": "llama", "prompt": ["one", [1, 2, 3]], "n": 2, "max_tokens": 4}
    status, answer = await post(pod, "/v1/completions", body)
    assert status == 200
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert len({c["text"] for c in answer["choices"]}) == 4
    assert answer["usage"] == {
        "prompt_tokens": 1 + 3,
        "completion_tokens": 16,
        "total_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    chunks = await events(pod, "/v1/completions", body)
    texts = ["".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(4)]
    assert texts == [c["text"] for c in answer["choices"]]


async def test_limit_of_a_completion_is_16_unless_told(pod: str) -> None:
    _, answer = await post(pod, "/v1/completions", {"prompt": "Hi", "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 16


async def test_every_pod_gives_the_same_answer(fleet: list[str]) -> None:
    answers = [(await post(address, CHAT, chat("Same?", max_tokens=None)))[1] for address in fleet]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["choices"][0]["finish_reason"] == "stop"
    assert answers[0]["usage"]["completion_tokens"] > 8


async def test_request_id_is_kept(pod: str) -> None:
    async with aiohttp.ClientSession() as session:
        headers = {"x-request-id": "abc"}
        async with session.post(f"http://{pod}{CHAT}", json=chat("Id?"), headers=headers) as response:
            assert (await response.json())["id"] == "chatcmpl-abc"


async def test_prefix_of_an_earlier_turn_is_cached(pod: str) -> None:
    body = chat("turn one, " + "x" * 4000, max_tokens=64, ignore_eos=True)
    _, first = await post(pod, CHAT, body)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    said = first["choices"][0]["message"]["content"]
    body["messages"] += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    _, second = await post(pod, CHAT, body)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    # The first turn's prompt and all of its answer but the last token, in whole blocks of 16.
    assert cached == (first["usage"]["total_tokens"] - 1) // 16 * 16
    body["model"] = "adapter"
    _, other = await post(pod, CHAT, body)
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_tokenize_agrees_with_usage(pod: str) -> None:
    body = chat("How many tokens?")
    _, tokens = await post(pod, "/tokenize", body)
    _, answer = await post(pod, CHAT, body)
    assert tokens["count"] == len(tokens["tokens"]) == answer["usage"]["prompt_tokens"]
    assert tokens["max_model_len"] == 131072
    assert (await post(pod, "/tokenize", {"model": "llama", "prompt": "12345678"}))[1]["count"] == 2


async def test_health_and_version(pod: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{pod}/health") as response:
            assert (response.status, await response.read()) == (200, b"")
        async with session.get(f"http://{pod}/version") as response:
            assert await response.json() == {"version": "0.32.0"}


# Errors


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "said"),
    [
        (CHAT, b'{"model": "llama", ', 400, "Bad Request", "not JSON"),
        (CHAT, b"[1]", 400, "Bad Request", "not a JSON object"),
        (CHAT, chat("x", model="other"), 404, "NotFoundError", "The model `other` does not exist."),
        (CHAT, chat("x", messages=[]), 400, "BadRequestError", "messages"),
        (CHAT, chat("x", messages=["x"]), 400, "BadRequestError", "role"),
        (CHAT, chat("x", max_tokens=0), 400, "BadRequestError", "max_tokens must be at least 1, got 0."),
        (CHAT, chat("x", max_tokens="8"), 400, "BadRequestError", "max_tokens"),
        (CHAT, chat("x", n=0), 400, "BadRequestError", "n must be between"),
        (CHAT, chat("x" * 4, max_tokens=131072), 400, "BadRequestError", "maximum context length is 131072"),
        (CHAT, chat("x" * 530_000), 400, "BadRequestError", "maximum context length is 131072"),
        ("/v1/completions", {"model": "llama"}, 400, "BadRequestError", "prompt"),
        ("/v1/completions", {"model": "llama", "prompt": ""}, 400, "BadRequestError", "empty"),
        ("/v1/completions", {"model": "llama", "prompt": ["x", 5]}, 400, "BadRequestError", "prompt"),
        ("/v1/embeddings", {"model": "llama", "input": "x", "dimensions": 0}, 400, "BadRequestError", "dimensions"),
        ("/tokenize", {"model": "other", "prompt": "x"}, 404, "NotFoundError", "`other`"),
        ("/tokenize", {"model": "llama"}, 400, "BadRequestError", "prompt"),
        (CHAT, chat("x", messages=[{"role": "user", "content": NESTED}]), 400, "BadRequestError", "Recursion limit"),
        (CHAT, chat("x", messages=[{"role": "user", "tool_calls": NESTED}]), 400, "BadRequestError", "Recursion limit"),
        (CHAT, chat("x", tools=NESTED), 400, "BadRequestError", "Recursion limit"),
        ("/tokenize", chat("x", tools=NESTED), 400, "BadRequestError", "Recursion limit"),
        (CHAT, chat("x", stream=True, stream_options="all"), 400, "BadRequestError", "stream_options: an object"),
    ],
)
async def test_errors_have_vllms_shape(pod: str, path: str, body: Any, status: int, kind: str, said: str) -> None:
    got, answer = await post(pod, path, body)
    error = answer["error"]
    assert (got, error["code"], error["type"]) == (status, status, kind)
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


async def test_headers_that_a_vllm_takes_no_notice_of(pod: str) -> None:
    """None of them is a reason for a 500, of which three in a row have a pod left out."""
    plain = json.dumps(chat("Hi")).encode()
    packed = gzip.compress(plain)
    async with aiohttp.ClientSession() as session:
        for encoding in ("gzip", "deflate", "br", "zstd", "nonsense"):
            for body, status in ((plain, 200), (packed, 400)):
                headers = {"content-encoding": encoding}
                async with session.post(f"http://{pod}{CHAT}", data=body, headers=headers) as response:
                    answer = await response.json()
                    assert response.status == status
                    assert status == 200 or "not JSON" in answer["error"]["message"]
    host, port = pod.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = b"POST %b HTTP/1.1\r\nhost: pod\r\nconnection: close\r\nx-request-id: \xff\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % (CHAT.encode(), len(plain)) + plain)
    answer_text = (await reader.read()).decode()
    writer.close()
    assert "200 OK" in answer_text and '"id":"chatcmpl-ÿ"' in answer_text


async def test_unknown_paths_and_methods(pod: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{pod}/v2/chat") as response:
            assert (response.status, await response.json()) == (404, {"detail": "Not Found"})
        async with session.get(f"http://{pod}{CHAT}") as response:
            assert response.status == 405


async def test_streaming_needs_chunks(pod: str) -> None:
    host, port = pod.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(chat("Hi", stream=True)).encode()
    writer.write(b"POST %b HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
    answer = await reader.read()
    writer.close()
    assert b"400 Bad Request" in answer and b"Streaming needs HTTP/1.1." in answer


# The OpenAI client


@pytest.fixture
def client(pod: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{pod}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    whole = client.chat.completions.create(model="llama", messages=messages, max_completion_tokens=5)
    assert whole.usage is not None and whole.usage.completion_tokens == 5
    stream = client.chat.completions.create(
        model="llama", messages=messages, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert last.usage is not None and last.usage.completion_tokens == 5


def test_openai_completion_models_and_errors(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="adapter", prompt="Once", max_tokens=3)
    assert len(answer.choices[0].text) == 12
    assert [m.id for m in client.models.list()] == ["llama", "adapter"]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="Once")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="llama", prompt="Once", max_tokens=0)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_embeddings(client: openai.OpenAI, encoding: Any) -> None:
    answer = client.embeddings.create(
        model="llama", input=["one", "two", "one"], dimensions=8, encoding_format=encoding
    )
    one, two, again = [item.embedding for item in answer.data]
    if encoding == "float":
        assert len(one) == 8 and sum(x * x for x in one) == pytest.approx(1)
    assert one == again != two
    assert answer.usage.prompt_tokens == 3


# Metrics


async def test_page_counts_what_clients_got(fleet: list[str]) -> None:
    pod = fleet[1]
    before = await metrics(pod)
    bodies = [chat(f"Number {i}. " + "y" * 200 * i, max_tokens=5 + i) for i in range(6)]
    answers = await asyncio.gather(*(post(pod, CHAT, body) for body in bodies))
    await events(pod, CHAT, bodies[0])
    after = await metrics(pod)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    usages = [answer["usage"] for _, answer in answers] + [answers[0][1]["usage"]]
    prompts = sum(u["prompt_tokens"] for u in usages)
    generated = sum(u["completion_tokens"] for u in usages)
    assert grown("vllm:prompt_tokens_total") == grown("vllm:prefix_cache_queries_total") == prompts
    assert grown("vllm:generation_tokens_total") == generated
    assert grown("vllm:request_success_total finished_reason=length") == 7
    assert grown("vllm:e2e_request_latency_seconds_count") == 7
    assert grown("vllm:inter_token_latency_seconds_count") == generated - 7
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert grown(f"http_requests_total handler={CHAT} method=POST status=2xx") == 7
    assert "http_requests_total handler=/metrics method=GET status=2xx" not in after


async def test_a_lone_request_takes_what_the_model_says() -> None:
    """Speed and preset reach the engine, and the page tells the same times as the model."""
    with pods("--model", "m", "--preset", "a100-qwen-2.5-14b", "--speed", "50") as [pod]:
        _, answer = await post(pod, "/v1/completions", {"prompt": "z" * 8000, "max_tokens": 9, "ignore_eos": True})
        page = await metrics(pod)
    engine = Engine(PRESETS["a100-qwen-2.5-14b"].faster(50))
    request = EngineRequest(answer["usage"]["prompt_tokens"], 9)
    engine.submit(request, 0.0)
    engine.advance(100.0)
    assert request.prompt_tokens == 2000
    assert page["vllm:time_to_first_token_seconds_sum"] == pytest.approx(request.ttft_seconds)
    assert page["vllm:request_decode_time_seconds_sum"] == pytest.approx(request.decode_seconds)
    assert page["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(request.e2e_seconds)


async def test_a_client_that_leaves_ends_its_request() -> None:
    with pods("--model", "m", "--speed", "1") as [pod]:
        async with aiohttp.ClientSession() as session:
            for stream in (True, False):
                body = {"prompt": "Go on", "max_tokens": 100_000, "ignore_eos": True, "stream": stream}
                request = asyncio.ensure_future(session.post(f"http://{pod}/v1/completions", json=body))
                if stream:
                    await (await request).content.readuntil(b"\n\n")
                while (await metrics(pod))["vllm:num_requests_running"] != 1:
                    await asyncio.sleep(0.01)
                if stream:
                    request.result().close()
                else:
                    request.cancel()
                while (await metrics(pod))["vllm:num_requests_running"] != 0:
                    await asyncio.sleep(0.01)
        page = await metrics(pod)
    assert page["vllm:request_success_total finished_reason=abort"] == 2
    assert page["vllm:kv_cache_usage_perc"] == 0


async def test_adapters_in_use_are_told() -> None:
    with pods("--model", "base", "--model", "french") as [pod]:
        async with aiohttp.ClientSession() as session:
            body = {"model": "french", "prompt": "Go on", "max_tokens": 1000, "ignore_eos": True, "stream": True}
            async with session.post(f"http://{pod}/v1/completions", json=body) as response:
                await response.content.readuntil(b"\n\n")
                [during] = [key for key in await metrics(pod) if key.startswith("vllm:lora_requests_info")]
        assert "max_lora=1" in during and "running_lora_adapters=french" in during


# Options


async def test_failures_on_purpose() -> None:
    with pods("--model", "m", "--fail-rate", "0.5", "--seed", "1", "--speed", "1000") as [pod]:
        answers = [await post(pod, "/v1/completions", {"prompt": "x", "max_tokens": 1}) for _ in range(40)]
        async with aiohttp.ClientSession() as session, session.get(f"http://{pod}/health") as response:
            assert response.status == 200
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 500, 503}
    assert 10 <= statuses.count(200) <= 30
    assert all(answer["error"]["code"] == status for status, answer in answers if status != 200)


async def test_small_pod_queues_and_preempts() -> None:
    options = ["--num-gpu-blocks", "20", "--block-size", "8", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
    with pods("--model", "m", "--speed", "50", *options) as [pod]:
        bodies = [{"prompt": f"{i}" * 120, "max_tokens": 60, "ignore_eos": True} for i in range(8)]
        answers = await asyncio.gather(*(post(pod, "/v1/completions", body) for body in bodies))
        page = await metrics(pod)
    assert [answer["usage"]["completion_tokens"] for _, answer in answers] == [60] * 8
    assert page["vllm:num_preemptions_total"] > 0
    assert page["vllm:request_queue_time_seconds_sum"] > 0
    [info] = [key for key in page if key.startswith("vllm:cache_config_info")]
    assert " num_gpu_blocks=20 " in info and " block_size=8 " in info


async def test_stream_interval_puts_several_tokens_in_a_chunk() -> None:
    with pods("--model", "m", "--stream-interval", "4", "--speed", "20") as [pod]:
        body = {"prompt": "x", "max_tokens": 10, "ignore_eos": True}
        chunks = await events(pod, "/v1/completions", body)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert sum(map(len, texts)) == 40
    assert all(len(text) >= 16 for text in texts[:-1])


def test_mistakes_are_told_in_one_line() -> None:
    run = CliRunner().invoke
    result = run(simulate_pod, ["--model", "m", "--max-num-seqs", "5000", "--max-num-batched-tokens", "100"])
    assert result.exit_code == 2 and "max_num_batched_tokens (100) is below max_num_seqs (5000)" in result.output
    result = run(simulate_pod, ["--model", "m", "--port", "65530", "--count", "10"])
    assert result.exit_code == 2 and "10 pods do not fit" in result.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(simulate_pod, ["--model", "m", "--port", str(port)])
    assert result.exit_code == 1
    assert result.output == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port\n"
    result = run(simulate_pod, ["--model", "m", "--host", "nohost.invalid"])
    assert result.exit_code == 1 and result.output.endswith("; choose another --host\n")
    assert "Unknown error" not in result.output


# Prefill and decode apart


async def test_a_prompt_that_another_pod_has_prefilled_is_not_computed_again(fleet: list[str]) -> None:
    prefill, decode = fleet
    text = "What one pod computes another need not. " * 40
    asked = chat(text, max_tokens=1, kv_transfer_params={"do_remote_decode": True, "do_remote_prefill": False})
    before = await metrics(prefill), await metrics(decode)
    status, answer = await post(prefill, CHAT, asked)
    params = answer["kv_transfer_params"]
    assert status == 200
    assert params["remote_engine_id"] == prefill and params["do_remote_prefill"] and params["remote_block_ids"]
    status, answer = await post(decode, CHAT, chat(text, kv_transfer_params=params))
    assert status == 200 and answer["usage"]["completion_tokens"] == 8 and answer["kv_transfer_params"] is None
    after = await metrics(prefill), await metrics(decode)
    computed = "vllm:request_prefill_kv_computed_tokens_sum"
    there, here = (now[computed] - then[computed] for now, then in zip(after, before, strict=True))
    assert there > 200 and here == 1
    status, _ = await post(decode, CHAT, chat(text, kv_transfer_params=[1]))
    assert status == 400
