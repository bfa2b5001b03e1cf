"""The response side for Envoys that say how they are set up, and for those who need its usage."""

import asyncio
import itertools
from collections.abc import Awaitable
from typing import Any

import orjson
import pytest
from exchanges import DONE, REQUEST_ID, USAGE_CHUNK, Contract, Said, Stream, chunk, completion, response_with
from fleet import (
    BUFFERED,
    BUFFERED_PARTIAL,
    DUPLEX,
    NONE,
    STREAMED,
    chat,
    read,
    request_body,
    request_headers,
    response_body,
    trailers,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from protos.ext_proc_pb2 import ProcessingMode, ProcessingRequest
from router.limits import Answer, Ask, Gate, Outcome, Totals
from router.upstream_errors import MAX_BYTES

ERROR = b'{"object":"error","message":"no","type":"T","param":null,"code":7}'
NORMALISED = {"error": {"message": "no", "type": "T", "code": 7, "param": None}}
ANN = {"ann": (1000, 0)}


def routed(
    contract: Contract,
    mode: int,
    *,
    body: bytes | None = None,
    accounting: str = "stream",
    request_mode: int = BUFFERED,
    **headers: str,
) -> Stream:
    stream = contract.exchange(accounting)
    stream.all(request_headers(modes=(request_mode, mode), **headers))
    stream.all(request_body(chat() if body is None else body))
    return stream


# -- errors


@pytest.mark.parametrize(("mode", "cut"), [(BUFFERED, []), (STREAMED, []), (STREAMED, [1]), (STREAMED, [20, 40])])
def test_an_error_leaves_whole_and_in_one_shape_without_an_immediate_response(mode: int, cut: list[int]) -> None:
    """Behind response headers that have left already an ImmediateResponse would reset the client's stream."""
    contract = Contract()
    stream = routed(contract, mode)
    said = stream.send(response_with("400", content_type="text/plain", content_length=str(len(ERROR))))
    if mode == STREAMED:
        assert said.removed == ["content-length"]
        assert said.headers["content-type"] == "application/json"
    pieces = [ERROR[start:end] for start, end in itertools.pairwise([0, *cut, len(ERROR)])]
    for piece in pieces[:-1]:
        held = stream.send(response_body(piece))
        assert held.common.body_mutation.clear_body
    said = stream.send(response_body(pieces[-1], eos=True))
    assert orjson.loads(said.body) == NORMALISED
    assert said.headers["content-length"] == str(len(said.body))
    assert said.headers["content-type"] == "application/json"
    assert said.headers["x-error-response-unknown"] == "true"
    assert stream.finished
    assert contract.in_flight == 0
    assert contract.counted("finished") == {("pod-0", "400"): 1.0}


def test_an_end_that_is_not_marked_is_seen_by_the_length_or_the_last_brace() -> None:
    """Before trailers the last piece is not marked, and the trailers may be skipped."""
    text = b"come back later"
    for body, headers in ((ERROR, {}), (text, {"content_length": str(len(text))})):
        stream = routed(Contract(), STREAMED)
        stream.send(response_with("503", **headers))
        assert orjson.loads(stream.send(response_body(body)).body)["error"]["message"] in ("no", text.decode())
        assert stream.send(response_body(b"", eos=True)).is_plain


def test_a_content_type_that_fits_is_left_alone() -> None:
    stream = routed(Contract(), STREAMED)
    assert "content-type" not in stream.send(response_with("400", content_type="application/json; x")).headers


@pytest.mark.parametrize("body", [b"\xff\xfe\x00", b"x" * (MAX_BYTES + 10)])
def test_an_error_that_cannot_be_read_passes_as_it_is(body: bytes) -> None:
    stream = routed(Contract(), STREAMED)
    stream.send(response_with("502"))
    half = len(body) - 1
    first, second = stream.send(response_body(body[:half])), stream.send(response_body(body[half:], eos=True))
    given_back = b"" if first.common.body_mutation.clear_body else first.body or body[:half]
    assert given_back + (second.body or body[half:]) == body
    assert "content-type" not in second.headers


def test_a_compressed_error_passes_piece_by_piece() -> None:
    stream = routed(Contract(), STREAMED)
    said = stream.send(response_with("500", content_encoding="gzip", content_length="5"))
    assert (said.removed, "content-type" in said.headers) == ([], False)
    assert stream.send(response_body(b"\x1f\x8b")).is_plain
    assert stream.send(response_body(b"abc", eos=True)).is_plain


@pytest.mark.parametrize("length", [None, 100, 40_000])
def test_where_bodies_are_not_sent_a_small_error_is_asked_for(length: int | None) -> None:
    headers = {} if length is None else {"content_length": str(length)}
    stream = routed(Contract(), NONE)
    said = stream.send(response_with("500", **headers))
    assert said.message.mode_override.response_body_mode == (NONE if length == 40_000 else BUFFERED)
    assert said.message.HasField("mode_override") == (length != 40_000)
    assert said.removed == []
    assert "content-type" not in said.headers
    stream.exchange.close()
    assert stream.contract.counted("finished") == {("pod-0", "500"): 1.0}


def test_in_full_duplex_an_error_waits_and_is_then_given_instead() -> None:
    for end in (response_body(b"", eos=True), trailers("response")):
        stream = routed(Contract(), DUPLEX, request_mode=DUPLEX)
        stream.send(response_with("400"))
        text = b"come back later"
        assert stream.all(response_body(text)) == []
        replies = stream.all(end)
        bodies = [said.common.body_mutation.streamed_response.body for said in replies if said.kind == "response_body"]
        assert orjson.loads(b"".join(bodies))["error"]["message"] == "come back later"
        assert stream.finished


def test_a_part_of_a_body_is_not_waited_for() -> None:
    stream = routed(Contract(), BUFFERED_PARTIAL)
    stream.send(response_with("400"))
    assert stream.send(response_body(b'{"object":"err')).is_plain


def test_an_error_of_envoys_own_before_the_body_is_put_into_shape() -> None:
    contract = Contract()
    stream = contract.exchange()
    stream.send(request_headers(modes=(BUFFERED, STREAMED)))
    stream.send(response_with("413", content_type="text/plain"))
    said = stream.send(response_body(b"payload too large", eos=True))
    assert said.error["message"] == "payload too large"
    assert (contract.outcomes, contract.counted("finished")) == ((0, 0), {})


@pytest.mark.parametrize(("mode", "idle"), [(STREAMED, True), (DUPLEX, False)])
def test_a_draining_process_waits_for_what_it_holds_back(mode: int, idle: bool) -> None:
    stream = routed(Contract(), mode)
    assert stream.exchange.idle is idle
    stream.all(response_with("400"))
    stream.all(response_body(b"one of "))
    assert not stream.exchange.idle
    stream.all(response_body(b"two", eos=True))
    assert stream.exchange.idle


# -- the cheapest mode


def test_nobody_needs_the_chunks() -> None:
    stream = routed(Contract(), STREAMED, body=chat(stream=True))
    said = stream.send(response_with(content_type="text/event-stream"))
    assert said.message.HasField("mode_override")
    assert said.message.mode_override == ProcessingMode()
    assert stream.send(response_body(USAGE_CHUNK)).is_plain  # an Envoy that allows no override
    assert not stream.finished
    stream.send(response_body(DONE, eos=True))
    assert stream.finished


@pytest.mark.parametrize(
    ("mode", "content_type", "length", "asked"),
    [
        (NONE, "text/event-stream", None, STREAMED),
        (NONE, "application/json", "900", BUFFERED),
        (NONE, "application/json", "90000", STREAMED),
        (NONE, "application/json", None, STREAMED),
        (STREAMED, "text/event-stream", None, None),
        (STREAMED, "application/json", "900", BUFFERED),
        (STREAMED, "application/json", None, None),
        (BUFFERED, "application/json", "900", None),
        (DUPLEX, "application/json", "900", None),
    ],
)
def test_how_the_body_of_a_limited_user_is_asked_for(
    mode: int, content_type: str, length: str | None, asked: int | None
) -> None:
    headers = {"content_type": content_type} | ({} if length is None else {"content_length": length})
    stream = routed(Contract(users=ANN), mode, user="ann")
    said = stream.send(response_with(**headers))
    assert said.message.HasField("mode_override") == (asked is not None)
    if asked is not None:
        assert said.message.mode_override.response_body_mode == asked


def test_by_access_log_the_response_of_a_limited_user_is_asked_for() -> None:
    contract = Contract(users=ANN)
    stream = contract.exchange("access-log")
    said = stream.send(request_headers(modes=(BUFFERED, NONE), user="ann"))
    override = said.message.mode_override
    assert (override.request_body_mode, override.response_header_mode) == (BUFFERED, ProcessingMode.SEND)
    assert set(said.removed) == {"target-pod", "x-gateway-destination-endpoint", "model"}
    stream.send(request_body(chat()))
    assert not stream.finished
    stream.send(response_with(content_type="application/json", content_length="200"))
    said = stream.send(response_body(completion(), eos=True))
    assert said.headers["x-update-tpm"] == "12"
    assert stream.finished
    stream.exchange.close()
    assert contract.in_flight == 1, "the log gives it back"
    assert contract.outcomes == (0, 0), "and counts the outcome"
    assert contract.counted("finished") == {}


def test_by_access_log_nobody_else_is_watched() -> None:
    contract = Contract(users=ANN)
    stream = contract.exchange("access-log")
    assert not stream.send(request_headers(modes=(BUFFERED, NONE))).message.HasField("mode_override")
    stream.send(request_body(chat()))
    assert stream.finished


def test_usage_metrics_are_counted_for_everybody() -> None:
    contract = Contract(usage_metrics=True)
    stream = routed(contract, STREAMED)
    stream.send(response_with())
    stream.send(response_body(completion(), eos=True))
    assert contract.counted("used_tokens") == {("llama", "prompt"): 5.0, ("llama", "completion"): 7.0}


def test_usage_metrics_are_counted_by_access_log_too() -> None:
    """Where there are no users, nobody is asked who they are: their responses are watched all the same."""
    contract = Contract(usage_metrics=True)
    stream = contract.exchange("access-log")
    said = stream.send(request_headers(modes=(BUFFERED, NONE)))
    assert said.message.mode_override.response_header_mode == ProcessingMode.SEND
    stream.send(request_body(chat()))
    stream.send(response_with(content_type="application/json", content_length="200"))
    stream.send(response_body(completion(), eos=True))
    assert contract.counted("used_tokens") == {("llama", "prompt"): 5.0, ("llama", "completion"): 7.0}


# -- usage


def used(events: bytes, cut: list[int], *, body: bytes, path: str = "/v1/chat/completions") -> int:
    """Tokens charged to Ann for an answer that came in these pieces."""
    contract = Contract(users=ANN)
    stream = contract.exchange()
    stream.all(request_headers(path, modes=(BUFFERED, STREAMED), user="ann"))
    stream.all(request_body(body))
    stream.send(response_with(content_type="text/event-stream"))
    places = [0, *sorted(cut), len(events)]
    for start, end in itertools.pairwise(places):
        assert not stream.send(response_body(events[start:end])).common.HasField("body_mutation")
        if stream.finished:
            break
    else:
        stream.send(response_body(b"", eos=True))
    assert stream.finished
    assert contract.in_flight == 0
    requests, tokens = contract.tables.user_minutes.add_tokens("ann", next(contract.clock), 0)
    assert requests == 1
    return tokens


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


FINAL = chunk() + chunk(choices=[{"index": 0, "delta": {"content": '"usage" é'}}]) + USAGE_CHUNK + DONE
GROWING = b"".join(
    chunk(usage={"prompt_tokens": 5, "completion_tokens": n, "total_tokens": 5 + n}) for n in range(1, 8)
) + DONE  # fmt: skip
MESSAGES = (
    event({"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}})
    + event({"type": "content_block_delta", "delta": {"text": '"usage"'}})
    + event({"type": "message_delta", "usage": {"output_tokens": 7}})
    + event({"type": "message_stop"})
)
CONTINUOUS = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})


@pytest.mark.parametrize(
    ("events", "body", "path"),
    [
        (FINAL, chat(stream=True), "/v1/chat/completions"),
        (GROWING, CONTINUOUS, "/v1/chat/completions"),
        (MESSAGES, chat(stream=True, max_tokens=5), "/v1/messages"),
    ],
)
def test_a_stream_cut_anywhere_is_charged_the_same(events: bytes, body: bytes, path: str) -> None:
    for place in range(len(events) + 1):
        assert used(events, [place], body=body, path=path) == 12


@given(st.lists(st.integers(0, len(FINAL)), max_size=8))
def test_a_stream_cut_in_many_pieces_is_charged_the_same(cut: list[int]) -> None:
    assert used(FINAL, cut, body=chat(stream=True)) == 12


def test_several_choices_that_finish_one_after_another() -> None:
    one = chunk(
        choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}],
        usage={"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    )
    body = chat(stream=True, n=2, stream_options={"continuous_usage_stats": True})
    assert used(one + USAGE_CHUNK + DONE, [len(one)], body=body) == 12


def charged(contract: Contract) -> int:
    """Tokens charged to Ann so far."""
    return contract.tables.user_minutes.add_tokens("ann", next(contract.clock), 0)[1]


LONG = chat(text="word " * 400, stream=True)
LONG_TOKENS = len(LONG) // 4


@pytest.mark.parametrize("cut", [[], [10], [100, 101]])
def test_a_stream_that_does_not_tell_its_usage_is_charged_by_estimate(cut: list[int]) -> None:
    """The prompt, as it was charged to the pod, and an event for each token."""
    body = orjson.dumps({"model": "llama", "prompt": "word " * 400, "stream": True})
    tokens = used(chunk() * 3 + DONE, cut, body=body, path="/v1/completions")
    assert len(body) // 4 + 3 <= tokens <= len(body) // 4 + 4


def test_a_client_that_leaves_before_the_usage_is_charged_by_estimate() -> None:
    contract = Contract(users=ANN)
    stream = routed(contract, STREAMED, body=LONG, user="ann")
    stream.send(response_with(content_type="text/event-stream"))
    stream.send(response_body(chunk() * 7))
    for _ in range(2):
        stream.exchange.close()
    assert charged(contract) == LONG_TOKENS + 7


@pytest.mark.parametrize(("accounting", "heeded"), [("stream", False), ("access-log", True), ("access-log", False)])
def test_a_client_that_leaves_before_the_response_is_charged_its_prompt(accounting: str, heeded: bool) -> None:
    """And so is one whose response was not shown."""
    contract = Contract(users=ANN)
    stream = routed(contract, NONE, body=LONG, accounting=accounting, user="ann")
    if heeded:
        stream.exchange._peer.has_shown()
    stream.exchange.late(None)
    stream.exchange.close()
    assert charged(contract) == LONG_TOKENS
    assert contract.in_flight == (accounting == "access-log" and not heeded), "the log gives it back"


def test_a_client_that_leaves_after_the_usage_is_charged_that() -> None:
    contract = Contract(users=ANN)
    stream = routed(contract, STREAMED, body=LONG, user="ann")
    stream.send(response_with(content_type="text/event-stream"))
    stream.send(response_body(USAGE_CHUNK))
    stream.exchange.close()
    assert charged(contract) == 12


def test_a_compressed_answer_is_charged_by_estimate() -> None:
    contract = Contract(users=ANN)
    stream = routed(contract, STREAMED, body=LONG, user="ann")
    stream.send(response_with(content_type="text/event-stream", content_encoding="gzip"))
    stream.send(response_body(b"\x1f\x8b", eos=True))
    assert charged(contract) == LONG_TOKENS


def test_a_reply_too_long_to_parse_tells_its_usage_at_its_end() -> None:
    contract = Contract(users=ANN)
    stream = routed(contract, STREAMED, user="ann")
    stream.send(response_with(content_type="application/json"))
    body = b'{"model":"m","data":["' + b"x" * (3 << 20) + b'"],"usage":{"prompt_tokens":12,"total_tokens":12}}'
    for start in range(0, len(body), 50_000):
        assert stream.send(response_body(body[start : start + 50_000])).is_plain
    said = stream.send(response_body(b"", eos=True))
    assert said.headers["x-update-tpm"] == "12"
    assert len(stream.exchange._response._json_body or b"") == 0  # type: ignore[union-attr]


# -- counters that must be waited for


class Slow:
    """Counters that answer later, as those in Redis do."""

    has_users = True

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Ask] = []
        self.given_back: list[tuple[str, int]] = []

    async def ask(self, ask: Ask) -> Answer:
        self.asked.append(ask)
        await asyncio.sleep(0)
        return self.answer

    async def add_tokens(self, user: str, tokens: int) -> Totals | None:
        await asyncio.sleep(0)
        return Totals(3, tokens)

    def give_back_model(self, model: str, window: int) -> None:
        self.given_back.append((model, window))


