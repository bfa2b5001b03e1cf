"""Sends prompts to the pods that prefill them, for `pd`: HTTP/1.1 on connections that are kept.

A worker has at most so many connections to a pod (`pd.connections`); what finds none free waits for one, within its
timeout. A connection that was idle for KEPT_SECONDS is closed here, before the engine closes it (uvicorn does after
five seconds): a request sent just then would be lost.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any

import aiohttp
import structlog
from yarl import URL

from router.fleet import Pod
from router.handover import PrefillFailed

log = structlog.get_logger()

KEPT_SECONDS = 4.0
MAX_ANSWER_BYTES = 16 << 20
"""Of a prefill: one token, and where the KV cache lies."""
MAX_CONNECTIONS = 4096
"""Of one worker, to all pods together."""
TELL_SECONDS = (0.0, 1.0, 5.0)
"""When something is told: an engine does not know yet what is on its way there."""
TELL_TIMEOUT_SECONDS = 5.0


class PrefillSender:
    """See the head of this file. Opens nothing before the first request; to be used while an event loop runs."""

    def __init__(self, timeout_seconds: float, connections: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def post(
        self, pod: Pod, path: str, headers: Mapping[str, str], body: bytes, written: Callable[[], None] | None = None
    ) -> bytes:
        """The body of a good answer; `written` is called once the request is on its way. Raises PrefillFailed."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                status, answer = await self._post(pod, path, headers, body, written)
        except TimeoutError:
            raise PrefillFailed("timeout") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            log.debug("a prefill failed", pod=pod.name, error=repr(error))
            raise PrefillFailed("failed") from None
        if status == 200:
            return answer
        raise PrefillFailed("refused" if 400 <= status < 500 else "failed")

    async def _post(
        self, pod: Pod, path: str, headers: Mapping[str, str], body: bytes, written: Callable[[], None] | None = None
    ) -> tuple[int, bytes]:
        url = URL(f"http://{pod.address}{path}", encoded=True)
        sending = self._opened().post(url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=written)
        async with sending as response:
            answer = bytearray()
            async for piece in response.content.iter_any():
                answer += piece
                if len(answer) > MAX_ANSWER_BYTES:
                    raise ValueError("the answer is too long")
            return response.status, bytes(answer)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_request_chunk_sent.append(_tell_written)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=MAX_CONNECTIONS, limit_per_host=self._connections, keepalive_timeout=KEPT_SECONDS
                ),
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                trace_configs=[trace],
            )
        return self._session

    async def start(self, work: Callable[[Callable[[], None]], Coroutine[Any, Any, str]]) -> str:
        """Begin something and wait until it calls what it is given, or ends: its result if it has ended, else nothing.
        It is not waited for any longer; if whoever waits is cancelled meanwhile, so is the work."""
        under_way = asyncio.Event()
        task = self._keep(work(under_way.set))
        waiting = asyncio.ensure_future(under_way.wait())
        try:
            await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            waiting.cancel()
        return task.result() if task.done() else ""

    def tell(self, pod: Pod, path: str, body: bytes) -> None:
        """Post in the background, more than once."""
        self._keep(self._tell(pod, path, body))

    async def _tell(self, pod: Pod, path: str, body: bytes) -> None:
        for seconds in TELL_SECONDS:
            await asyncio.sleep(seconds)
            with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):  # a timeout is an OSError
                async with asyncio.timeout(TELL_TIMEOUT_SECONDS):
                    await self._post(pod, path, {"content-type": "application/json"}, body)

    def _keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self, seconds: float = 0.0) -> None:
        """Give what is under way so much time, then end it."""
        if self._tasks and seconds > 0:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            task.cancel()
        if self._session is not None:
            await self._session.close()


async def _tell_written(
    _session: aiohttp.ClientSession, context: SimpleNamespace, _params: aiohttp.TraceRequestChunkSentParams
) -> None:
    written = context.trace_request_ctx
    if written is not None:
        written()
