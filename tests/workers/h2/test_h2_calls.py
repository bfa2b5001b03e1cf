"""What a gRPC client sees and what a call is told, without a socket."""

import pytest
from h2_wire import (
    ACK,
    CANCEL,
    DATA,
    END_STREAM,
    HEADERS,
    NO_ERROR,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Peer,
    frame,
    kinds,
    message,
    messages,
    parse,
    window_update,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from workers.calls import CallError
from workers.h2.limits import TransportLimits


def test_a_message_is_answered_after_response_headers() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), peer.say(1, b"hello"))
    assert peer.headers(got[0]) == {":status": "200", "content-type": "application/grpc"}
    assert messages(got, 1) == [b"<hello>"]
    assert kinds(peer.send(peer.say(1, b"again"))) == [DATA]


def test_the_end_of_the_clients_side_ends_the_call_with_ok() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), peer.say(1, b"hello", end=True))
    assert kinds(got) == [HEADERS, DATA, HEADERS]
    assert peer.headers(got[2]) == {"grpc-status": "0"}
    assert got[2].flags & END_STREAM
    assert (peer.call.half_closed, peer.call.closed) == (1, 1)
    assert not peer.connection.streams


def test_a_last_reply_may_come_with_the_half_close() -> None:
    peer = Peer()
    got = peer.send(peer.open(1, ("farewell", "yes")), peer.say(1, b"a"), frame(DATA, END_STREAM, 1))
    assert messages(got, 1) == [b"<a>", b"bye"]
    assert peer.headers(got[-1]) == {"grpc-status": "0"}


def test_a_call_without_messages_ends_with_trailers_only() -> None:
    peer = Peer()
    got = peer.send(peer.open(1, end=True))
    assert kinds(got) == [HEADERS]
    assert peer.headers(got[0]) == {":status": "200", "content-type": "application/grpc", "grpc-status": "0"}


def test_metadata_has_no_pseudo_headers_and_no_binary_values() -> None:
    peer = Peer()
    peer.send(peer.open(1, ("x-a", "1"), ("x-bin", "AA=="), ("x-a", "2"), ("cookie", "a=b"), ("cookie", "c=d")))
    assert peer.call.metadata == {
        "content-type": "application/grpc",
        "te": "trailers",
        "x-a": "1, 2",
        "cookie": "a=b; c=d",
    }


def test_a_finished_call_ends_with_ok_while_the_client_could_still_send() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), peer.say(1, b"finish"))
    assert kinds(got) == [HEADERS, DATA, HEADERS]
    assert peer.headers(got[2]) == {"grpc-status": "0"}
    assert (peer.call.half_closed, peer.call.closed) == (0, 1)
    assert peer.send(frame(DATA, END_STREAM, 1)) == []
    assert not peer.connection.streams


def test_what_a_client_sends_after_the_end_is_dropped() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"finish"))
    assert peer.send(peer.say(1, b"more"), peer.say(1, b"and more", end=True)) == []
    assert peer.call.got == [b"finish"]


def test_a_client_that_keeps_an_ended_stream_open_is_told_to_stop() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"finish"))
    assert peer.later(1.0) == []
    (reset,) = peer.later(2.0)
    assert (reset.kind, reset.code) == (RST_STREAM, NO_ERROR)
    assert peer.send(peer.say(1, b"late"), peer.open(3), peer.say(3, b"hello"))[-1].stream_id == 3


def test_a_client_that_pours_into_an_ended_stream_is_told_to_stop() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"finish"))
    got = [f for _ in range(10) for f in peer.send(frame(DATA, 0, 1, bytes(16000)))]
    assert [(f.kind, f.code) for f in got if f.kind != WINDOW_UPDATE] == [(RST_STREAM, NO_ERROR)]


def test_several_replies_to_one_message_go_out_in_order() -> None:
    peer = Peer()
    assert messages(peer.send(peer.open(1), peer.say(1, b"twice")), 1) == [b"one", b"two"]


def test_no_reply_is_no_frame() -> None:
    peer = Peer()
    assert peer.send(peer.open(1), peer.say(1, b"silent")) == []
    assert messages(peer.send(peer.say(1, b"a")), 1) == [b"<a>"]


def test_a_call_error_before_any_reply_is_trailers_only_with_an_encoded_message() -> None:
    peer = Peer()
    (trailers,) = peer.send(peer.open(1), peer.say(1, b"error", end=True))
    headers = peer.headers(trailers)
    assert headers["grpc-status"] == "3"
    assert headers["grpc-message"] == "bad %25 thing%0A"
    assert peer.call.closed == 1


