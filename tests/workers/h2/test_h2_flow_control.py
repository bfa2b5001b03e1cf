"""Both flow-control windows in both directions (RFC 9113 5.2, 6.9)."""

import pytest
from h2_wire import (
    DATA,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    GOAWAY,
    HEADERS,
    RST_STREAM,
    WINDOW_UPDATE,
    Frame,
    Peer,
    frame,
    kinds,
    messages,
    parse,
    settings,
    window_update,
)
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from workers.h2.limits import TransportLimits


def data_bytes(frames: list[Frame], stream_id: int) -> int:
    return sum(len(f.payload) for f in frames if f.kind == DATA and f.stream_id == stream_id)


def test_a_reply_waits_for_the_streams_window() -> None:
    peer = Peer(window=8)
    got = peer.send(peer.open(1), peer.say(1, b"0123456789"))
    assert data_bytes(got, 1) == 8
    got += peer.send(window_update(1, 3))
    assert data_bytes(got, 1) == 11
    got += peer.send(window_update(1, 100))
    assert messages(got, 1) == [b"<0123456789>"]
    assert peer.connection.pending_bytes == 0


def test_a_reply_arrives_whole_through_a_window_of_one_byte() -> None:
    peer = Peer(window=1)
    got = peer.send(peer.open(1), peer.say(1, b"abc", end=True))
    for _ in range(9):
        got += peer.send(window_update(1, 1))
    assert messages(got, 1) == [b"<abc>"]
    assert all(len(f.payload) == 1 for f in got if f.kind == DATA)
    assert peer.headers(got[0]) and peer.headers(got[-1]) == {"grpc-status": "0"}
    assert not peer.connection.streams


def test_messages_wait_while_the_reply_to_an_earlier_one_is_blocked() -> None:
    peer = Peer(window=5)
    peer.send(peer.open(1), peer.say(1, b"first", b"second"))
    assert peer.call.got == [b"first"]
    got = peer.send(window_update(1, 1000))
    assert peer.call.got == [b"first", b"second"]
    assert messages(peer.send(peer.say(1, b"third")), 1) == [b"<third>"]
    assert [f.stream_id for f in got if f.kind == DATA] == [1, 1]


def test_the_connections_window_is_shared_and_served_in_turn() -> None:
    peer = Peer()
    got = peer.send(*(peer.open(i) + peer.say(i, b"long 40000") for i in (1, 3)))
    assert data_bytes(got, 1) + data_bytes(got, 3) == 65535
    got += peer.send(window_update(0, 100_000))
    assert messages(got, 1) == messages(got, 3) == [b"x" * 40000]


def test_shrinking_the_initial_window_may_make_windows_negative() -> None:
    peer = Peer(window=1000)
    peer.send(peer.open(1), peer.say(1, b"long 900"))
    peer.send(settings(window=100))
    assert peer.connection.streams[1].send_window == 1000 - 905 - 900
    assert peer.send(peer.say(1, b"a")) == []
    assert peer.send(window_update(1, 805)) == []
    assert data_bytes(peer.send(window_update(1, 1)), 1) == 1
    assert data_bytes(peer.send(settings(window=200)), 1) == 7


def test_a_larger_initial_window_lets_blocked_streams_go_on() -> None:
    peer = Peer(window=0)
    got = peer.send(*(peer.open(i) + peer.say(i, b"a", end=True) for i in (1, 3, 5)))
    assert kinds(got) == [HEADERS] * 3
    got = peer.send(settings(window=8))
    assert [f.stream_id for f in got if f.kind == DATA] == [1, 3, 5]
    assert not peer.connection.streams


def test_a_smaller_connection_window_than_a_streams() -> None:
    peer = Peer(window=1 << 20)
    got = peer.send(peer.open(1), peer.say(1, b"long 70000"))
    assert data_bytes(got, 1) == 65535
    assert data_bytes(peer.send(window_update(1, 10)), 1) == 0
    assert data_bytes(peer.send(window_update(0, 10)), 1) == 10


