"""The exchange, driven with the messages that Envoy sends in each of its modes."""

import itertools
from collections.abc import Sequence
from random import Random

import fleet
import orjson
import pytest
from fleet import (
    BUFFERED,
    BUFFERED_PARTIAL,
    DUPLEX,
    NONE,
    STREAMED,
    chat,
    header_mutation,
    kinds,
    loads,
    read,
    request_body,
    request_headers,
    response_body,
    response_headers,
    set_headers,
    trailers,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from router.exchange import EnvoyPeer, Exchange, MessageError
from router.replies import DESTINATION_HEADERS, NAMESPACE
from router.scheduler import Scheduler
from router.strategies import Context
from state.ledger import Entry
from state.pods import Health
from state.tables import Tables

REQUEST_ID = b"01234567-89ab-4cde-a123-0123456789ab"
LIMIT = 100_000


class Stream:
    """One ext_proc stream over a fleet of its own, or over the one of another."""

    def __init__(
        self, accounting: str = "stream", destination: str = "header", *, tables: Tables | None = None, pods: int = 3
    ) -> None:
        self.tables = tables or fleet.make_fleet(pods)
        self.scheduler = Scheduler(
            self.tables, "least-request", itertools.count(1000, 0.001).__next__, Context(Random(1))
        )
        self.exchange = Exchange(self.scheduler, EnvoyPeer(accounting, destination), lambda: REQUEST_ID, LIMIT)

    def send(self, message: bytes) -> list[ProcessingResponse]:
        return read(self.exchange.receive(message))

    def one(self, message: bytes) -> ProcessingResponse:
        replies = self.send(message)
        assert len(replies) == 1
        return replies[0]

    def kinds(self, *messages: bytes) -> list[list[str]]:
        return [kinds(self.exchange.receive(message)) for message in messages]

    @property
    def in_flight(self) -> int:
        return sum(loads(self.tables))

    @property
    def outcomes(self) -> tuple[int, int]:
        return sum(loads(self.tables, Entry.SUCCEEDED)), sum(loads(self.tables, Entry.FAILED))


def routed_address(reply: ProcessingResponse) -> str:
    return set_headers(reply)["target-pod"]


def immediate(reply: ProcessingResponse) -> tuple[int, dict[str, object]]:
    answer = reply.immediate_response
    return answer.status.code, orjson.loads(answer.body)["error"]


# -- the modes


def test_buffered_request_and_streamed_response() -> None:
    stream = Stream()
    assert stream.kinds(
        request_headers(modes=(BUFFERED, STREAMED)), request_body(chat()), response_headers(),
        response_body(b"data: 1\n\n"), response_body(b"data: 2\n\n"), response_body(eos=True),
    ) == [["request_headers"], ["request_body"], ["response_headers"]] + [["response_body"]] * 3  # fmt: skip
    assert stream.exchange.finished
    assert stream.in_flight == 0
    assert stream.outcomes == (1, 0)


@pytest.mark.parametrize("accounting", ["stream", "access-log"])
def test_a_charge_is_given_back_once_whatever_is_refused_later(accounting: str) -> None:
    """No Envoy begins anew on the same stream; the books hold all the same."""
    stream = Stream(accounting)
    stream.send(request_headers(modes=(BUFFERED, STREAMED)))
    stream.send(request_body(chat()))
    for message in (response_headers(), response_body(eos=True)) if accounting == "stream" else ():
        stream.send(message)
    before = stream.in_flight
    assert immediate(stream.one(request_headers(eos=True)))[0] == 400
    assert stream.in_flight == before == (accounting == "access-log")
    stream.exchange.close()
    assert stream.in_flight == before


def test_a_body_in_pieces_is_routed_with_the_last() -> None:
    stream = Stream()
    stream.send(request_headers(modes=(STREAMED, NONE)))
    body = chat(text="x" * 5000)
    assert set_headers(stream.one(request_body(body[:2000], eos=False))) == {}
    assert set_headers(stream.one(request_body(body[2000:], eos=False))) == {}
    assert stream.in_flight == 0
    assert "target-pod" in set_headers(stream.one(request_body(b"")))
    assert stream.in_flight == 1


def test_an_empty_last_piece_after_one_that_is_whole() -> None:
    stream = Stream()
    stream.send(request_headers(modes=(STREAMED, NONE)))
    stream.send(request_body(chat(), eos=False))
    assert routed_address(stream.one(request_body(b"", eos=True)))


@pytest.mark.parametrize("mode", [BUFFERED, BUFFERED_PARTIAL, None])
def test_a_buffered_body_is_whole_though_trailers_follow(mode: int | None) -> None:
    """Envoy sends what it buffered once; with trailers behind it the end is not marked, and trailers may be skipped.
    Who does not say how it is set up is taken to buffer."""
    stream = Stream()
    stream.send(request_headers(modes=None if mode is None else (mode, NONE)))
    assert routed_address(stream.one(request_body(chat(), eos=False)))
    assert stream.kinds(trailers("request")) == [["request_trailers"]]


def test_a_partial_body_that_was_cut_is_refused() -> None:
    stream = Stream()
    stream.send(request_headers(modes=(BUFFERED_PARTIAL, NONE)))
    assert immediate(stream.one(request_body(chat()[:20], eos=False)))[0] == 400
    assert stream.in_flight == 0


def test_an_envoy_that_sends_no_body_is_asked_for_it() -> None:
    stream = Stream()
    reply = stream.one(request_headers(modes=(NONE, STREAMED)))
    assert reply.mode_override.request_body_mode == BUFFERED
    assert reply.mode_override.response_body_mode == STREAMED
    assert routed_address(stream.one(request_body(chat())))


def test_an_envoy_that_does_not_tell_its_mode_is_asked_for_nothing() -> None:
    assert not Stream().one(request_headers()).HasField("mode_override")


@pytest.mark.parametrize("cut", [[0], [0, 0], [5], [5, 30]])
@pytest.mark.parametrize("end_in_trailers", [False, True])
def test_full_duplex_says_nothing_before_the_whole_body_is_there(cut: list[int], end_in_trailers: bool) -> None:
    stream = Stream()
    body = chat(text="y" * 150_000 if len(cut) > 5 else "y")
    assert stream.send(request_headers(modes=(DUPLEX, DUPLEX))) == []
    places = [0, *sorted(cut), len(body)]
    pieces = [body[start:end] for start, end in itertools.pairwise(places)]
    for piece in pieces:
        assert stream.send(request_body(piece, eos=False)) == []
    replies = stream.send(trailers("request") if end_in_trailers else request_body(b"", eos=True))
    expected = ["request_headers", "request_body"] + ["request_trailers"] * end_in_trailers
    assert [reply.WhichOneof("response") for reply in replies] == expected
    assert routed_address(replies[0])
    given = [reply.request_body.response.body_mutation.streamed_response for reply in replies[1:2]]
    assert b"".join(piece.body for piece in given) == body
    assert given[-1].end_of_stream is not end_in_trailers
    assert stream.in_flight == 1


def test_full_duplex_gives_a_long_body_back_in_pieces() -> None:
    stream = Stream()
    body = chat(text="y" * 90_000)
    stream.send(request_headers(modes=(DUPLEX, NONE)))
    replies = stream.send(request_body(body))
    pieces = [reply.request_body.response.body_mutation.streamed_response for reply in replies[1:]]
    assert b"".join(piece.body for piece in pieces) == body
    assert max(len(piece.body) for piece in pieces) <= 65_536
    assert [piece.end_of_stream for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_full_duplex_without_header_messages_sends_no_reply_to_headers() -> None:
    stream = Stream()
    assert stream.send(request_body(chat()[:10], eos=False, modes=(DUPLEX, NONE))) == []
    message = ProcessingRequest()
    message.protocol_config.request_body_mode = DUPLEX
    message.request_body.body = chat()
    message.request_body.end_of_stream = True
    message.attributes["envoy.filters.http.ext_proc"].fields["request.path"].string_value = "/v1/chat/completions"
    reply = Stream().one(message.SerializeToString())
    assert reply.WhichOneof("response") == "request_body"
    assert routed_address(reply)
    assert reply.request_body.response.body_mutation.streamed_response.body == chat()


def test_full_duplex_refusals_come_instead_of_the_headers() -> None:
    stream = Stream()
    stream.send(request_headers(modes=(DUPLEX, DUPLEX)))
    assert kinds(stream.exchange.receive(request_body(b"{", eos=True))) == ["immediate_response"]
    assert stream.in_flight == 0


@pytest.mark.parametrize("mode", [DUPLEX, STREAMED])
def test_a_body_past_the_limit_is_refused_while_it_comes(mode: int) -> None:
    stream = Stream()
    stream.send(request_headers(modes=(mode, NONE)))
    replies = []
    for _ in range(3):
        replies += stream.send(request_body(b"x" * 40_000, eos=False))
    assert immediate(replies[-1])[0] == 413
    assert stream.in_flight == 0


def test_a_whole_body_past_the_limit_is_refused() -> None:
    stream = Stream()
    stream.send(request_headers(modes=(BUFFERED, NONE)))
    assert immediate(stream.one(request_body(b"x" * (LIMIT + 1))))[0] == 413


def test_full_duplex_responses_are_given_back() -> None:
    stream = Stream()
    stream.send(request_headers(modes=(DUPLEX, DUPLEX)))
    stream.send(request_body(chat()))
    assert stream.kinds(response_headers()) == [["response_headers"]]
    chunk = stream.one(response_body(b"data: 1\n\n")).response_body.response.body_mutation.streamed_response
    assert (chunk.body, chunk.end_of_stream) == (b"data: 1\n\n", False)
    assert not stream.exchange.finished
    last = stream.one(response_body(b"", eos=True)).response_body.response.body_mutation.streamed_response
    assert (last.body, last.end_of_stream) == (b"", True)
    assert stream.exchange.finished
    assert stream.in_flight == 0


def test_headers_skipped_and_the_path_in_attributes() -> None:
    message = ProcessingRequest.FromString(request_body(chat(), modes=(BUFFERED, NONE)))
    message.attributes["envoy.filters.http.ext_proc"].fields[
        "request.path"
    ].string_value = "/v1/chat/completions?api-version=1"
    reply = Stream().one(message.SerializeToString())
    assert routed_address(reply)
    assert set(header_mutation(reply).remove_headers) >= set(DESTINATION_HEADERS) - {"target-pod"}


def test_a_body_before_any_headers_has_no_path() -> None:
    stream = Stream()
    assert immediate(stream.one(request_body(chat())))[0] == 501


def test_a_request_without_a_body_passes() -> None:
    stream = Stream()
    reply = stream.one(request_headers("/v1/models", eos=True, target_pod="10.9.9.9:1", modes=(BUFFERED, STREAMED)))
    assert list(header_mutation(reply).remove_headers) == list(DESTINATION_HEADERS)
    assert not reply.HasField("mode_override")
    assert stream.kinds(response_headers(), response_body(b"x", eos=True)) == [["response_headers"], ["response_body"]]
    assert (stream.in_flight, stream.outcomes) == (0, (0, 0))


def test_an_answer_of_envoys_own_comes_before_the_body() -> None:
    """413, or an idle timeout: response messages although no request body was ever sent."""
    stream = Stream()
    stream.send(request_headers(modes=(BUFFERED, STREAMED)))
    reply = stream.one(response_headers("413"))
    assert set_headers(reply)[":status"] == "413"
    reply = stream.one(response_body(b"payload too large", eos=True))
    error = orjson.loads(reply.response_body.response.body_mutation.body)["error"]
    assert error["message"] == "payload too large"
    assert stream.exchange.finished
    assert stream.outcomes == (0, 0)


def test_response_trailers_end_the_request() -> None:
    stream = Stream()
    stream.kinds(request_headers(), request_body(chat()), response_headers())
    assert stream.kinds(trailers("response")) == [["response_trailers"]]
    assert stream.exchange.finished
    assert stream.in_flight == 0


def test_trailers_behind_a_streamed_body_get_their_own_reply_and_charge_nobody() -> None:
    """The body went to the pod as it came, so it is too late to choose one."""
    stream = Stream()
    stream.kinds(request_headers(modes=(STREAMED, NONE)), request_body(chat(), eos=False))
    assert stream.kinds(trailers("request")) == [["request_trailers"]]
    assert stream.in_flight == 0
    assert stream.exchange.idle


def test_trailers_without_a_body_in_full_duplex() -> None:
    stream = Stream()
    stream.send(request_headers(modes=(DUPLEX, NONE)))
    assert stream.kinds(trailers("request")) == [["request_headers", "request_trailers"]]


# -- what is sent


def every_reply() -> list[ProcessingResponse]:
    found: list[ProcessingResponse] = []
    for destination, accounting, mode in itertools.product(
        ("header", "metadata", "override-host"), ("stream", "access-log"), (BUFFERED, DUPLEX, NONE)
    ):
        stream = Stream(accounting, destination)
        messages = [
            request_headers(modes=(mode, STREAMED)), request_body(chat()), response_headers("503"), response_body(b"x"),
            response_body(eos=True), trailers("response"),
        ]  # fmt: skip
        for message in messages:
            found += stream.send(message)
        found += Stream(accounting, destination).send(request_headers("/v1/models", eos=True))
        refused = Stream(accounting, destination)
        found += refused.send(request_headers(modes=(mode, STREAMED)))
        found += refused.send(request_body(chat("no\x00such\nmodel")))
    return found


def test_header_values_are_sent_as_raw_bytes_alone() -> None:
    """Envoy turns `value` into an empty header."""
    for reply in every_reply():
        for option in header_mutation(reply).set_headers:
            assert option.header.value == ""
            assert option.header.raw_value != b""
            assert not set(option.header.raw_value) & set(b"\r\n\x00")


def test_the_destinations_a_client_names_are_removed_with_the_headers() -> None:
    reply = Stream().one(
        request_headers(target_pod="10.9.9.9:1", model="x", x_gateway_destination_endpoint="1.1.1.1:1")
    )
    assert set(header_mutation(reply).remove_headers) == {"target-pod", "x-gateway-destination-endpoint", "model"}
    assert reply.request_headers.response.clear_route_cache


@pytest.mark.parametrize("destination", ["header", "metadata", "override-host"])
@pytest.mark.parametrize("accounting", ["stream", "access-log"])
@pytest.mark.parametrize("mode", [BUFFERED, DUPLEX])
def test_each_destination_names_the_pod_where_envoy_looks_and_nowhere_a_client_could_have(
    destination: str, accounting: str, mode: int
) -> None:
    stream = Stream(accounting, destination, pods=1)
    stream.send(
        request_headers(modes=(mode, NONE), target_pod="10.9.9.9:1", x_gateway_destination_endpoint="1.1.1.1:1")
    )
    reply = stream.send(request_body(chat()))[0]
    headers = set_headers(reply)
    metadata = {
        space: {key: value.string_value for key, value in struct.struct_value.fields.items()}
        for space, struct in reply.dynamic_metadata.fields.items()
    }
    pod = "10.0.0.1:8000"
    if destination == "header":
        assert headers["target-pod"] == pod
    if destination == "metadata":
        assert metadata[NAMESPACE]["target"] == pod
    if destination == "override-host":
        assert (
            headers["x-gateway-destination-endpoint"] == metadata["envoy.lb"]["x-gateway-destination-endpoint"] == pod
        )
    named = {name for name in DESTINATION_HEADERS if name in headers}
    assert {headers[name] for name in named} <= {pod}
    assert set(header_mutation(reply).remove_headers) == set(DESTINATION_HEADERS) - named
    assert headers["X-Request-Id"] == REQUEST_ID.decode()
    assert headers["routing-strategy"] == "least-request"
    if accounting == "access-log":
        tokens = loads(stream.tables, Entry.TOKENS)[0]
        assert metadata[NAMESPACE]["ticket"] == f"{stream.tables.replica}.0.1.{tokens:08d}"
        assert metadata[NAMESPACE]["pod"] == "pod-0"
        assert metadata[NAMESPACE]["request-id"] == REQUEST_ID.decode()


def test_the_response_says_who_answered() -> None:
    stream = Stream(pods=1)
    stream.kinds(request_headers(), request_body(chat()))
    assert set_headers(stream.one(response_headers("201"))) == {
        "x-went-into-req-headers": "true", "request-id": REQUEST_ID.decode(), "routing-strategy": "least-request",
        "target-pod": "pod-0", "target-pod-ip": "10.0.0.1:8000", ":status": "201",
    }  # fmt: skip


def test_a_status_that_is_not_told_is_not_set() -> None:
    stream = Stream()
    stream.kinds(request_headers(), request_body(chat()))
    headers = set_headers(stream.one(response_headers("")))
    assert ":status" not in headers
    assert headers["target-pod"].startswith("pod-")
    assert stream.outcomes == (0, 0)


@pytest.mark.parametrize("status", ["20", "2000", "abc", "9" * 5000, "099", "600"])
def test_a_status_that_is_none_is_a_500(status: str) -> None:
    stream = Stream()
    stream.kinds(request_headers(), request_body(chat()))
    reply = stream.one(response_headers(status))
    assert immediate(reply) == (
        500,
        {"message": "Internal server error", "type": "api_error", "code": None, "param": None},
    )
    assert (stream.in_flight, stream.outcomes) == (0, (0, 0))


def test_header_values_may_come_in_either_field_and_the_last_of_a_repeated_one_counts() -> None:
    message = ProcessingRequest()
    headers = message.request_headers.headers.headers
    headers.add(key=":path", value="/v1/chat/completions")
    headers.add(key="routing-strategy", raw_value=b"no-such")
    headers.add(key="routing-strategy", value=" random ")
    stream = Stream()
    stream.send(message.SerializeToString())
    assert set_headers(stream.one(request_body(chat())))["routing-strategy"] == "random"


# -- refusals


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "code", "marked"),
    [
        ("/v1/chat/completions", {}, b"{", 400, None, "x-error-request-body-processing"),
        ("/v1/chat/completions", {}, b"", 400, None, "x-error-request-body-processing"),
        ("/v1/chat/completions", {}, b"\xff\xfe\x00", 400, None, "x-error-request-body-processing"),
        ("/v1/chat/completions", {}, b'{"model":"\xff"}', 400, None, "x-error-request-body-processing"),
        ("/v1/nothing", {}, chat(), 501, None, "x-error-request-body-processing"),
        ("/v1/chat/completions/", {}, chat(), 501, None, "x-error-request-body-processing"),
        ("", {}, chat(), 501, None, "x-error-request-body-processing"),
        ("/v1/chat/completions", {}, chat("other"), 400, "model_not_found", "x-error-no-model-backends"),
        ("/v1/chat/completions", {"routing_strategy": "best"}, chat(), 400, None, "x-error-routing"),
    ],
)  # fmt: skip
def test_refusals(path: str, headers: dict[str, str], body: bytes, status: int, code: str | None, marked: str) -> None:
    stream = Stream()
    stream.send(request_headers(path, **headers))
    reply = stream.one(request_body(body))
    given, error = immediate(reply)
    assert (given, error["code"]) == (status, code)
    assert marked in set_headers(reply)
    assert set_headers(reply)["Content-Type"] == "application/json"
    assert stream.in_flight == 0
    refused = {labels: value for labels, value in stream.scheduler.series.items() if labels[0] == "refused"}
    assert refused == {("refused", str(status), code or "none"): 1.0}
    # Whatever still comes gets replies of its own kind and has no effect.
    assert stream.kinds(
        request_body(chat()), trailers("request"), response_headers(str(status)), response_body(eos=True)
    ) == [["request_body"], ["request_trailers"], ["response_headers"], ["response_body"]]
    assert (stream.in_flight, stream.outcomes) == (0, (0, 0))