def test_a_call_error_after_a_reply_is_in_the_trailers() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), peer.say(1, b"a", b"error", b"never"))
    assert messages(got, 1) == [b"<a>"]
    assert peer.headers(got[0])[":status"] == "200"
    assert peer.headers(got[-1])["grpc-status"] == "3"
    assert peer.call.got == [b"a", b"error"]


def test_an_error_message_has_no_space_at_its_ends() -> None:
    peer = Peer()
    path = "/" + "p" * (1024 - len("unknown method /") - 1) + " cut"
    (trailers,) = peer.send(peer.open(1, path=path, end=True))
    assert peer.headers(trailers)["grpc-message"] == f"unknown method {path[:-4]}"


def test_opening_may_refuse() -> None:
    peer = Peer()
    (trailers,) = peer.send(peer.open(1, ("refuse", "1"), end=True))
    assert peer.headers(trailers)["grpc-status"] == "14"


def test_a_bug_in_a_call_ends_it_with_internal_and_is_told_once() -> None:
    peer = Peer()
    with capture_logs() as logs:
        for stream_id in (1, 3, 5):
            (trailers,) = peer.send(peer.open(stream_id), peer.say(stream_id, b"crash"))
            assert peer.headers(trailers)["grpc-status"] == "13"
    assert peer.counters.calls_crashed == 3
    assert [(line["event"], line["log_level"]) for line in logs] == [("a call failed unexpectedly", "error")]
    assert [call.closed for call in peer.log.calls] == [1, 1, 1]


def test_an_unknown_method_is_unimplemented() -> None:
    peer = Peer()
    (trailers,) = peer.send(peer.open(1, path="/test/Nope", end=True))
    assert peer.headers(trailers)["grpc-status"] == "12"
    assert peer.headers(trailers)[":status"] == "200"


def test_another_content_type_is_http_415() -> None:
    peer = Peer()
    block = peer.block(("content-type", "application/json"), drop=["content-type"])
    got = peer.send(frame(HEADERS, 5, 1, block))
    assert peer.headers(got[0])[":status"] == "415"
    assert got[-1].flags & END_STREAM


@pytest.mark.parametrize(
    "content_type", ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"]
)
def test_content_types_of_grpc(content_type: str) -> None:
    peer = Peer()
    block = peer.block(("content-type", content_type), drop=["content-type"])
    assert messages(peer.send(frame(HEADERS, 4, 1, block), peer.say(1, b"a")), 1) == [b"<a>"]


def test_a_get_request_is_http_405() -> None:
    peer = Peer()
    fields = [(":method", "GET"), (":scheme", "http"), (":path", "/")]
    block = peer.encoder.encode(fields)
    got = peer.send(frame(HEADERS, 5, 1, block))
    headers = peer.headers(got[0])
    assert (headers[":status"], headers["allow"]) == ("405", "POST")
    assert int(headers["content-length"]) == sum(len(f.payload) for f in got if f.kind == DATA)


def test_a_compressed_message_is_unimplemented() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), frame(DATA, 0, 1, b"\1\0\0\0\1x"))
    assert peer.headers(got[0])["grpc-status"] == "12"


@pytest.mark.parametrize("before", [b"", b"ab"])
def test_a_message_over_the_limit_is_resource_exhausted_before_it_is_read(before: bytes) -> None:
    peer = Peer(TransportLimits(max_message_bytes=100))
    data = (message(before) if before else b"") + b"\0\0\0\0\x65"
    got = peer.send(peer.open(1), frame(DATA, 0, 1, data))
    assert [peer.headers(f) for f in got if f.kind == HEADERS][-1]["grpc-status"] == "8"
    assert peer.counters.buffered_bytes == 0


def test_a_message_of_exactly_the_limit_is_taken() -> None:
    peer = Peer(TransportLimits(max_message_bytes=100))
    assert messages(peer.send(peer.open(1), peer.say(1, bytes(100))), 1) == [b"<" + bytes(100) + b">"]