def slow(contract: Contract, outcome: Outcome = Outcome.ADMITTED) -> Slow:
    counters = Slow(Answer(outcome, "ann", 5, 7, model_window=9))
    contract.policy.gate = Gate(counters, contract.scheduler.series)
    return counters


async def said_later(stream: Stream, message: bytes) -> Said:
    reply = stream.exchange.receive(message)
    assert isinstance(reply, Awaitable)
    (one,) = read(await reply)
    return Said(one)


async def test_a_whole_life_over_counters_that_answer_later() -> None:
    contract = Contract()
    slow(contract)
    stream = contract.exchange()
    assert (await said_later(stream, request_headers(user="ann"))).kind == "request_headers"
    stream.send(request_body(chat()))
    stream.send(response_with())
    said = await said_later(stream, response_body(completion(), eos=True))
    assert said.headers == {"x-update-rpm": "3", "x-update-tpm": "12", "request-id": REQUEST_ID}
    assert stream.finished
    assert contract.in_flight == 0
    assert contract.counted("finished") == {("pod-0", "200"): 1.0}


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome.OVER_RPM, 429), (Outcome.UNKNOWN_USER, 401), (Outcome.WRONG_KEY, 401), (Outcome.BROKEN_RECORD, 500)],
)
async def test_a_refusal_that_comes_later(outcome: Outcome, status: int) -> None:
    contract = Contract()
    slow(contract, outcome)
    stream = contract.exchange()
    assert (await said_later(stream, request_headers(user="ann"))).status == status
    assert [labels[0] for labels in contract.counted("refused")] == [str(status)]
    assert stream.send(request_body(chat())).kind == "request_body"
    assert contract.in_flight == 0