def test_no_pod_that_can_serve_is_503() -> None:
    stream = Stream(pods=1)
    fleet.set_row(stream.tables, 0, Health.FAILED)
    stream.send(request_headers())
    assert immediate(stream.one(request_body(chat())))[0] == 503


@pytest.mark.parametrize("value", [b"\xff\xfe", b"\xed\xa0\x80", "ü".encode("latin-1"), b"\x00", b"x" * 100_000])
@pytest.mark.parametrize("key", [":path", "content-type", "routing-strategy", "user", "traceparent"])
def test_header_bytes_of_any_kind_are_answered(key: str, value: bytes) -> None:
    message = ProcessingRequest.FromString(request_headers())
    message.request_headers.headers.headers.add(key=key, raw_value=value)
    stream = Stream()
    stream.send(message.SerializeToString())
    assert len(stream.send(request_body(chat()))) == 1


@pytest.mark.parametrize("message", [b"", b"\xff", b"\x12", b"\x0a\x00", b"\x12\x05\x0a\x03\x0a\x09x", b"\x5a\x00"])
def test_what_is_no_message_is_a_message_error(message: bytes) -> None:
    stream = Stream()
    with pytest.raises(MessageError):
        stream.exchange.receive(message)
    stream.exchange.close()


# -- charge and release


