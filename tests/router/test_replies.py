"""Replies made from templates are what building each message anew would give."""

import itertools

import pytest
from fleet import header_mutation, read, set_headers
from hypothesis import given
from hypothesis import strategies as st

from protos.ext_proc_pb2 import ProcessingResponse
from router.replies import (
    CHUNK_BYTES,
    MAX_TOKENS,
    NAMESPACE,
    REQUEST_HEADERS,
    Destination,
    RoutedReplies,
    immediate,
    streamed_body,
    unrouted_response_headers,
)  # fmt: skip

ONE, TWO = b"0" * 36, b"\x7f" * 36


@pytest.mark.parametrize(
    ("destination", "ticket", "duplex"), list(itertools.product(Destination, [None, "3.7"], [False, True]))
)
def test_only_the_request_id_and_the_tokens_differ(destination: Destination, ticket: str | None, duplex: bool) -> None:
    made = RoutedReplies(
        name="pod", address="1.2.3.4:5", strategy="random", destination=destination, ticket=ticket, duplex=duplex
    )
    first, second = made.request_body(ONE, 0), made.request_body(TWO, MAX_TOKENS)
    replaced = first.replace(ONE, TWO).replace(b"3.7.00000000", b"3.7.99999999")
    assert second == replaced
    reply = ProcessingResponse.FromString(second)
    assert reply.WhichOneof("response") == ("request_headers" if duplex else "request_body")
    assert set_headers(reply)["X-Request-Id"] == TWO.decode()
    if ticket:
        assert reply.dynamic_metadata.fields[NAMESPACE].struct_value.fields["ticket"].string_value == "3.7.99999999"


@given(
    st.text(st.characters(max_codepoint=0xFFF, exclude_categories=["Cs"]), min_size=1, max_size=300),
    st.integers(0, MAX_TOKENS),
    st.from_regex(r"\A[1-9][0-9]{2}\Z"),
)
def test_any_pod_name_survives_the_template(name: str, tokens: int, status: str) -> None:
    made = RoutedReplies(
        name=name, address="[fd00::1]:8000", strategy="least-latency", destination=Destination.HEADER,
        ticket="1023.1", duplex=False,
    )  # fmt: skip
    fields = ProcessingResponse.FromString(made.request_body(ONE, tokens)).dynamic_metadata.fields[NAMESPACE]
    assert fields.struct_value.fields["pod"].string_value == name
    assert int(fields.struct_value.fields["ticket"].string_value.split(".")[2]) == tokens
    answer = set_headers(ProcessingResponse.FromString(made.response_headers(ONE, status.encode())))
    assert (answer["target-pod"], answer[":status"]) == (name, status)


@pytest.mark.parametrize("length", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
@pytest.mark.parametrize("end", [True, False])
def test_a_body_given_back_is_whole_and_ends_once(length: int, end: bool) -> None:
    body = bytes(i % 251 for i in range(length))
    pieces = [
        reply.response_body.response.body_mutation.streamed_response
        for reply in read(streamed_body(body, request=False, end_of_stream=end))
    ]
    assert b"".join(piece.body for piece in pieces) == body
    assert [piece.end_of_stream for piece in pieces] == [False] * (len(pieces) - 1) + [end]


def test_the_constant_reply_to_headers() -> None:
    reply = ProcessingResponse.FromString(REQUEST_HEADERS)
    assert set_headers(reply) == {"x-went-into-req-headers": "true"}
    assert reply.request_headers.response.clear_route_cache
    assert not reply.HasField("dynamic_metadata")


def test_unrouted_response_headers_repeat_the_status() -> None:
    reply = ProcessingResponse.FromString(unrouted_response_headers(ONE, b"404"))
    assert set_headers(reply)[":status"] == "404"
    assert set_headers(reply)["request-id"] == ONE.decode()


def test_immediate_answers_carry_status_headers_and_body() -> None:
    reply = ProcessingResponse.FromString(immediate(429, [("retry-after", b"1")], b"{}", "over"))
    assert reply.immediate_response.status.code == 429
    assert [option.header.key for option in header_mutation(reply).set_headers] == ["Content-Type", "retry-after"]
    assert (reply.immediate_response.body, reply.immediate_response.details) == (b"{}", "over")