async def test_a_models_limit_that_answers_later_and_is_given_back() -> None:
    config = {"profiles": {"default": {"requestsPerSecond": 5}}}
    contract = Contract(settings={"llama": config})
    counters = slow(contract)
    stream = contract.exchange()
    stream.send(request_headers(external_filter="x=y"))
    assert (await said_later(stream, request_body(chat()))).status == 503
    assert counters.given_back == [("llama", 9)]


async def test_a_stream_that_ends_while_it_waits_charges_nobody() -> None:
    config = {"profiles": {"default": {"requestsPerSecond": 5}}}
    contract = Contract(settings={"llama": config})
    slow(contract)
    stream = contract.exchange()
    stream.send(request_headers())
    waiting = stream.exchange.receive(request_body(chat()))
    stream.exchange.close()
    assert isinstance(waiting, Awaitable)
    assert await waiting is None
    assert contract.in_flight == 0


# -- other things of a response


def test_a_draining_process_counts_no_client_as_gone() -> None:
    contract = Contract()
    stream = routed(contract, STREAMED)
    contract.policy.draining = True
    stream.exchange.close()
    assert (contract.in_flight, contract.counted("finished")) == (0, {})


def test_extra_headers_by_access_log_go_through_metadata() -> None:
    stream = routed(Contract(2, explain=True), NONE, accounting="access-log", routing_strategy="session-affinity")
    assert stream.finished
    explained = Contract(2, explain=True).exchange("access-log")
    explained.all(request_headers(modes=(BUFFERED, NONE), x_pointsman_explain="1"))
    (said,) = explained.all(request_body(chat()))
    fields = said.message.dynamic_metadata.fields
    receipt = orjson.loads(fields["pointsman-response"].struct_value.fields["x-pointsman-decision"].string_value)
    assert {row["pod"] for row in receipt["candidates"]} == {"pod-0", "pod-1"}
    assert fields["pointsman"].struct_value.fields["ticket"].string_value