PHASES = [
    request_headers(modes=(BUFFERED, STREAMED)), request_body(chat()), response_headers(), response_body(b"x"),
    response_body(eos=True),
]  # fmt: skip


@pytest.mark.parametrize("count", range(len(PHASES) + 1))
def test_a_stream_that_ends_in_any_phase_gives_its_charge_back_once(count: int) -> None:
    stream = Stream()
    for message in PHASES[:count]:
        stream.exchange.receive(message)
    assert stream.in_flight == (1 if 2 <= count <= 4 else 0)
    stream.exchange.close()
    stream.exchange.close()
    assert loads(stream.tables) == [0] * 16
    assert loads(stream.tables, Entry.TOKENS) == [0] * 16
    assert stream.tables.ledger.forfeit(3) == 0


def test_by_access_log_the_stream_ends_with_the_decision_and_the_charge_stays() -> None:
    stream = Stream("access-log")
    stream.send(request_headers())
    assert not stream.exchange.finished
    stream.send(request_body(chat()))
    assert stream.exchange.finished
    stream.exchange.close()
    assert stream.in_flight == 1
    assert stream.tables.ledger.forfeit(3) == 0


def test_by_access_log_a_reply_that_nobody_took_charges_nobody() -> None:
    stream = Stream("access-log")
    stream.kinds(request_headers(), request_body(chat()))
    stream.exchange.close()
    stream.exchange.late(b"whatever")
    assert stream.in_flight == 1
    for _ in range(2):
        stream.exchange.late(None)
        assert stream.in_flight == 0


