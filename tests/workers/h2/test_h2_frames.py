"""The rules of RFC 9113 for a server, one by one. Section numbers are its."""

import pytest
from h2_wire import (
    ACK,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    Frame,
    Peer,
    frame,
    kinds,
    message,
    messages,
    settings,
    window_update,
)

from workers.h2.limits import TransportLimits


def connection_error(peer: Peer, got: list[Frame]) -> int:
    """The code of the GOAWAY that ends the connection, and that it does end."""
    assert got[-1].kind == GOAWAY
    assert peer.connection.done
    assert not peer.connection.streams
    assert all(call.closed == 1 for call in peer.log.calls)
    assert peer.send(peer.open(999)) == []
    return got[-1].code


def stream_error(peer: Peer, got: list[Frame], stream_id: int) -> int:
    """The code of the RST_STREAM, and that the connection lives on."""
    resets = [f for f in got if f.kind == RST_STREAM]
    assert [f.stream_id for f in resets] == [stream_id]
    assert not peer.connection.done
    assert stream_id not in peer.connection.streams
    assert messages(peer.send(peer.open(9001), peer.say(9001, b"alive")), 9001) == [b"<alive>"]
    return resets[0].code


# 3.4, 6.5: the beginning.


def test_the_server_begins_with_settings_and_acknowledges_the_clients() -> None:
    peer = Peer(TransportLimits(max_concurrent_streams=7))
    assert kinds(peer.hello) == [SETTINGS, WINDOW_UPDATE, SETTINGS]
    assert b"\0\3\0\0\0\7" in peer.hello[0].payload
    assert peer.hello[2].flags == ACK
    assert peer.connection.greeted and peer.connection.acknowledged


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX"])
def test_another_protocol_is_turned_away(start: bytes) -> None:
    peer = Peer(greet=False)
    assert connection_error(peer, peer.send(start)) == PROTOCOL_ERROR


@pytest.mark.parametrize("first", [frame(PING, 0, 0, bytes(8)), frame(SETTINGS, ACK, 0), frame(DATA, 0, 1, b"")])
def test_the_first_frame_must_be_settings(first: bytes) -> None:
    peer = Peer(greet=False)
    assert connection_error(peer, peer.send(PREFACE + first)) == PROTOCOL_ERROR


# 4.2, 5.5, 6: sizes and unknown things.


def test_unknown_frames_flags_and_settings_are_ignored() -> None:
    peer = Peer()
    sent = frame(0x77, 0xFF, 0, b"what") + frame(0x78, 0, 33, b"") + frame(SETTINGS, 0, 0, b"\x99\x99\0\0\0\1")
    assert [f.flags for f in peer.send(sent)] == [ACK]
    assert messages(peer.send(peer.open(1), frame(DATA, 0xF6 & ~PADDED, 1, message(b"a"))), 1) == [b"<a>"]


def test_the_reserved_bit_of_the_stream_id_is_ignored() -> None:
    peer = Peer()
    got = peer.send(frame(HEADERS, END_HEADERS, 1 | 1 << 31, peer.block()), frame(DATA, 0, 1 | 1 << 31, message(b"a")))
    assert messages(got, 1) == [b"<a>"]


