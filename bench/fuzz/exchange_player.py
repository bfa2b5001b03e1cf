"""One input of `bench.fuzz.exchange`, played as one ext_proc stream. Apart, so that a fuzzer can watch the imports."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from bench.exchange_cost import MODEL, fleet
from protos import MessageError
from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from router.exchange import ACCOUNTING_KEY, DESTINATION_KEY
from router.scheduler import Scheduler
from router.strategies import Context
from state.ledger import Entry
from workers.calls import CallError, Reply
from workers.ext_proc import process_method

MAX_BODY = 4096
PHASES = (
    "request_headers", "request_body", "request_trailers", "response_headers", "response_body", "response_trailers",
)  # fmt: skip
NAMES = (
    ":path", ":method", ":status", "content-type", "routing-strategy", "user", "authorization", "external-filter",
    "config-profile", "x-session-id", "x-aibrix-session-key", "traceparent", "x-pointsman-explain", "target-pod",
    "target-pod-ip", "x",
)  # fmt: skip
VALUES = (
    b"/v1/chat/completions", b"/v1/completions?x", b"/v1/audio/transcriptions", b"/v1/messages", b"/v1/embeddings",
    b"application/json", b"multipart/form-data; boundary=x", b"text/event-stream", b"random", b"least-request:2,random",
    b"auto", b"a in (b)", b"200", b"500", b"401", b"\xff\x00", b"", b"1",
)  # fmt: skip
BODIES = (
    b'{"model":"%s","messages":[{"role":"user","content":"hi"}]}' % MODEL.encode(),
    b'{"model":"%s","prompt":"hi","stream":true}' % MODEL.encode(),
    b'data: {"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}\n\n',
    b'{"error":{"message":"no"}}', b"null", b"[" * 5000, b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\n',
)  # fmt: skip


class _Source:
    """The input, byte by byte; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    @property
    def empty(self) -> bool:
        return self._place >= len(self._data)

    def byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1] if self._place <= len(self._data) else 0

    def take(self, count: int) -> bytes:
        start, self._place = self._place, self._place + count
        return self._data[start : self._place]

    def pick(self, choices: tuple[bytes, ...]) -> bytes:
        place = self.byte()
        return choices[place] if place < len(choices) else self.take(place - len(choices))


def _message(source: _Source) -> tuple[str, bytes]:
    kind = source.byte() % (len(PHASES) + 1)
    if kind == len(PHASES):
        return "", source.take(source.byte())
    phase = PHASES[kind]
    message = ProcessingRequest()
    part = getattr(message, phase)
    flags = source.byte()
    if phase.endswith("headers"):
        for _ in range(flags & 7):
            name = NAMES[source.byte() % len(NAMES)]
            value = source.pick(VALUES)
            if flags & 0x40:
                part.headers.headers.add(key=name, value=value.decode("latin-1"))
            else:
                part.headers.headers.add(key=name, raw_value=value)
        part.end_of_stream = bool(flags & 0x80)
    elif phase.endswith("body"):
        part.body = source.pick(BODIES)
        part.end_of_stream = bool(flags & 0x80)
    else:
        part.SetInParent()
    if flags & 0x20:
        message.protocol_config.request_body_mode = source.byte() % 6  # type: ignore[assignment]
        message.protocol_config.response_body_mode = source.byte() % 6  # type: ignore[assignment]
    return phase, message.SerializeToString()


def _check(phase: str, reply: bytes) -> None:
    response = ProcessingResponse.FromString(reply)
    answered = response.WhichOneof("response")
    assert answered is not None, "a reply without an answer"
    assert (
        not phase or answered in (phase, "immediate_response") or phase == "request_body" or phase.endswith("trailers")
    ), f"{answered} answers {phase}"
    part = getattr(response, answered)
    mutation = part.headers if answered == "immediate_response" else None
    if mutation is None:
        mutation = part.header_mutation if answered.endswith("trailers") else part.response.header_mutation
    for option in mutation.set_headers:
        assert not option.header.value, "a header in `value`"
        assert not any(byte < 0x20 or byte == 0x7F for byte in option.header.raw_value), option.header


def make_player() -> Callable[[bytes], None]:
    """A function that plays one input and raises where something does not hold."""
    tables = fleet(4)
    scheduler = Scheduler(tables, "least-request", time.monotonic, Context())
    method = process_method(scheduler, MAX_BODY)
    loop = asyncio.new_event_loop()

    def play(data: bytes) -> None:
        source = _Source(data)
        setting = source.byte()
        by_log = bool(setting & 1)
        metadata = {DESTINATION_KEY: ("header", "metadata", "override-host", "?")[setting >> 1 & 3]}
        if by_log:
            metadata[ACCOUNTING_KEY] = "access-log"
        call = method.open(metadata)
        try:
            while not source.empty and not call.finished:
                phase, message = _message(source)
                answer = call.receive(message)
                reply = loop.run_until_complete(_result(answer)) if isinstance(answer, Awaitable) else answer
                for one in () if reply is None else (reply,) if isinstance(reply, bytes) else reply:
                    _check(phase, one)
        except (CallError, MessageError):
            pass
        finally:
            call.half_close()
            call.close()
        if not by_log:
            left = tables.ledger.totals(Entry.REQUESTS, 4).tolist()
            assert not any(left), f"left in flight: {left}"
        else:
            for slot in range(4):
                requests, tokens = tables.ledger.load(slot)
                tables.ledger.settle(slot, -requests, -tokens)

    return play


async def _result(answer: Awaitable[Reply]) -> Reply:
    return await answer