def test_by_stream_the_end_alone_gives_the_charge_back() -> None:
    stream = Stream("stream")
    stream.kinds(request_headers(), request_body(chat()))
    stream.exchange.close()
    stream.exchange.late(None)
    assert stream.in_flight == 0


def test_by_access_log_a_stream_that_was_refused_charges_nobody() -> None:
    stream = Stream("access-log")
    stream.kinds(request_headers(), request_body(b"{"))
    stream.exchange.close()
    assert stream.in_flight == 0


def test_by_access_log_a_full_duplex_response_still_passes_through() -> None:
    stream = Stream("access-log")
    stream.kinds(request_headers(modes=(DUPLEX, DUPLEX)), request_body(chat()))
    assert not stream.exchange.finished
    assert stream.kinds(response_headers(), response_body(b"x", eos=True)) == [["response_headers"], ["response_body"]]
    assert stream.exchange.finished


@pytest.mark.parametrize(("status", "outcomes"), [("200", (1, 0)), ("404", (1, 0)), ("500", (0, 1)), ("503", (0, 1))])
def test_the_outcome_is_counted_once(status: str, outcomes: tuple[int, int]) -> None:
    stream = Stream()
    stream.kinds(request_headers(), request_body(chat()), response_headers(status), response_headers(status))
    assert stream.outcomes == outcomes