def test_a_frame_over_the_limit_ends_the_connection_before_it_has_come() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), (16385).to_bytes(3, "big") + b"\0\0\0\0\0\1")
    assert connection_error(peer, got) == FRAME_SIZE_ERROR


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (frame(PING, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
        (frame(PING, 0, 1, bytes(8)), PROTOCOL_ERROR),
        (frame(SETTINGS, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
        (frame(SETTINGS, ACK, 0, bytes(6)), FRAME_SIZE_ERROR),
        (frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
        (settings(push=2), PROTOCOL_ERROR),
        (settings(window=1 << 31), FLOW_CONTROL_ERROR),
        (settings(frame=16383), PROTOCOL_ERROR),
        (settings(frame=1 << 24), PROTOCOL_ERROR),
        (frame(RST_STREAM, 0, 1, bytes(3)), FRAME_SIZE_ERROR),
        (frame(RST_STREAM, 0, 0, bytes(4)), PROTOCOL_ERROR),
        (frame(RST_STREAM, 0, 3, bytes(4)), PROTOCOL_ERROR),
        (frame(WINDOW_UPDATE, 0, 0, bytes(3)), FRAME_SIZE_ERROR),
        (window_update(0, 0), PROTOCOL_ERROR),
        (window_update(3, 1), PROTOCOL_ERROR),
        (frame(GOAWAY, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
        (frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL_ERROR),
        (frame(PUSH_PROMISE, 4, 1, bytes(4)), PROTOCOL_ERROR),
        (frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL_ERROR),
        (frame(CONTINUATION, END_HEADERS, 1), PROTOCOL_ERROR),
        (frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
        (frame(DATA, 0, 3, b"x"), PROTOCOL_ERROR),
        (frame(DATA, 0, 2, b"x"), PROTOCOL_ERROR),
        (frame(DATA, PADDED, 1, b"\5abcd"), PROTOCOL_ERROR),
        (frame(DATA, PADDED, 1), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS | PADDED, 3, b"\5abcd"), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS | PRIORITY_FLAG, 3, bytes(4)), FRAME_SIZE_ERROR),
        (frame(HEADERS, END_HEADERS, 2, b"\x82"), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 0, b"\x82"), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 3, b"\x80"), COMPRESSION_ERROR),
    ],
)
def test_connection_errors(broken: bytes, code: int) -> None:
    peer = Peer()
    assert connection_error(peer, peer.send(peer.open(1), broken)) == code
    assert peer.counters.protocol_errors == 1


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (frame(PRIORITY, 0, 1, bytes(4)), FRAME_SIZE_ERROR),
        (frame(PRIORITY, 0, 1, b"\0\0\0\1\0"), PROTOCOL_ERROR),
        (window_update(1, 0), PROTOCOL_ERROR),
        (window_update(1, (1 << 31) - 1), FLOW_CONTROL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, b"\x00\x01a\x01b"), PROTOCOL_ERROR),  # trailers without END_STREAM (8.1)
        (frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x82"), PROTOCOL_ERROR),  # :method in trailers
    ],
)
def test_stream_errors(broken: bytes, code: int) -> None:
    peer = Peer()
    assert stream_error(peer, peer.send(peer.open(1), broken), 1) == code
    assert peer.log.calls[0].closed == 1
    assert peer.counters.streams_reset_by_server == 1


def test_ping_is_answered_with_its_payload() -> None:
    (pong,) = Peer().send(frame(PING, 0, 0, b"12345678"))
    assert (pong.kind, pong.flags, pong.payload) == (PING, ACK, b"12345678")
    assert Peer().send(frame(PING, ACK, 0, b"12345678")) == []


def test_priority_is_accepted_on_any_stream() -> None:
    peer = Peer()
    assert peer.send(frame(PRIORITY, 0, 99, b"\0\0\0\1\x10")) == []
    assert messages(peer.send(peer.open(1), peer.say(1, b"a")), 1) == [b"<a>"]


def test_goaway_from_the_client_lets_open_streams_go_on() -> None:
    peer = Peer()
    peer.send(peer.open(1))
    assert messages(peer.send(frame(GOAWAY, 0, 0, bytes(8)), peer.say(1, b"a")), 1) == [b"<a>"]


# 4.3, 6.2, 6.10: header blocks.