def test_the_end_within_a_message_is_internal() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), frame(DATA, END_STREAM, 1, message(b"hello")[:7]))
    assert peer.headers(got[-1])["grpc-status"] == "13"
    assert peer.call.closed == 1
    assert not peer.connection.streams


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_messages_arrive_whole_however_they_are_cut(data: st.DataObject) -> None:
    bodies = data.draw(st.lists(st.binary(max_size=40).map(lambda b: b"m" + b), min_size=1, max_size=5))
    wire = b"".join(map(message, bodies))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(wire)), max_size=8)))
    pieces = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    peer = Peer()
    sent = peer.open(1)
    for piece in pieces:
        if data.draw(st.booleans()):
            padding = data.draw(st.integers(0, 5))
            sent += frame(DATA, 8, 1, bytes((padding,)) + piece + bytes(padding))
        else:
            sent += frame(DATA, 0, 1, piece)
    sent += frame(DATA, END_STREAM, 1)
    reads = sorted(data.draw(st.sets(st.integers(0, len(sent)), max_size=12)))
    got = [f for a, b in zip([0, *reads], [*reads, len(sent)], strict=True) for f in peer.send(sent[a:b])]
    assert peer.call.got == bodies
    assert messages(got, 1) == [b"<" + body + b">" for body in bodies]
    assert peer.headers(got[0])[":status"] == "200"
    assert peer.headers(got[-1]) == {"grpc-status": "0"}
    assert peer.counters.buffered_bytes == 0


def test_a_stream_read_byte_by_byte() -> None:
    peer = Peer(greet=False)
    wire = PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0) + peer.open(1) + peer.say(1, b"hello", end=True)
    got = [f for i in range(len(wire)) for f in peer.send(wire[i : i + 1])]
    assert messages(got, 1) == [b"<hello>"]


# Awaited answers.


def test_while_an_answer_is_awaited_other_streams_go_on_and_this_one_waits() -> None:
    peer = Peer()
    assert peer.send(peer.open(1), peer.say(1, b"wait", b"second")) == []
    assert peer.send(peer.say(1, b"third")) == []
    assert messages(peer.send(peer.open(3), peer.say(3, b"other")), 3) == [b"<other>"]
    assert peer.log.calls[0].got == [b"wait"]
    assert peer.counters.buffered_bytes == len(b"second" + b"third") + 2 * 64
    assert messages(peer.answer(0, b"at last"), 1) == [b"at last", b"<second>", b"<third>"]
    assert peer.wakes == 1
    assert peer.counters.buffered_bytes == 0
    assert messages(peer.send(peer.say(1, b"fourth")), 1) == [b"<fourth>"]


def test_a_second_wait_keeps_the_order() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait1", b"wait2", b"c", end=True))
    assert messages(peer.answer(0, (b"1", b"1a")), 1) == [b"1", b"1a"]
    assert peer.log.calls[0].got == [b"wait1", b"wait2"]
    got = peer.answer(1, None)
    assert messages(got, 1) == [b"<c>"]
    assert got[-1].flags & END_STREAM
    assert peer.call.closed == 1


def test_the_clients_end_waits_for_the_awaited_answer() -> None:
    peer = Peer()
    assert peer.send(peer.open(1), peer.say(1, b"wait", end=True)) == []
    assert peer.call.half_closed == 0
    got = peer.answer(0, b"done")
    assert kinds(got) == [HEADERS, DATA, HEADERS]
    assert peer.call.half_closed == 1


def test_an_awaited_reply_longer_than_a_frame_is_sent_whole_before_what_waits_is_read() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait", b"next"))
    got = peer.answer(0, (b"first", b"x" * 40_000, b"third"))
    assert messages(got, 1) == [b"first", b"x" * 40_000, b"third", b"<next>"]
    assert messages(peer.send(peer.say(1, b"last", end=True)), 1) == [b"<last>"]


@pytest.mark.parametrize("finished", [False, True])
def test_an_awaited_reply_longer_than_a_frame_is_followed_by_one_end(finished: bool) -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait", end=True))
    peer.call.finished = finished
    got = peer.answer(0, (b"x" * 20_000, b"second"))
    assert messages(got, 1) == [b"x" * 20_000, b"second"]
    assert [bool(f.flags & END_STREAM) for f in got] == [False] * 4 + [True]
    assert (peer.call.half_closed, peer.call.closed) == (not finished, 1)


def test_after_a_reply_longer_than_a_frame_a_stream_is_on_the_fast_path_again() -> None:
    peer = Peer()
    got = peer.send(peer.open(1), peer.say(1, b"long 20000"))
    assert messages(got, 1) == [b"x" * 20_000]
    assert peer.connection.streams[1].fast_path


def test_an_awaited_answer_may_be_an_error() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait"), peer.say(1, b"held"))
    (trailers,) = peer.answer(0, CallError(8, "too much"))
    assert peer.headers(trailers)["grpc-status"] == "8"
    assert peer.counters.buffered_bytes == 0


