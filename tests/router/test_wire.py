"""Reading messages where they lie gives what a protobuf parser gives, or leaves it to one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.ext_proc_pb2 import HttpHeaders, ProcessingRequest
from router import wire
from router.exchange import _plain

NAMES = st.sampled_from(
    [
        *wire.REQUEST,
        "User",
        "ROUTING-STRATEGY",
        "Content-Type",
        ":method",
        "x-request-id",
        "x-user",
        "userx",
        "cookie",
        "path",
        "a",
        "pat:h",
    ]
)
VALUES = st.text(st.characters(codec="utf-8"), max_size=200)
PHASES = ("request_headers", "request_body", "response_headers", "response_body")


def headers_message(pairs: list[tuple[str, str]], over: bool, phase: str = "request_headers") -> ProcessingRequest:
    message = ProcessingRequest()
    headers = getattr(message, phase)
    headers.headers.SetInParent()
    headers.end_of_stream = over
    for name, value in pairs:
        headers.headers.headers.add(key=name, raw_value=value.encode())
    return message


def read(message: bytes, names: wire.Names) -> tuple[dict[str, bytes], bool] | None:
    part = wire.phase_part(message)
    return None if part is None else wire.read_headers(message, part, names)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=20), st.booleans())
def test_headers_are_those_a_parser_finds(pairs: list[tuple[str, str]], over: bool) -> None:
    message = headers_message(pairs, over)
    expected = _plain(message.request_headers, wire.REQUEST_NAMES)
    assert read(message.SerializeToString(), wire.ANY_REQUEST_NAMES) == expected
    lower = headers_message([(name.lower(), value) for name, value in pairs], over)
    assert read(lower.SerializeToString(), wire.REQUEST_NAMES) == expected


@given(VALUES, VALUES)
def test_a_value_cannot_feign_a_header(before: str, after: str) -> None:
    feigned = before + "\n\x04user\x1a\x03bob" + after
    message = headers_message([("cookie", feigned), ("user", "alice")], False)
    found = read(message.SerializeToString(), wire.REQUEST_NAMES)
    assert found is not None and found[0] == {"user": b"alice"}


def test_names_count_in_any_case_and_the_last_of_several_wins() -> None:
    pairs = [("User", "ann"), ("USER", ""), ("user", "bob"), ("Routing-Strategy", "random")]
    message = headers_message(pairs, False)
    expected = ({"user": b"bob", "routing-strategy": b"random"}, False)
    assert read(message.SerializeToString(), wire.ANY_REQUEST_NAMES) == expected
    assert _plain(message.request_headers, wire.REQUEST_NAMES) == expected


def test_a_header_in_value_is_left_to_the_parser() -> None:
    message = ProcessingRequest()
    message.request_headers.headers.headers.add(key=":path", value="/v1/completions")
    assert read(message.SerializeToString(), wire.REQUEST_NAMES) is None


@given(st.binary(max_size=70_000), st.booleans(), st.sampled_from(["request_body", "response_body"]))
def test_bodies_are_those_a_parser_finds(body: bytes, over: bool, phase: str) -> None:
    message = ProcessingRequest()
    getattr(message, phase).SetInParent()
    getattr(message, phase).body = body
    getattr(message, phase).end_of_stream = over
    raw = message.SerializeToString()
    part = wire.phase_part(raw)
    assert part is not None and part[1] == len(raw)
    found = wire.read_body(raw, part)
    assert found is not None
    start, end, ended = found
    assert (raw[start:end], ended) == (body, over)


@given(st.binary(max_size=300))
def test_no_bytes_are_too_odd(junk: bytes) -> None:
    part = wire.phase_part(junk)
    if part is not None:
        wire.read_headers(junk, part, wire.REQUEST_NAMES)
        wire.read_body(junk, part)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=5), st.integers(0, 400), st.integers(0, 255))
def test_a_damaged_message_is_never_read_past_its_end(pairs: list[tuple[str, str]], place: int, byte: int) -> None:
    raw = bytearray(headers_message(pairs, False).SerializeToString())
    if place < len(raw):
        raw[place] = byte
    part = wire.phase_part(bytes(raw))
    if part is not None:
        found = wire.read_headers(bytes(raw), part, wire.REQUEST_NAMES)
        assert found is None or all(len(value) <= len(raw) for value in found[0].values())


@pytest.mark.parametrize("phase", PHASES)
def test_what_follows_the_phase_is_the_remainder(phase: str) -> None:
    message = ProcessingRequest()
    getattr(message, phase).end_of_stream = True
    alone = message.SerializeToString()
    message.protocol_config.request_body_mode = 2
    raw = message.SerializeToString()
    part = wire.phase_part(raw)
    assert part is not None
    rest = ProcessingRequest.FromString(raw[part[1] :])
    assert part[1] == len(alone)
    assert rest.WhichOneof("request") is None and rest.protocol_config.request_body_mode == 2


def test_an_empty_header_map_is_read() -> None:
    message = ProcessingRequest(request_headers=HttpHeaders(end_of_stream=True))
    assert read(message.SerializeToString(), wire.REQUEST_NAMES) is None  # no map at all: for the parser
