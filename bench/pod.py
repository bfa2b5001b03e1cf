"""`pointsman simulate-pod`: a vLLM that computes nothing. Same API, same metrics page, delays from the engine model.

    pointsman simulate-pod --model llama --port 8000 --count 4 --preset h100-llama-3.1-8b --speed 2

One request walks: handler (body, model, prompt) -> `pod_text` (tokens, block hashes, answer) -> `pod_engine` (a turn in
the engine) -> `pod_wire` (JSON, whole or in chunks). `--speed` makes the engine faster, and so shows in the pod's own
metrics: every number agrees with what a client sees. Same seed, same answers, whichever pod gives them.
Prefill and decode may be apart: asked with `kv_transfer_params` as a NixlConnector is, it answers with where the KV
cache lies; given that, it does not compute the prompt.

Cost: no CPU at rest; 0.4 ms per request and 30 µs per streamed token, as `python -m bench.pod_cost` measures
(`--stream-interval` has several tokens share one write). Chunks are written past aiohttp, straight to the transport,
without waiting for slow readers: what piles up is at most the answer.
"""

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeGuard, cast

import click
import orjson
import uvloop
import xxhash
from aiohttp import HttpVersion11, web

from bench import pod_text, pod_wire
from bench.engine import Engine, EngineParams, EngineRequest
from bench.engine_presets import PRESETS
from bench.pod_engine import Choice, LiveEngine
from bench.pod_metrics import AdapterCounts, HttpStats, MetricsPage
from bench.pod_wire import CHAT, COMPLETION, DONE, Api, ApiError, Chunks, Usage, bad_request

