"""Asks pods to wake models that sleep, as AIBrix does: POST /v1/runtime/models/wake to the runtime beside the engine.

A request for a sleeping model is answered 503 at once; the pod is asked in the background, once at a time for each
model, and whoever put the model to sleep says when it is awake. Nothing waits for the answer and nothing depends on it.
"""

import asyncio
import contextlib
import os

import orjson
import structlog

from router.fleet import Pod

log = structlog.get_logger()

RUNTIME_PORT = 8080
PATH = "/v1/runtime/models/wake"
TIMEOUT_SECONDS = 120.0
"""Waking is loading weights; meanwhile the pod is not asked again."""
PAUSE_SECONDS = 10.0
"""Until a pod that has answered, or could not be reached, is asked again."""
MAX_AT_ONCE = 64
_STATUS_LINE_BYTES = 1024


class Waker:
    """`ask` must be called while an event loop runs."""

    def __init__(
        self, port: int = RUNTIME_PORT, timeout_seconds: float = TIMEOUT_SECONDS, pause_seconds: float = PAUSE_SECONDS
    ) -> None:
        self._port = port
        self._pause_seconds = pause_seconds
        self._timeout_seconds = timeout_seconds
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    def ask(self, pod: Pod, model: str) -> None:
        """Have the pod wake the model, unless it was asked to a moment ago or has not answered yet."""
        key = (pod.host_ip, model)
        if key in self._asking or len(self._asking) >= MAX_AT_ONCE:
            return
        task = self._asking[key] = asyncio.get_running_loop().create_task(self._wake(pod, model))
        task.add_done_callback(lambda _: self._asking.pop(key, None))

    async def _wake(self, pod: Pod, model: str) -> None:
        await self._ask(pod, model)
        await asyncio.sleep(self._pause_seconds)

    async def _ask(self, pod: Pod, model: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                status = await self._post(pod, model)
        except (OSError, ValueError, TimeoutError) as error:
            log.warning("a pod could not be asked to wake a model", pod=pod.name, model=model, error=repr(error))
            return
        if 200 <= status < 300:
            log.info("a pod was asked to wake a model", pod=pod.name, model=model)
        else:
            log.warning("a pod refused to wake a model", pod=pod.name, model=model, status=status)

    async def _post(self, pod: Pod, model: str) -> int:
        """The status. Raises OSError, or ValueError for what is no HTTP."""
        operation = f"gateway-wake/{pod.record.namespace}/{pod.name}/{model}/{os.urandom(8).hex()}"
        body = orjson.dumps({"model_name": model, "operation_id": operation})
        host = pod.host_ip
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: {host}:{self._port}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(host.strip("[]"), self._port, limit=_STATUS_LINE_BYTES)
        try:
            writer.write(head.encode() + body)
            await writer.drain()
            parts = (await reader.readline()).split()
            if len(parts) < 2 or not parts[0].startswith(b"HTTP/"):
                raise ValueError("the answer is not HTTP")
            return int(parts[1])
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def close(self) -> None:
        """Ask no more, and forget what is under way."""
        for task in list(self._asking.values()):
            task.cancel()