def test_receipts_only_where_they_are_allowed() -> None:
    for value in ("1", "only"):
        stream = Contract().routed(x_pointsman_explain=value)
        assert stream.last.kind == "request_body"
        assert "x-pointsman-decision" not in stream.send(response_with()).headers


def test_a_receipt_alone_decides_nothing() -> None:
    contract = Contract(3, explain=True)
    said = contract.routed(x_pointsman_explain="only", routing_strategy="prefix-cache").last
    assert said.status == 200
    assert orjson.loads(said.message.immediate_response.body)["of"] == 3
    assert contract.in_flight == 0
    assert contract.counted("decisions") == {}


def test_retries_get_the_next_best_pods() -> None:
    contract = Contract(4, strategy="least-request")
    loads = [5, 0, 3, 1]
    for slot, count in enumerate(loads):
        for _ in range(count):
            contract.tables.ledger.charge(slot, 1, 1, held=True)
    stream = contract.exchange(destination="override-host")
    stream.send(request_headers(modes=(BUFFERED, NONE)))
    said = stream.send(request_body(chat()))
    order = "10.0.0.2:8000,10.0.0.4:8000,10.0.0.3:8000"
    assert said.headers["x-gateway-destination-endpoint"] == order
    metadata = said.message.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    assert metadata["x-gateway-destination-endpoint"].string_value == order


