"""One exchange with everything around it: users, limits, profiles; and what its replies say, as plain values."""

import itertools
from collections.abc import Awaitable, Mapping, Sequence
from random import Random
from typing import Any

import fleet
import orjson
from fleet import chat, header_mutation, loads, read, request_body, request_headers, set_headers

from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from router.exchange import Exchange
from router.limits import Gate, Limits, SharedCounters, digest_of, effective
from router.modes import EnvoyPeer
from router.policy import Policy
from router.scheduler import Scheduler
from router.strategies import Context
from state.catalog import CatalogDocument, PodRecord
from state.ledger import Entry

REQUEST_ID = "01234567-89ab-4cde-a123-0123456789ab"
KEY = "pm-" + "k" * 40


class Book:
    """User records at hand: name -> (rpm, tpm) as they are stored."""

    def __init__(self, users: Mapping[str, tuple[int, int]], keys: Mapping[str, str] | None = None) -> None:
        self._users = {name: effective(*stored) for name, stored in users.items()}
        self._keys = {digest_of(key): user for key, user in (keys or {}).items()}

    def limits_of(self, user: str) -> Limits | None:
        return self._users.get(user)

    def user_of(self, key_digest: str) -> str | None:
        return self._keys.get(key_digest)

    def has_keys(self, user: str) -> bool:
        return user in self._keys.values()


class Contract:
    """A router in this process. `exchange()` begins a stream; the settings are those of the endpoints file."""

    def __init__(
        self,
        pods: int = 1,
        *,
        strategy: str = "random",
        records: Sequence[PodRecord] = (),
        settings: Mapping[str, Any] | None = None,
        users: Mapping[str, tuple[int, int]] | None = None,
        keys: Mapping[str, str] | None = None,
        token: str = "",
        explain: bool = False,
        usage_metrics: bool = False,
    ) -> None:
        self.tables = fleet.make_fleet(pods, records=records)
        if settings:
            chosen = tuple(records) or tuple(fleet.make_record(slot) for slot in range(pods))
            self.tables.catalog.publish(CatalogDocument(chosen, settings))
        self.clock = itertools.count(1_000_000, 0.0001)
        tick = self.clock.__next__
        context = Context(Random(1), session_secret=b"s" * 32, user_tokens=self.tables.user_tokens)
        self.scheduler = Scheduler(self.tables, strategy, tick, context)
        book = None if users is None else Book(users, keys)
        counters = SharedCounters(self.tables.user_minutes, self.tables.model_seconds, book, tick)
        gate = Gate(counters, self.scheduler.series, static_token=token)
        self.policy = Policy(gate, explain=explain, usage_metrics=usage_metrics)

    def exchange(self, accounting: str = "stream", destination: str = "header") -> "Stream":
        return Stream(self, accounting, destination)

    def routed(self, path: str = "/v1/chat/completions", body: bytes | None = None, **headers: str) -> "Stream":
        """A stream after the two request messages."""
        stream = self.exchange()
        stream.send(request_headers(path, **headers))
        stream.send(request_body(chat() if body is None else body))
        return stream

    @property
    def in_flight(self) -> int:
        return sum(loads(self.tables))

    @property
    def outcomes(self) -> tuple[int, int]:
        return sum(loads(self.tables, Entry.SUCCEEDED)), sum(loads(self.tables, Entry.FAILED))

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        return {labels[1:]: value for labels, value in self.scheduler.series.items() if labels[0] == name}


class Said:
    """A reply, read."""

    def __init__(self, reply: ProcessingResponse) -> None:
        self.message = reply
        self.kind = str(reply.WhichOneof("response"))
        self.headers = set_headers(reply)
        self.removed = list(header_mutation(reply).remove_headers)

    @property
    def status(self) -> int:
        """Of an ImmediateResponse."""
        return self.message.immediate_response.status.code

    @property
    def error(self) -> dict[str, Any]:
        body = self.message.immediate_response.body or self.body
        found: dict[str, Any] = orjson.loads(body)["error"]
        return found

    @property
    def common(self) -> Any:
        return getattr(self.message, self.kind).response

    @property
    def body(self) -> bytes:
        """What takes the place of the body's bytes."""
        given: bytes = self.common.body_mutation.body
        return given

    @property
    def is_plain(self) -> bool:
        """It changes nothing."""
        return not self.headers and not self.removed and not self.common.HasField("body_mutation")


class Stream:
    """One ext_proc stream."""

    def __init__(self, contract: Contract, accounting: str, destination: str) -> None:
        self.contract = contract
        self.exchange = Exchange(
            contract.scheduler,
            EnvoyPeer(accounting, destination),
            lambda: REQUEST_ID.encode(),
            1 << 20,
            contract.policy,
        )
        self.said: list[Said] = []

    def send(self, message: bytes) -> Said:
        """Exactly one reply."""
        reply = self.exchange.receive(message)
        assert not isinstance(reply, Awaitable)
        messages = read(reply)
        assert len(messages) == 1
        self.said.append(Said(messages[0]))
        return self.said[-1]

    def all(self, message: bytes) -> list[Said]:
        reply = self.exchange.receive(message)
        assert not isinstance(reply, Awaitable)
        return [Said(one) for one in read(reply)]

    @property
    def last(self) -> Said:
        return self.said[-1]

    @property
    def finished(self) -> bool:
        return self.exchange.finished


def response_with(status: str | None = "200", *, eos: bool = False, **headers: str) -> bytes:
    """Response headers; `headers` with underscores for dashes."""
    message = ProcessingRequest()
    message.response_headers.end_of_stream = eos
    if status is not None:
        message.response_headers.headers.headers.add(key=":status", raw_value=status.encode())
    for key, value in headers.items():
        message.response_headers.headers.headers.add(key=key.replace("_", "-"), raw_value=value.encode())
    return message.SerializeToString()


def completion(**more: Any) -> bytes:
    """A chat completion's reply."""
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    return orjson.dumps(
        {"id": "c", "object": "chat.completion", "model": "llama", "choices": [], "usage": usage, **more}
    )


def chunk(**more: Any) -> bytes:
    """A chunk of a streamed chat completion."""
    delta = {"index": 0, "delta": {"content": "hi"}, "finish_reason": None}
    return b"data: " + orjson.dumps({"id": "c", "model": "llama", "choices": [delta], **more}) + b"\n\n"


USAGE_CHUNK = chunk(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12})
DONE = b"data: [DONE]\n\n"