def test_frames_keep_to_the_clients_max_frame_size() -> None:
    peer = Peer(window=1 << 20)
    peer.send(window_update(0, 1 << 20))
    got = peer.send(peer.open(1), peer.say(1, b"long 50000"))
    assert max(len(f.payload) for f in got) == 16384
    peer.send(settings(frame=40000))
    got = peer.send(peer.say(1, b"long 50000"))
    assert [len(f.payload) for f in got] == [40000, 10005]


@pytest.mark.parametrize("overflow", [window_update(0, (1 << 31) - 1), settings(window=(1 << 31) - 1)])
def test_windows_may_not_pass_their_maximum(overflow: bytes) -> None:
    peer = Peer()
    got = peer.send(peer.open(1), window_update(1, 10), window_update(0, 10), overflow)
    assert (got[-1].kind, got[-1].code) == (GOAWAY, FLOW_CONTROL_ERROR)


def test_trailers_wait_for_the_data_before_them() -> None:
    peer = Peer(window=4)
    got = peer.send(peer.open(1), peer.say(1, b"finish"))
    assert kinds(got) == [HEADERS, DATA]
    assert peer.call.closed == 1
    assert kinds(peer.send(window_update(1, 100))) == [DATA, HEADERS]


def test_a_reset_gives_back_what_was_pending() -> None:
    peer = Peer(window=4)
    peer.send(peer.open(1), peer.say(1, b"long 1000"))
    assert peer.connection.pending_bytes == 1001
    peer.send(frame(RST_STREAM, 0, 1, bytes(4)))
    assert peer.connection.pending_bytes == 0
    assert not peer.connection.blocked


# Receiving.


def test_both_receive_windows_are_opened_again_half_way() -> None:
    peer = Peer(TransportLimits(stream_window_bytes=10_000, connection_window_bytes=100_000))
    peer.send(peer.open(1))
    got = [f for _ in range(6) for f in peer.send(peer.say(1, bytes(9_000)))]
    updates = sorted((f.stream_id, int.from_bytes(f.payload, "big")) for f in got if f.kind == WINDOW_UPDATE)
    assert updates == [(0, 54_030)] + [(1, 9_005)] * 6


def test_a_client_that_overruns_a_streams_window_is_reset() -> None:
    peer = Peer(TransportLimits(stream_window_bytes=10_000))
    peer.send(peer.open(1), peer.say(1, b"wait"))
    got = peer.send(peer.say(1, bytes(6_000)), peer.say(1, bytes(6_000)))
    assert [(f.stream_id, f.code) for f in got] == [(1, FLOW_CONTROL_ERROR)]
    assert peer.counters.buffered_bytes == 0


def test_a_client_that_overruns_the_connections_window_is_sent_away() -> None:
    peer = Peer(TransportLimits(connection_window_bytes=65_535))
    got = peer.send(peer.open(1), peer.say(1, b"wait"), *(peer.say(1, bytes(16_000)) for _ in range(5)))
    assert (got[-1].kind, got[-1].code) == (GOAWAY, FLOW_CONTROL_ERROR)


def test_a_message_larger_than_the_window_is_received() -> None:
    peer = Peer(TransportLimits(stream_window_bytes=20_000, connection_window_bytes=65_535))
    wire = b"\0" + (200_000).to_bytes(4, "big") + bytes(200_000)
    got = peer.send(peer.open(1))
    room = 20_000
    while wire:
        size = min(room, 10_000, len(wire))
        assert size, "the window stayed closed"
        got = peer.send(frame(DATA, 0, 1, wire[:size]))
        wire = wire[size:]
        room -= size
        room += sum(int.from_bytes(f.payload, "big") for f in got if f.kind == WINDOW_UPDATE and f.stream_id == 1)
    assert [len(m) for m in peer.call.got] == [200_000]
    assert peer.counters.buffered_bytes == peer.connection.pending_bytes  # of the reply


# Readers that do not read.


def test_a_reply_that_nobody_reads_is_given_up() -> None:
    peer = Peer(TransportLimits(stall_seconds=5), window=4)
    peer.send(peer.open(1), peer.say(1, b"long 1000"))
    assert peer.later(4) == []
    (reset,) = peer.later(2)
    assert (reset.stream_id, reset.code) == (1, ENHANCE_YOUR_CALM)
    assert peer.counters.abuse_closes == {"unread reply": 1}
    assert peer.call.closed == 1