MAX_BODY_BYTES = 64 << 20
EMBEDDING_DIMENSIONS = 64
MAX_CHOICES = 128
_INFERENCE = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_NOT_COUNTED = ("/metrics", "/health", "/version")  # as vLLM's own instrumentation leaves them out

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pod:
    def __init__(
        self,
        models: tuple[str, ...],
        params: EngineParams,
        *,
        seed: int,
        mean_output_tokens: int,
        fail_rate: float = 0.0,
        stream_interval: int = 1,
        index: int = 0,
    ) -> None:
        self.name = ""  # host:port, once it listens
        self._models = models
        self._params = params
        self._answers = pod_text.Answers(mean_output_tokens, seed)
        self._fail_rate = fail_rate
        self._chance = random.Random(f"{seed} {index}")
        self._live = LiveEngine(Engine(params), stream_interval)
        self._created = int(time.time())
        self._http = HttpStats()
        self._adapters = AdapterCounts(len(models) - 1) if len(models) > 1 else None
        self._page = MetricsPage(self._live.engine, models[0], self._http, adapters=self._adapters)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._middleware])
        app.on_response_prepare.append(self._name_pod)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completion),
                web.post("/v1/embeddings", self._embeddings),
                web.get("/v1/models", self._list_models),
                web.post("/tokenize", self._tokenize),
                web.get("/metrics", self._metrics),
                web.get("/health", self._health),
                web.get("/version", self._version),
            ]
        )
        return app

    def close(self) -> None:
        self._live.close()

    # Around every request

    async def _name_pod(self, _request: web.Request, response: web.StreamResponse) -> None:
        response.headers["x-pod"] = self.name

    async def _respond(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.path in _INFERENCE and self._chance.random() < self._fail_rate:
                status = self._chance.choice((500, 503))
                raise ApiError(status, "InternalServerError", "Failed on purpose (--fail-rate).")
            return await handler(request)
        except ApiError as error:
            return _json(error.body, error.status)
        except web.HTTPException as error:
            return _json(orjson.dumps({"detail": error.reason}), error.status)

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.monotonic()
        response = await self._respond(request, handler)
        resource = request.match_info.route.resource
        if resource is not None and request.path not in _NOT_COUNTED:
            self._http.count(
                resource.canonical,
                request.method,
                response.status,
                request.content_length or 0,
                response.content_length or 0,
                time.monotonic() - began,
            )
        return response

    # Answers

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise bad_request("messages: a list with at least one message is required", "messages")
        try:
            prompt = pod_text.render_chat(messages, body.get("tools"))
        except ValueError as error:
            raise bad_request(str(error), "messages") from None
        limit = body.get("max_completion_tokens")
        return await self._answer(request, body, CHAT, [prompt], body.get("max_tokens") if limit is None else limit)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        limit = body.get("max_tokens", 16)  # OpenAI's default for this API, and vLLM's
        return await self._answer(request, body, COMPLETION, _prompts(body.get("prompt"), "prompt"), limit)

    async def _answer(
        self, request: web.Request, body: dict[str, Any], api: Api, prompts: list[bytes], max_tokens: Any
    ) -> web.StreamResponse:
        model = self._model(body)
        n = 1 if body.get("n") is None else body["n"]
        if not _whole_number(n, 1, MAX_CHOICES):
            raise bad_request(f"n must be between 1 and {MAX_CHOICES}, got {n}.", "n")
        transfer = body.get("kv_transfer_params") or {}
        if not isinstance(transfer, dict):
            raise bad_request("kv_transfer_params: an object is required", "kv_transfer_params")
        # What a later turn of the conversation will repeat of this one is known from here on.
        choices = [
            self._choice(body, model, prompt, max_tokens, index * n + i)
            for index, prompt in enumerate(prompts)
            for i in range(n)
        ]
        answer_id = api.id_prefix + _request_id(request)
        adapters = self._adapters if model != self._models[0] else None
        if adapters is not None:
            adapters.add(model, 1)
        try:
            if body.get("stream"):
                return await self._stream(request, body, api, answer_id, model, choices, n)
            for choice in choices:
                self._live.submit(choice)
            for choice in choices:
                await choice.done
            handed = self._hand_over(choices[0].request) if transfer.get("do_remote_decode") else None
            texts = [(pod_text.answer_text(c.offset, 0, c.request.output_tokens), c.finish_reason) for c in choices]
            whole = pod_wire.whole(api, answer_id, int(time.time()), model, texts, _usage(choices, n), handed)
            return _json(whole)
        finally:
            for choice in choices:
                if choice.request.arrived >= 0 and not choice.finished:
                    self._live.abort(choice)
            if adapters is not None:
                adapters.add(model, -1)

    def _hand_over(self, request: EngineRequest) -> dict[str, Any]:
        """What vLLM's NixlConnector answers: where another engine finds the KV cache of the prompt."""
        blocks = -(-request.prompt_tokens // self._params.block_tokens)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": list(range(blocks)),
            "remote_engine_id": self.name,
            "remote_host": "localhost",
            "remote_port": 5600,
            "tp_size": 1,
        }

    def _choice(self, body: dict[str, Any], model: str, prompt: bytes, max_tokens: Any, index: int) -> Choice:
        prompt_tokens = pod_text.count_tokens(prompt)
        longest = self._params.max_model_len
        if prompt_tokens < 1:
            raise bad_request("The prompt is empty.", "prompt")
        if prompt_tokens >= longest:
            raise bad_request(
                f"This model's maximum context length is {longest} tokens. However, your request has {prompt_tokens}"
                " input tokens. Please reduce the length of the input messages.",
                "input_tokens",
            )
        if max_tokens is None:
            limit = longest - prompt_tokens
        elif not _whole_number(max_tokens, 1):
            raise bad_request(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens")
        elif prompt_tokens + max_tokens > longest:
            raise bad_request(
                f"This model's maximum context length is {longest} tokens. However, you requested {max_tokens} output"
                f" tokens and your prompt contains {prompt_tokens} input tokens.",
                "max_tokens",
            )
        else:
            limit = max_tokens
        salt = body.get("seed")
        said, offset = self._answers.draw(prompt, index + (salt if _whole_number(salt, 0) else 0))
        if max_tokens is not None and body.get("ignore_eos"):
            said = limit
        least = body.get("min_tokens")
        if _whole_number(least, 1):
            said = max(said, least)
        said = min(said, limit)
        block = self._params.block_tokens
        text = prompt + pod_text.answer_text(offset, 0, said).encode()
        request = EngineRequest(
            prompt_tokens,
            said,
            pod_text.block_hashes(text, block, model),
            max_tokens=max_tokens or limit,
            prefilled=bool((body.get("kv_transfer_params") or {}).get("do_remote_prefill")),
        )
        reason = "length" if said == limit else "stop"
        choice = Choice(request, index, offset, reason, asyncio.get_running_loop().create_future())
        request.key = choice
        return choice

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        api: Api,
        answer_id: str,
        model: str,
        choices: list[Choice],
        n: int,
    ) -> web.StreamResponse:
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise bad_request("stream_options: an object is required", "stream_options")
        with_usage, continuous = options.get("include_usage"), options.get("continuous_usage_stats")
        chunks = Chunks(api, answer_id, int(time.time()), model)
        if request.version < HttpVersion11:
            raise bad_request("Streaming needs HTTP/1.1.")
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        transport = cast(asyncio.WriteTransport, request.transport)
        if transport is None:
            raise asyncio.CancelledError

        def emit(choice: Choice, tokens: int) -> None:
            prompt = choice.request.prompt_tokens
            usage = Usage(prompt, tokens) if continuous else None
            text = pod_text.answer_text(choice.offset, choice.sent, tokens)
            reason = choice.finish_reason if tokens == choice.request.output_tokens else None
            event = chunks.text(choice.index, text, reason, usage)
            if api.is_chat and not choice.sent:
                event = chunks.role(choice.index, Usage(prompt, 0) if continuous else None) + event
            if not transport.is_closing():
                transport.write(b"%x\r\n%b\r\n" % (len(event), event))

        for choice in choices:
            choice.emit = emit
            self._live.submit(choice)
        for choice in choices:
            await choice.done
        end = DONE
        if with_usage:
            end = chunks.usage(_usage(choices, n)) + DONE
        await response.write(end)
        await response.write_eof()
        return response

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        model = self._model(body)
        dimensions = EMBEDDING_DIMENSIONS if body.get("dimensions") is None else body["dimensions"]
        if not _whole_number(dimensions, 1, 4096):
            raise bad_request(f"dimensions must be between 1 and 4096, got {dimensions}.", "dimensions")
        texts = _prompts(body.get("input"), "input")
        inputs = [(xxhash.xxh3_64_intdigest(text), pod_text.count_tokens(text)) for text in texts]
        answer_id = "embd-" + _request_id(request)
        as_base64 = body.get("encoding_format") == "base64"
        return _json(pod_wire.embeddings(answer_id, int(time.time()), model, inputs, dimensions, as_base64))

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        self._model(body)
        if "messages" in body:
            try:
                text = pod_text.render_chat(body["messages"], body.get("tools"))
            except (TypeError, ValueError) as error:
                raise bad_request(str(error), "messages") from None
        else:
            prompt = body.get("prompt")
            if not isinstance(prompt, str):
                raise bad_request("prompt: a string is required, or messages", "prompt")
            text = prompt.encode("utf-8", "surrogatepass")
        tokens = pod_text.tokens(text)
        return _json(
            orjson.dumps(
                {
                    "count": len(tokens),
                    "max_model_len": self._params.max_model_len,
                    "tokens": tokens,
                    "token_strs": None,
                }
            )
        )

    async def _list_models(self, _request: web.Request) -> web.StreamResponse:
        return _json(pod_wire.models(self._models, self._created, self._params.max_model_len))

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        self._live.settle()
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._page.render(), headers=headers)

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def _version(self, _request: web.Request) -> web.StreamResponse:
        return _json(orjson.dumps({"version": pod_wire.VERSION}))

    # Reading requests

    async def _body(self, request: web.Request) -> dict[str, Any]:
        try:
            body = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            raise ApiError(400, "Bad Request", f"The body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise ApiError(400, "Bad Request", "The body is not a JSON object.")
        return body

    def _model(self, body: dict[str, Any]) -> str:
        model = body.get("model")
        if not model:
            return self._models[0]
        if model not in self._models:
            raise pod_wire.unknown_model(model)
        return str(model)


def _request_id(request: web.Request) -> str:
    """The client's, whatever bytes it is made of, or one of ours."""
    given = request.headers.get("x-request-id")
    return given.encode("utf-8", "surrogateescape").decode("latin-1") if given else os.urandom(16).hex()


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _whole_number(value: object, least: int, most: int = 1 << 62) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _prompts(value: Any, param: str) -> list[bytes]:
    """One text, one list of token ids, or a list of either."""
    several = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    texts = []
    for each in several:
        if isinstance(each, str):
            texts.append(each.encode("utf-8", "surrogatepass"))
        elif isinstance(each, list) and each and all(_whole_number(token, 0) for token in each):
            texts.append(pod_text.from_token_ids(each))
        else:
            raise bad_request(f"{param}: a string, a list of token ids, or a list of these is required", param)
    return texts


def _usage(choices: list[Choice], n: int) -> Usage:
    """Prompts count once, however many answers each has."""
    prompts = [choice.request for choice in choices[::n]]
    return Usage(
        sum(request.prompt_tokens for request in prompts),
        sum(choice.request.output_tokens for choice in choices),
        sum(request.cached_tokens for request in prompts),
    )


async def serve(pods: list[Pod], host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve each pod on a port of its own, counted up from `port` (0: any free ones), until SIGTERM or SIGINT."""
    runners = []
    try:
        for i, pod in enumerate(pods):
            # A vLLM takes no notice of content-encoding: a packed body is no JSON to it.
            runner = web.AppRunner(
                pod.application(),
                access_log=None,
                handler_cancellation=True,
                shutdown_timeout=1.0,
                auto_decompress=False,
            )
            runners.append(runner)
            await runner.setup()
            site = web.TCPSite(runner, host, port + i if port else 0, backlog=1024)
            try:
                await site.start()
            except OSError as error:
                unknown = isinstance(error, socket.gaierror)  # whose numbers are its own
                why, option = (error.strerror, "--host") if unknown else (os.strerror(error.errno or 0), "--port")
                raise click.ClickException(
                    f"cannot listen on {host}:{port + i}: {why}; choose another {option}"
                ) from None
            pod.name = "{}:{}".format(*runner.addresses[0][:2])
            ready(pod.name)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
    finally:
        await asyncio.gather(*(runner.cleanup() for runner in runners))
        for pod in pods:
            pod.close()


@click.command(name="simulate-pod")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free port.")
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Pods, on consecutive ports.")
@click.option("--model", "models", multiple=True, required=True, help="Again for each LoRA adapter.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="h100-llama-3.1-8b", show_default=True)
@click.option("--speed", type=click.FloatRange(0.001, 1e6), default=1.0, show_default=True, help="Times the preset's.")
@click.option("--num-gpu-blocks", type=click.IntRange(1), help="Instead of the preset's.")
@click.option("--block-size", type=click.IntRange(1), help="Tokens per KV block.")
@click.option("--max-num-seqs", type=click.IntRange(1), help="Requests that may run at once.")
@click.option("--max-num-batched-tokens", type=click.IntRange(1), help="Tokens per step.")
@click.option("--max-model-len", type=click.IntRange(2), help="Tokens of prompt and answer.")
@click.option(
    "--output-tokens", type=click.IntRange(1), default=200, show_default=True, help="Mean length of unlimited answers."
)
@click.option("--stream-interval", type=click.IntRange(1), default=1, show_default=True, help="Tokens per chunk.")
@click.option(
    "--fail-rate", type=click.FloatRange(0, 1), default=0.0, help="Share of requests answered with 500 or 503."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of answers and failures.")
def simulate_pod(
    host: str,
    port: int,
    count: int,
    models: tuple[str, ...],
    preset: str,
    speed: float,
    num_gpu_blocks: int | None,
    block_size: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    max_model_len: int | None,
    output_tokens: int,
    stream_interval: int,
    fail_rate: float,
    seed: int,
) -> None:
    """Serve one or more simulated vLLM pods."""
    if port and port + count > 65536:
        raise click.UsageError(f"{count} pods do not fit between port {port} and 65535")
    asked: dict[str, Any] = {
        "num_blocks": num_gpu_blocks,
        "block_tokens": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
    }
    try:
        params = replace(PRESETS[preset], **{k: v for k, v in asked.items() if v is not None}).faster(speed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    # vLLM would not start with a context longer than the cache; here the cache decides.
    params = replace(params, max_model_len=min(params.max_model_len, params.num_blocks * params.block_tokens))
    pods = [
        Pod(
            models,
            params,
            seed=seed,
            mean_output_tokens=output_tokens,
            fail_rate=fail_rate,
            stream_interval=stream_interval,
            index=index,
        )
        for index in range(count)
    ]
    uvloop.run(serve(pods, host, port, lambda name: click.echo(f"ready {name}")))


if __name__ == "__main__":
    simulate_pod()