def test_headers_with_padding_priority_and_continuations() -> None:
    peer = Peer()
    block = peer.block(("x-long", "v" * 50))
    first = b"\3" + b"\0\0\0\0\x10" + block[:10] + bytes(3)
    sent = frame(HEADERS, PADDED | PRIORITY_FLAG, 1, first)
    sent += frame(CONTINUATION, 0, 1, block[10:20]) + frame(CONTINUATION, END_HEADERS, 1, block[20:])
    assert messages(peer.send(sent, peer.say(1, b"a")), 1) == [b"<a>"]
    assert peer.call.metadata["x-long"] == "v" * 50


@pytest.mark.parametrize(
    "other",
    [frame(PING, 0, 0, bytes(8)), frame(DATA, 0, 1, b""), frame(CONTINUATION, 4, 3, b""), frame(0x77, 0, 0, b"")],
)
def test_nothing_may_interrupt_a_header_block(other: bytes) -> None:
    peer = Peer()
    block = peer.block()
    got = peer.send(frame(HEADERS, 0, 1, block[:5]), other, frame(CONTINUATION, END_HEADERS, 1, block[5:]))
    assert connection_error(peer, got) == PROTOCOL_ERROR


def test_a_stream_that_depends_on_itself_is_reset_and_its_block_decoded() -> None:
    peer = Peer()
    block = b"\0\0\0\1\x10" + peer.block(("x-new", "value"))
    got = peer.send(frame(HEADERS, END_HEADERS | PRIORITY_FLAG, 1, block))
    assert stream_error(peer, got, 1) == PROTOCOL_ERROR


# 5.1: states.


def test_stream_ids_must_grow() -> None:
    peer = Peer()
    assert connection_error(peer, peer.send(peer.open(5), peer.open(3))) == PROTOCOL_ERROR


def test_headers_on_a_closed_stream() -> None:
    peer = Peer()
    assert connection_error(peer, peer.send(peer.open(1, end=True), peer.open(1))) == STREAM_CLOSED


def test_data_on_a_closed_stream() -> None:
    peer = Peer()
    assert stream_error(peer, peer.send(peer.open(1, end=True), peer.say(1, b"a")), 1) == STREAM_CLOSED


def test_data_after_the_clients_end() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), peer.say(1, b"wait", end=True), peer.say(1, b"more"))
    assert stream_error(peer, got, 1) == STREAM_CLOSED


def test_headers_after_the_clients_end() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), peer.say(1, b"wait", end=True), frame(HEADERS, 5, 1, b"\x00\x01a\x01b"))
    assert stream_error(peer, got, 1) == STREAM_CLOSED


def test_frames_that_crossed_our_reset_are_ignored_but_decoded() -> None:
    peer = Peer()
    peer.send(peer.open(1), window_update(1, 0))
    late = frame(HEADERS, 5, 1, peer.encoder.encode([("x-trailer", "enters the table")]))
    assert peer.send(peer.say(1, b"late"), window_update(1, 5), frame(RST_STREAM, 0, 1, bytes(4)), late) == []
    peer.send(peer.open(3, ("x-trailer", "enters the table")))
    assert peer.call.metadata["x-trailer"] == "enters the table"


def test_window_update_and_reset_on_a_closed_stream_are_ignored() -> None:
    peer = Peer()
    peer.send(peer.open(1, end=True))
    assert peer.send(window_update(1, 5), frame(RST_STREAM, 0, 1, bytes(4))) == []


def test_streams_over_the_limit_are_refused() -> None:
    peer = Peer(TransportLimits(max_concurrent_streams=2))
    got = peer.send(peer.open(1), peer.open(3), peer.open(5))
    assert [(f.stream_id, f.code) for f in got] == [(5, REFUSED_STREAM)]
    assert peer.counters.streams_refused == 1
    assert peer.send(peer.say(5, b"did not know yet")) == []
    peer.send(peer.say(1, b"a", end=True))
    assert messages(peer.send(peer.open(7), peer.say(7, b"a")), 7) == [b"<a>"]