def test_a_repeated_body_is_charged_once() -> None:
    stream = Stream()
    assert stream.kinds(request_headers(), request_body(chat()), request_body(chat()), request_headers()) == [
        ["request_headers"], ["request_body"], ["request_body"], ["request_headers"],
    ]  # fmt: skip
    assert stream.in_flight == 1


@pytest.mark.parametrize(
    "early", [response_body(eos=True), response_body(b"x"), trailers("response"), response_headers()]
)
def test_a_body_behind_the_response_charges_nobody(early: bytes) -> None:
    """Out of order, which no Envoy is; then it is too late to choose a pod."""
    stream = Stream()
    stream.kinds(request_headers(modes=(BUFFERED, STREAMED)), early)
    assert stream.kinds(request_body(chat())) == [["request_body"]]
    assert stream.in_flight == 0


def test_tokens_that_a_ticket_cannot_say_are_not_charged() -> None:
    """Each image counts 512 tokens, so a body of some megabytes can claim billions."""
    stream = Stream("access-log", pods=1)
    stream.exchange._max_body_bytes = 1 << 30
    part = b'{"type":"image_url","image_url":{"url":"u"}},'
    count = 200_000
    body = b'{"model":"llama","messages":[{"role":"user","content":[' + part * count + b'{"type":"text","text":"x"}]}]}'
    stream.send(request_headers(modes=(BUFFERED, NONE)))
    reply = stream.one(request_body(body))
    ticket = reply.dynamic_metadata.fields[NAMESPACE].struct_value.fields["ticket"].string_value
    charged = loads(stream.tables, Entry.TOKENS)[0]
    assert int(ticket.split(".")[3]) == charged == 99_999_999


