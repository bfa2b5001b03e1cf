"""A client that keeps sending chats through Envoy and remembers how each one ended."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.lab import Lab


def chat(model: str, text: str = "hello", *, stream: bool = False, max_tokens: int = 8, **more: Any) -> dict[str, Any]:
    """A chat completion request."""
    message = {"role": "user", "content": text}
    return {
        "model": model,
        "messages": [message],
        "stream": stream,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        **more,
    }


def in_flight(lab: Lab, whose: str = "own") -> list[int]:
    """The requests that the router believes to be in flight, by pod."""
    return [pod[whose]["requests"] for pod in lab.believed_pods()]


@dataclass
class Outcome:
    """How one request ended. `whole` says that a stream came with its [DONE]."""

    status: int
    pod: str = ""
    whole: bool = True
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.whole and not self.error


async def send(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Outcome:
    """One request, read to its end."""
    try:
        async with session.post(url + "/v1/chat/completions", json=body) as answer:
            raw = await answer.read()
            whole = raw.rstrip().endswith(b"data: [DONE]") if body.get("stream") else bool(json.loads(raw))
            error = "" if answer.status == 200 else raw[:300].decode("utf-8", "replace")
            return Outcome(answer.status, answer.headers.get("target-pod-ip", ""), whole, error)
    except (aiohttp.ClientError, ValueError, TimeoutError) as error:
        return Outcome(0, error=repr(error))


@dataclass
class Load:
    """Requests that are on their way, and those that have ended."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.ok]

    @property
    def pods(self) -> Counter[str]:
        return Counter(outcome.pod for outcome in self.outcomes if outcome.ok)


@contextlib.asynccontextmanager
async def steady_load(
    url: str, model: str, *, per_second: float, stream: bool = True, max_tokens: int = 20
) -> AsyncIterator[Load]:
    """Open-loop load for as long as the block lasts; every request that was begun is read to its end."""
    load = Load()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:
        under_way: set[asyncio.Task[None]] = set()

        async def one(number: int) -> None:
            body = chat(model, f"request {number}", stream=stream, max_tokens=max_tokens)
            load.outcomes.append(await send(session, url, body))

        async def begin() -> None:
            number = 0
            while True:
                task = asyncio.create_task(one(number))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                number += 1
                await asyncio.sleep(1 / per_second)

        beginning = asyncio.create_task(begin())
        try:
            yield load
        finally:
            beginning.cancel()
            await asyncio.gather(beginning, return_exceptions=True)
            await asyncio.gather(*under_way)