# -- whatever a client sends

_HEADER_NAMES = st.sampled_from(
    ["user", "authorization", "external-filter", "config-profile", "x-session-id", "x-aibrix-session-key",
     "routing-strategy", "content-type", ":path", "x-pointsman-explain"]
)  # fmt: skip
_VALUES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"auto", b"default", b"1", b"only", b"least-request:3\n,prefix-cache", b"session-affinity,least-request:2",
         b"Bearer pm-", b"zone in (a", b"a" * 5000, b"ann", b"least-request\x85:1,prefix-cache"]
    ),
)  # fmt: skip
_ROUTER = Contract(
    3,
    explain=True,
    users=ANN,
    settings={"llama": {"profiles": {"default": {"routingStrategy": "random"}, "b": {"requestsPerSecond": 1000}}}},
)


@given(
    st.lists(st.tuples(_HEADER_NAMES, _VALUES), max_size=6),
    st.one_of(st.binary(max_size=60), st.builds(lambda text: chat(text=text), st.text(max_size=20)), st.just(chat())),
    st.sampled_from([None, (BUFFERED, STREAMED), (BUFFERED, NONE), (DUPLEX, DUPLEX)]),
    st.sampled_from(["stream", "access-log"]),
)
def test_no_header_and_no_body_does_harm(
    headers: list[tuple[str, bytes]], body: bytes, modes: tuple[int, int] | None, accounting: str
) -> None:
    message = ProcessingRequest.FromString(request_headers(modes=modes))
    for key, value in headers:
        message.request_headers.headers.headers.add(key=key, raw_value=value)
    stream = _ROUTER.exchange(accounting)
    said = stream.all(message.SerializeToString())
    said += stream.all(request_body(body))
    said += stream.all(response_with(content_type="text/event-stream"))
    said += stream.all(response_body(USAGE_CHUNK, eos=True))
    stream.exchange.close()
    for each in said:
        for name, text in each.headers.items():
            assert not set(text) & set("\r\n\x00"), name
    for slot in range(3):
        requests, tokens = _ROUTER.tables.ledger.load(slot)
        if accounting == "access-log":
            _ROUTER.tables.ledger.settle(slot, -requests, -tokens)
        else:
            assert requests == 0
    assert len(list(_ROUTER.scheduler.series.items())) < 100, "labels are bounded"
    assert len(_ROUTER.scheduler._strategies._combined) <= 256