# -- anything, in any order

_BODIES = st.sampled_from([chat(), chat("other"), b"", b"{", b"null", chat()[:15], chat()[15:], b"\xff"])
_MODES = st.one_of(st.none(), st.tuples(st.integers(0, 5), st.integers(0, 5)))
_MESSAGES = st.one_of(
    st.builds(
        request_headers,
        st.sampled_from(["/v1/chat/completions", "/v1/completions", "/nothing", "/v1/embeddings?x=1"]),
        eos=st.booleans(),
        modes=_MODES,
        routing_strategy=st.sampled_from(["", "random", "throughput", "least-latency", "no-such"]),
    ),
    st.builds(request_body, _BODIES, eos=st.booleans(), modes=_MODES),
    st.builds(request_body, st.just(chat()), eos=st.just(True)),
    st.builds(response_headers, st.sampled_from(["200", "500", "", "x"]), eos=st.booleans()),
    st.builds(response_body, st.binary(max_size=5), eos=st.booleans()),
    st.sampled_from([trailers("request"), trailers("response")]),
    st.binary(max_size=12),
)
_FLEET = fleet.make_fleet(3)
_SCHEDULER = Scheduler(_FLEET, "least-request", itertools.count(1000, 0.001).__next__, Context(Random(1)))


@given(
    st.lists(_MESSAGES, max_size=9),
    st.sampled_from(["header", "metadata", "override-host", "?"]),
    st.integers(0, 9),
)
def test_any_sequence_of_messages_leaves_the_ledger_at_zero(
    messages: Sequence[bytes], destination: str, cut: int
) -> None:
    exchange = Exchange(_SCHEDULER, EnvoyPeer("stream", destination), lambda: REQUEST_ID, 10_000)
    charged = 0
    for message in messages[: cut + 3]:
        try:
            read(exchange.receive(message))
        except MessageError:
            break
        assert sum(loads(_FLEET)) in (0, 1)
        charged = max(charged, sum(loads(_FLEET)))
    exchange.close()
    for entry in (Entry.REQUESTS, Entry.TOKENS, Entry.REQUESTS_HELD, Entry.TOKENS_HELD):
        assert loads(_FLEET, entry) == [0] * 16


