"""A pod that answers as a test tells it to, by the request header `x-script`."""

import asyncio
import gzip
import json
import threading
from collections.abc import Callable
from typing import Any, Self

from aiohttp import web

USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
FLAT_ERROR = {"object": "error", "message": "no such thing", "type": "BadRequestError", "param": None, "code": 400}
METRICS = 'vllm:num_requests_running{model_name="m"} 0\nvllm:num_requests_waiting{model_name="m"} 0\n'


def _events(*documents: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in documents) + b"data: [DONE]\n\n"


def chunk(text: str) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}  # fmt: skip


EVENTS = _events(*(chunk(f"word {n} ") for n in range(6)), {**chunk(""), "choices": [], "usage": USAGE})


class ScriptedPod:
    """Serves in a thread of its own for as long as the `with` block lasts."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.seen: list[dict[str, str]] = []
        """Headers of the requests that came, and under `path` and `body` the rest."""
        self._port = port
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application(client_max_size=1 << 26)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(application)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self._port, reuse_address=True).start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=METRICS)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append({**headers, "path": request.path, "body": body.decode("utf-8", "replace")})
        script: Callable[[web.Request], Any] = getattr(self, "_" + request.headers.get("x-script", "json"))
        answer = await script(request)
        assert isinstance(answer, web.StreamResponse)
        return answer

    async def _json(self, request: web.Request) -> web.Response:
        return web.json_response({"id": "c", "model": "m", "choices": [], "usage": USAGE})

    async def _large(self, request: web.Request) -> web.Response:
        return web.json_response({"model": "m", "data": ["x" * 1000] * 3000, "usage": USAGE})

    async def _created(self, request: web.Request) -> web.Response:
        return web.json_response({"made": True}, status=201)

    async def _error500(self, request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "CUDA out of memory", "type": "X"}}, status=500)

    async def _error401(self, request: web.Request) -> web.Response:
        return web.json_response({"error": "Unauthorized", "message": "the engine's own key"}, status=401)

    async def _error400(self, request: web.Request) -> web.Response:
        return web.json_response(FLAT_ERROR, status=400)

    async def _error429(self, request: web.Request) -> web.Response:
        return web.json_response(FLAT_ERROR, status=429, headers={"retry-after": "7"})

    async def _empty500(self, request: web.Request) -> web.Response:
        return web.Response(status=500)

    async def _pieces503(self, request: web.Request) -> web.StreamResponse:
        return await self._in_pieces(request, b"the engine is full, come back later", 503, "text/plain", 10)

    async def _pieces400(self, request: web.Request) -> web.StreamResponse:
        return await self._in_pieces(request, json.dumps(FLAT_ERROR).encode(), 400, "application/json", 30)

    async def _gzip502(self, request: web.Request) -> web.Response:
        body = gzip.compress(json.dumps(FLAT_ERROR).encode())
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        return web.Response(body=body, status=502, headers=headers)

    async def _vanish(self, request: web.Request) -> web.Response:
        """Hang up without a word."""
        if request.transport is not None:
            request.transport.close()
        return web.Response()

    async def _sse(self, request: web.Request) -> web.StreamResponse:
        return await self._in_pieces(request, EVENTS, 200, "text/event-stream", 37)

    async def _slow(self, request: web.Request) -> web.StreamResponse:
        return await self._in_pieces(request, EVENTS, 200, "text/event-stream", 100, pause_seconds=0.08)

    async def _in_pieces(
        self,
        request: web.Request,
        body: bytes,
        status: int,
        content_type: str,
        size: int,
        pause_seconds: float = 0.003,
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"content-type": content_type})
        await response.prepare(request)
        for start in range(0, len(body), size):
            await response.write(body[start : start + size])
            await asyncio.sleep(pause_seconds)
        await response.write_eof()
        return response