def test_streams_of_all_connections_together_are_bounded() -> None:
    peer = Peer(TransportLimits(max_open_streams=3))
    peer.counters.streams_open = 2  # other connections'
    got = peer.send(peer.open(1), peer.open(3))
    assert [(f.stream_id, f.code) for f in got] == [(3, REFUSED_STREAM)]


# 8: requests.


def malformed(peer: Peer, *fields: tuple[str, str], end: bool = False) -> int:
    block = peer.encoder.encode(fields)
    got = peer.send(frame(HEADERS, END_HEADERS | end, 1, block))
    assert not peer.log.calls or peer.log.calls[0].closed
    return stream_error(peer, got, 1)


GOOD = [(":method", "POST"), (":scheme", "http"), (":path", "/test/Echo"), ("content-type", "application/grpc")]


@pytest.mark.parametrize(
    "fields",
    [
        [*GOOD, ("X-Upper", "1")],
        [*GOOD, ("x y", "1")],
        [*GOOD, ("", "1")],
        [*GOOD, ("x:y", "1")],
        [*GOOD, ("x", "a\nb")],
        [*GOOD, ("x", "a\0b")],
        [*GOOD, ("x", " a")],
        [*GOOD, ("x", "a\t")],
        [*GOOD, ("connection", "close")],
        [*GOOD, ("transfer-encoding", "chunked")],
        [*GOOD, ("te", "gzip")],
        [*GOOD, (":authority", "late")],
        [*GOOD[:3], (":status", "200")],
        [*GOOD[:3], (":unknown", "x"), GOOD[3]],
        [GOOD[0], *GOOD],
        GOOD[1:],
        [GOOD[0], *GOOD[2:]],
        [*GOOD[:2], GOOD[3]],
        [*GOOD[:2], (":path", ""), GOOD[3]],
        [*GOOD, ("content-length", "-1")],
        [*GOOD, ("content-length", "1"), ("content-length", "2")],
    ],
)
def test_malformed_requests_are_reset(fields: list[tuple[str, str]]) -> None:
    assert malformed(Peer(), *fields) == PROTOCOL_ERROR


def test_content_length_without_content() -> None:
    assert malformed(Peer(), *GOOD, ("content-length", "5"), end=True) == PROTOCOL_ERROR


@pytest.mark.parametrize("length", [4, 6])
def test_content_and_content_length_must_agree(length: int) -> None:
    peer = Peer()
    got = peer.send(peer.open(1, ("content-length", str(length))), frame(DATA, END_STREAM, 1, message(b"")))
    assert stream_error(peer, got, 1) == PROTOCOL_ERROR


def test_trailers_after_less_than_content_length() -> None:
    peer = Peer()
    got = peer.send(peer.open(1, ("content-length", "9")), frame(HEADERS, 5, 1, b"\x00\x01a\x01b"))
    assert stream_error(peer, got, 1) == PROTOCOL_ERROR


def test_a_true_content_length_is_fine() -> None:
    peer = Peer()
    got = peer.send(peer.open(1, ("content-length", "6"), ("content-length", "6")), peer.say(1, b"a", end=True))
    assert messages(got, 1) == [b"<a>"]


def test_trailers_end_the_clients_side() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), peer.say(1, b"a"), frame(HEADERS, 5, 1, b"\x00\x01a\x01b"))
    assert messages(got, 1) == [b"<a>"]
    assert peer.headers(got[0]) and peer.headers(got[-1]) == {"grpc-status": "0"}


def test_too_many_headers_are_http_431_and_leave_the_connection_usable() -> None:
    peer = Peer(TransportLimits(max_header_list_bytes=1000))
    got = peer.send(peer.open(1, *((f"x-{i}", "v" * 20) for i in range(20)), end=True))
    assert peer.headers(got[0])[":status"] == "431"
    got = peer.send(peer.open(3, ("x-1", "v" * 20)), peer.say(3, b"a"))
    assert messages(got, 3) == [b"<a>"]
    assert peer.call.metadata["x-1"] == "v" * 20