def test_a_reset_cancels_the_wait_and_closes_the_call_once() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait", b"held"))
    peer.send(frame(RST_STREAM, 0, 1, CANCEL.to_bytes(4, "big")))
    assert peer.log.pending[0].cancelled
    assert peer.call.closed == 1
    assert peer.answer(0, b"too late") == []
    assert peer.counters.buffered_bytes == 0
    assert peer.counters.streams_reset_by_client == 1


def test_held_messages_do_not_open_the_streams_window() -> None:
    peer = Peer(TransportLimits(stream_window_bytes=1000, connection_window_bytes=1 << 20))
    peer.send(peer.open(1), peer.say(1, b"wait"))
    got = peer.send(peer.say(1, bytes(400)), peer.say(1, bytes(400)))
    assert got == []
    got = peer.answer(0, None)
    assert [(f.stream_id, f.payload) for f in got if f.kind == WINDOW_UPDATE] == [(1, (9 + 810).to_bytes(4, "big"))]


# Pushes.


def test_pushed_messages_go_out_and_the_call_survives_the_half_close() -> None:
    peer = Peer()
    assert peer.send(peer.open(1, path="/test/Watch"), peer.say(1, b"silent", end=True)) == []
    call = peer.call
    assert call.push is not None
    call.push(b"news")
    call.push(b"more")
    got = parse(peer.connection.take())
    assert messages(got, 1) == [b"news", b"more"]
    assert (call.half_closed, call.closed) == (1, 0)
    assert peer.wakes == 2
    call.finished = True
    call.push(b"last")
    got = parse(peer.connection.take())
    assert messages(got, 1) == [b"last"]
    assert peer.headers(got[-1]) == {"grpc-status": "0"}
    assert call.closed == 1
    call.push(b"ignored")
    assert peer.connection.take() == b""


def test_the_half_close_is_told_once_though_a_push_waits_for_a_window_afterwards() -> None:
    peer = Peer(window=8)
    peer.send(peer.open(1, path="/test/Watch"), peer.say(1, b"silent", end=True))
    assert peer.call.push is not None
    peer.call.push(b"longer than the window")
    peer.send(window_update(1, 1000))
    assert (peer.call.half_closed, peer.call.closed) == (1, 0)


@pytest.mark.parametrize("word", [b"push and finish", b"push and crash"])
def test_a_call_that_ends_itself_by_a_push_says_nothing_afterwards(word: bytes) -> None:
    peer = Peer()
    got = peer.send(peer.open(1, path="/test/Watch"), peer.say(1, word))
    assert messages(got, 1) == [b"last"]
    assert kinds(got) == [HEADERS, DATA, HEADERS]
    assert peer.call.closed == 1


def test_a_client_that_reads_no_pushes_is_reset() -> None:
    peer = Peer(TransportLimits(max_pending_push_bytes=1000), window=100)
    peer.send(peer.open(1, path="/test/Watch"))
    call = peer.call
    assert call.push is not None
    for _ in range(20):
        call.push(bytes(100))
    assert call.closed == 1
    assert peer.connection.pending_bytes == 0
    assert peer.counters.abuse_closes == {"unread pushes": 1}


# Deadlines.


@pytest.mark.parametrize(("text", "seconds"), [("2S", 2), ("1M", 60), ("1H", 3600), ("500m", 0.5), ("5u", 5e-6)])
def test_a_deadline_ends_the_call(text: str, seconds: float) -> None:
    peer = Peer(TransportLimits(keepalive_seconds=1e9, idle_seconds=1e9))
    peer.send(peer.open(1, ("grpc-timeout", text)), peer.say(1, b"wait"))
    assert peer.connection.alarm <= peer.now + seconds
    assert peer.later(seconds * 0.9) == []
    (trailers,) = peer.later(seconds * 0.2)
    assert peer.headers(trailers)["grpc-status"] == "4"
    assert peer.log.pending[0].cancelled
    assert peer.call.closed == 1
    assert peer.counters.deadlines_exceeded == 1


def test_a_malformed_deadline_is_refused() -> None:
    peer = Peer()
    (trailers,) = peer.send(peer.open(1, ("grpc-timeout", "soon"), end=True))
    assert peer.headers(trailers)["grpc-status"] == "13"