@given(st.data(), st.sampled_from([BUFFERED, STREAMED, BUFFERED_PARTIAL, DUPLEX]), st.booleans(), st.booleans())
def test_every_message_in_a_sequence_that_envoy_may_send_gets_its_reply_in_order(
    data: st.DataObject, mode: int, with_trailers: bool, by_log: bool
) -> None:
    """Duplex replies may wait, but come in the order of their messages; else one reply a message, of its type."""
    response_mode = data.draw(st.sampled_from([NONE, STREAMED, BUFFERED, DUPLEX]))
    body = chat(text="z" * data.draw(st.integers(0, 200)))
    places = [0, *sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=3))), len(body)]
    pieces = [body[start:end] for start, end in itertools.pairwise(places)]
    if mode in (BUFFERED, BUFFERED_PARTIAL):
        pieces = [body]
    messages = [("request_headers", request_headers(modes=(mode, response_mode)))]
    messages += [("request_body", request_body(piece, eos=False)) for piece in pieces[:-1]]
    messages += [("request_body", request_body(pieces[-1], eos=not with_trailers))]
    if with_trailers:
        messages += [("request_trailers", trailers("request"))]
    messages += [("response_headers", response_headers())]
    if response_mode != NONE:
        messages += [("response_body", response_body(b"a")), ("response_body", response_body(b"", eos=True))]
    accounting = "access-log" if by_log else "stream"
    exchange = Exchange(_SCHEDULER, EnvoyPeer(accounting), lambda: REQUEST_ID, 10_000)
    given_kinds: list[str] = []
    sent_kinds: list[str] = []
    for kind, message in messages:
        if exchange.finished:
            break
        sent_kinds.append(kind)
        replies = kinds(exchange.receive(message))
        given_kinds += replies
        if mode != DUPLEX:
            assert replies == [kind]
    exchange.close()
    if by_log:
        slot = max(range(3), key=lambda slot: loads(_FLEET)[slot])
        if loads(_FLEET)[slot]:
            tokens = loads(_FLEET, Entry.TOKENS)[slot]
            _FLEET.ledger.settle(slot, -1, -tokens)
    assert loads(_FLEET) == [0] * 16

    def without_repeats(sequence: list[str]) -> list[str]:
        return [kind for kind, _ in itertools.groupby(sequence)]

    assert without_repeats(given_kinds) == without_repeats(sent_kinds)