def test_replies_that_wait_are_bounded_for_all_connections_together() -> None:
    peer = Peer(TransportLimits(max_buffered_bytes=50_000), window=0)
    peer.counters.buffered_bytes = 30_000  # other connections'
    assert kinds(peer.send(peer.open(1), peer.say(1, b"long 15000"))) == [HEADERS]
    got = peer.send(peer.open(3), peer.say(3, b"long 15000", b"more", end=True))
    assert [(f.stream_id, f.code) for f in got if f.kind == RST_STREAM] == [(3, ENHANCE_YOUR_CALM)]
    assert peer.counters.abuse_closes == {"unread reply": 1}
    assert (peer.call.got, peer.call.closed) == ([b"long 15000"], 1)
    assert messages(peer.send(window_update(1, 20_000)), 1) == [b"x" * 15_000]
    assert peer.counters.buffered_bytes == 30_000


def test_a_connection_that_owes_too_much_reads_no_more_messages() -> None:
    peer = Peer(TransportLimits(max_pending_send_bytes=2_000), window=0)
    peer.send(*(peer.open(i) + peer.say(i, b"long 1000") for i in (1, 3, 5, 7, 9)))
    assert [len(call.got) for call in peer.log.calls] == [1, 1, 0, 0, 0]
    assert peer.connection.pending_bytes == 2 * 1005
    got = peer.send(window_update(1, 2_000), window_update(3, 2_000))
    assert messages(got, 1) == messages(got, 3) == [b"x" * 1000]
    assert [len(call.got) for call in peer.log.calls] == [1, 1, 1, 1, 0]
    got = peer.send(*(window_update(i, 2_000) for i in (5, 7, 9)))
    assert [messages(got, i) for i in (5, 7, 9)] == [[b"x" * 1000]] * 3
    assert peer.counters.buffered_bytes == 0


def test_messages_are_read_again_once_what_nobody_reads_is_given_up() -> None:
    peer = Peer(TransportLimits(max_pending_send_bytes=1_000, stall_seconds=5), window=100)
    peer.send(peer.open(1), peer.say(1, b"long 2000"))
    assert peer.send(peer.open(3), peer.say(3, b"hello", end=True)) == []
    got = peer.later(6)
    assert (got[0].kind, got[0].stream_id) == (RST_STREAM, 1)
    assert messages(got, 3) == [b"<hello>"]
    assert not peer.connection.streams


def test_a_full_socket_holds_what_calls_say_meanwhile() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait"))
    peer.connection.set_writable(False)
    assert kinds(peer.answer(0, b"late")) == [HEADERS]
    assert messages(parse(peer.connection.set_writable(True)), 1) == [b"late"]


@given(st.lists(st.tuples(st.sampled_from(["stream", "connection", "initial"]), st.integers(1, 400)), max_size=40))
@examples(max_examples=60, deadline=None)
def test_no_byte_is_sent_beyond_a_window_and_none_is_lost(steps: list[tuple[str, int]]) -> None:
    peer = Peer(window=50)
    stream_room = {1: 50, 3: 50}
    connection_room = 65_535
    initial = 50
    got = peer.send(*(peer.open(i) + peer.say(i, b"long 34000", end=True) for i in (1, 3)))
    sent = {i: data_bytes(got, i) for i in (1, 3)}
    for kind, amount in [*steps, ("connection", 100_000), ("initial", 100_000)]:
        if kind == "stream":
            stream_room[1] += amount
            got += peer.send(window_update(1, amount))
        elif kind == "connection":
            connection_room += amount
            got += peer.send(window_update(0, amount))
        else:
            stream_room = {i: room + amount - initial for i, room in stream_room.items()}
            initial = amount
            got += peer.send(settings(window=amount))
        before, sent = sent, {i: data_bytes(got, i) for i in (1, 3)}
        for i in (1, 3):
            # A window that shrank below what had been sent is negative, and then nothing may follow.
            assert sent[i] == before[i] or sent[i] <= stream_room[i]
        assert sum(sent.values()) <= connection_room
    assert messages(got, 1) == messages(got, 3) == [b"x" * 34000]
    assert not peer.connection.streams