def test_a_call_that_ends_in_time_leaves_no_deadline() -> None:
    peer = Peer()
    peer.send(peer.open(1, ("grpc-timeout", "1S")), peer.say(1, b"a", end=True))
    assert peer.later(2.0) == []
    assert peer.counters.deadlines_exceeded == 0


def finished_late(**settings: int) -> Peer:
    """A call that listens on, ended from this side while the client could still send."""
    peer = Peer(**settings)
    peer.send(peer.open(1, path="/test/Late"), peer.say(1, b"finish"))
    assert (peer.call.closed, peer.call.heard_late) == (1, [])
    return peer


def test_a_client_that_ends_its_half_after_ours_was_late() -> None:
    peer = finished_late()
    assert peer.send(frame(DATA, END_STREAM, 1)) == []
    assert peer.call.heard_late == [None]
    assert not peer.connection.streams


def test_a_client_that_resets_a_stream_has_read_its_end() -> None:
    peer = finished_late()
    peer.send(frame(RST_STREAM, 0, 1, NO_ERROR.to_bytes(4, "big")))
    assert peer.call.heard_late == []
    assert not peer.connection.streams


def test_a_call_hears_that_its_client_resets_it() -> None:
    peer = Peer()
    peer.send(peer.open(1, path="/test/Late"), peer.say(1, b"one"), frame(RST_STREAM, 0, 1, CANCEL.to_bytes(4, "big")))
    assert (peer.call.heard_late, peer.call.closed) == ([None], 1)


def test_a_call_does_not_hear_so_of_a_lost_connection() -> None:
    peer = Peer()
    peer.send(peer.open(1, path="/test/Late"), peer.say(1, b"one"))
    peer.connection.lost()
    assert (peer.call.heard_late, peer.call.closed) == ([], 1)


@pytest.mark.parametrize("end", [frame(DATA, END_STREAM, 1), frame(RST_STREAM, 0, 1, CANCEL.to_bytes(4, "big"))])
def test_a_reply_that_never_left_was_not_read(end: bytes) -> None:
    peer = finished_late(window=1)
    peer.send(end)
    peer.send(window_update(1, 1000))
    assert peer.call.heard_late == [None]
    assert not peer.connection.streams


def test_the_clients_end_may_come_while_the_last_answer_is_awaited() -> None:
    peer = Peer()
    peer.send(peer.open(1, path="/test/Late"), peer.say(1, b"wait"), frame(DATA, END_STREAM, 1))
    peer.call.finished = True
    peer.answer(0, b"late")
    assert (peer.call.closed, peer.call.heard_late) == (1, [None])


def test_an_error_is_no_reply_that_could_be_missed() -> None:
    peer = Peer()
    peer.send(peer.open(1, path="/test/Late"), peer.say(1, b"error"), frame(DATA, END_STREAM, 1))
    assert peer.call.heard_late == []


@pytest.mark.parametrize("cut", range(1, 16))
def test_messages_under_way_when_a_call_was_ended_are_heard(cut: int) -> None:
    peer = Peer()
    peer.send(peer.open(1, path="/test/Late"))
    data = message(b"one") + message(b"two")
    peer.call.idle = True
    peer.send(peer.say(1, b"now"), frame(DATA, 0, 1, data[:cut]))
    peer.connection.start_drain()
    peer.send(frame(DATA, 0, 1, data[cut:]), peer.say(1, b"crash"), peer.say(1, b"three"))
    assert peer.call.got[1:] + peer.call.heard_late == [b"one", b"two", b"three"]
    assert peer.call.closed == 1
    peer.send(frame(RST_STREAM, 0, 1, NO_ERROR.to_bytes(4, "big")))
    assert peer.counters.buffered_bytes == 0
    assert not peer.connection.streams


def test_what_is_begun_late_has_to_fit_beside_all_the_rest() -> None:
    peer = finished_late()
    peer.counters.buffered_bytes = (512 << 20) - 1000  # other connections'
    peer.send(frame(DATA, 0, 1, message(b"x" * 2000)[:1500]))
    assert peer.counters.buffered_bytes == (512 << 20) - 1000
    peer.send(frame(DATA, END_STREAM, 1, message(b"x" * 2000)[1500:]))
    assert peer.call.heard_late == []
    assert not peer.connection.streams


def test_what_was_begun_late_and_never_finished_is_given_up() -> None:
    peer = finished_late()
    peer.send(frame(DATA, 0, 1, message(b"x" * 2000)[:1500]))
    assert peer.counters.buffered_bytes
    peer.later(60)
    assert peer.counters.buffered_bytes == 0
    assert peer.call.heard_late == []
