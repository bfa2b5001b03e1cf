"""Chats as clients of the chat API hold them, and what becomes of each of their requests.

Two groups of chats, each group with a long system prompt in common, and strays that share nothing. Every turn of a
chat repeats all of it so far. Whether a pod had a prompt's beginning in its cache is what the pod itself reports in
`usage`; which pod answered is its own word too (`x-pod`), not the router's.
"""

import contextlib
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from bench.lab import Lab

TURNS = 6
"""Of a chat, before another one takes its place."""
SHARED_WORDS, STRAY_WORDS, QUESTION_WORDS = 2500, 600, 40
GROUPS = (("help desk", 3), ("code review", 3))
STRAYS = 2


@dataclass
class Chat:
    """A conversation, or with no system prompt a single question."""

    name: str
    system: str
    random: random.Random
    messages: list[dict[str, str]] = field(default_factory=list)
    turn: int = 0

    def ask(self) -> list[dict[str, str]]:
        """The messages of the next turn."""
        self.turn += 1
        if not self.messages and self.system:
            self.messages.append({"role": "system", "content": self.system})
        words = QUESTION_WORDS if self.system else STRAY_WORDS
        self.messages.append({"role": "user", "content": _words(self.random, words)})
        return self.messages

    def answered(self, text: str) -> None:
        """Keep the answer for the next turn."""
        self.messages.append({"role": "assistant", "content": text})

    @property
    def over(self) -> bool:
        return self.turn >= (TURNS if self.system else 1)


def _words(chance: random.Random, count: int) -> str:
    return " ".join("".join(chance.choices("abcdefghijklmnoprstuvw", k=chance.randint(3, 8))) for _ in range(count))


class Chats:
    """Who speaks next. A chat that is over makes room for a new one of its group."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._started: dict[str, int] = {}
        self._systems = {group: _words(self._random, SHARED_WORDS) for group, _ in GROUPS}
        starts = [group for group, count in GROUPS for _ in range(count)] + ["stray"] * STRAYS
        self._random.shuffle(starts)
        self._idle = deque((group, self._start(group)) for group in starts)

    def _start(self, group: str) -> Chat:
        number = self._started[group] = self._started.get(group, 0) + 1
        return Chat(f"{group} {number}", self._systems.get(group, ""), random.Random(f"{group} {number}"))

    @contextlib.contextmanager
    def next(self) -> Iterator[Chat]:
        """The chat that has waited longest; nobody else has it meanwhile."""
        group, chat = self._idle.popleft()
        try:
            yield chat
        finally:
            self._idle.append((group, self._start(group) if chat.over else chat))


@dataclass
class Outcome:
    """What became of one request. Times in seconds from sending it; `failure` is empty when it went well."""

    number: int
    chat: str
    turn: int
    streamed: bool
    pod: str = ""
    strategy: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0
    failure: str = ""
    text: str = ""


class Client:
    """Speaks to Envoy as any client of the chat API would."""

    def __init__(self, session: aiohttp.ClientSession, lab: Lab) -> None:
        self._session = session
        self._url = lab.envoy_url + "/v1/chat/completions"
        self._model = lab.model
        self._pods = {address: f"pod-{number}" for number, address in enumerate(lab.addresses)}

    async def send(self, number: int, chat: Chat) -> Outcome:
        """One turn of a chat; every third one is not streamed."""
        streamed = number % 3 != 0
        body: dict[str, Any] = {"model": self._model, "messages": chat.ask(), "max_tokens": 24 + 8 * (number % 4)}
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        outcome = Outcome(number, chat.name, chat.turn, streamed)
        began = time.monotonic()
        try:
            async with self._session.post(self._url, json=body) as response:
                outcome.pod = self._pods.get(response.headers.get("x-pod", ""), "")
                outcome.strategy = response.headers.get("routing-strategy", "")
                if response.status != 200:
                    outcome.failure = f"{response.status} {_message(await response.read())}"
                elif streamed:
                    await self._read_stream(response, outcome, began)
                else:
                    answer = orjson.loads(await response.read())
                    outcome.text = answer["choices"][0]["message"]["content"]
                    _count(outcome, answer["usage"])
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
            outcome.failure = f"{type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - began
        if not outcome.failure and not outcome.strategy:
            outcome.failure = "answered, but the router has not decided where"
        chat.answered(outcome.text)
        return outcome

    @staticmethod
    async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome, began: float) -> None:
        pieces, done = [], False
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                continue
            event = orjson.loads(line[6:])
            for choice in event["choices"]:
                piece = choice["delta"].get("content")
                if piece and outcome.first_token_seconds is None:
                    outcome.first_token_seconds = time.monotonic() - began
                pieces.append(piece or "")
            if event.get("usage"):
                _count(outcome, event["usage"])
        outcome.text = "".join(pieces)
        if not done:
            outcome.failure = "the stream ended early"


def _count(outcome: Outcome, usage: dict[str, Any]) -> None:
    outcome.prompt_tokens = usage["prompt_tokens"]
    outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _message(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:100].decode(errors="replace")