# -- what it costs (pytest tests/router/test_responses.py --benchmark-enable)


@pytest.mark.parametrize("user", ["", "ann"])
def test_cost_of_a_chunk(benchmark: Any, user: str) -> None:
    """Nobody's, and one whose usage is read."""
    stream = routed(Contract(users=ANN), STREAMED, body=chat(stream=True), user=user)
    stream.send(response_with(content_type="text/event-stream"))
    message = response_body(chunk())
    stream.send(message)
    assert benchmark(stream.exchange.receive, message)


@pytest.mark.parametrize("status", ["200", "400"])
def test_cost_of_response_headers(benchmark: Any, status: str) -> None:
    """A good one, and one whose body will be held back."""
    contract = Contract()
    stream = routed(contract, STREAMED)
    message = response_with(status, content_type="application/json", content_length="100")

    def headers() -> None:
        stream.exchange._response = None
        stream.exchange.receive(message)

    benchmark(headers)


def test_usage_is_counted_though_trailers_follow() -> None:
    contract = Contract(usage_metrics=True)
    stream = routed(contract, STREAMED)
    stream.send(response_with())
    stream.send(response_body(completion(), eos=False))
    assert contract.counted("used_tokens") == {}
    stream.send(trailers("response"))
    assert contract.counted("used_tokens") == {("llama", "prompt"): 5.0, ("llama", "completion"): 7.0}


def test_a_buffered_error_is_whole_though_trailers_follow() -> None:
    stream = routed(Contract(), BUFFERED)
    stream.send(response_with("503", content_type="text/plain"))
    said = stream.send(response_body(b"the engine is full", eos=False))
    assert orjson.loads(said.body)["error"]["message"] == "the engine is full"
    assert stream.send(trailers("response")).kind == "response_trailers"


def test_by_access_log_a_limited_user_is_watched_though_envoy_chooses_the_pod() -> None:
    contract = Contract(strategy="", users=ANN)
    stream = routed(contract, NONE, accounting="access-log", user="ann")
    assert not stream.finished
    stream.send(response_with(content_type="application/json", content_length="200"))
    assert stream.send(response_body(completion(), eos=True)).headers["x-update-tpm"] == "12"


def test_a_receipt_alone_takes_none_of_the_models_requests_per_second() -> None:
    contract = Contract(1, explain=True, settings={"llama": {"profiles": {"default": {"requestsPerSecond": 2}}}})
    for _ in range(5):
        assert contract.routed(x_pointsman_explain="only").last.status == 200
    assert [contract.routed().last.kind for _ in range(2)] == ["request_body"] * 2
    assert contract.routed().last.status == 429