def test_an_envoy_that_does_not_tell_its_modes_is_not_taken_for_one_that_did() -> None:
    """The later messages of the one look like the first ones of the other."""
    stream = Stream()
    stream.exchange.receive(request_headers(modes=(DUPLEX, DUPLEX)))
    stream.exchange.receive(request_body(chat()[:15], eos=False))
    other = Exchange(stream.scheduler, stream.exchange._peer, lambda: REQUEST_ID, 10_000)
    assert other.receive(request_headers())


@pytest.mark.parametrize(
    ("destination", "path", "status"),
    [
        ("override-host", "/v1/responses/resp_1", 501),
        ("override-host", "/v1/chat/completions", 400),
        ("header", "/v1/chat/completions", 400),
    ],
)
def test_what_has_no_body_reaches_no_pod(destination: str, path: str, status: int) -> None:
    """With override-host Envoy would choose one by itself."""
    stream = Stream("access-log", destination)
    assert stream.one(request_headers(path, eos=True)).immediate_response.status.code == status
    if destination == "override-host":
        stream = Stream("access-log", destination)
        stream.send(request_headers(path, modes=(BUFFERED, NONE)))
        assert stream.one(trailers("request")).immediate_response.status.code == status


def test_a_preflight_passes() -> None:
    stream = Stream("access-log", "override-host")
    reply = stream.one(request_headers(eos=True, access_control_request_method="POST"))
    assert reply.WhichOneof("response") == "request_headers"
