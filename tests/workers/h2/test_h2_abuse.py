"""Clients that mean harm: each is stopped with the right error and counted, and costs bounded memory."""

import tracemalloc

import hpack
import pytest
from h2_wire import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    HEADERS,
    NO_ERROR,
    PING,
    PRIORITY,
    PROTOCOL_ERROR,
    RST_STREAM,
    SETTINGS,
    SETTINGS_TIMEOUT,
    Frame,
    Peer,
    frame,
    kinds,
    message,
    messages,
    parse,
    settings,
    window_update,
)

from workers.h2.limits import TransportLimits

FEW = TransportLimits(control_frames_burst=100, control_frames_per_second=10)


def calmed(peer: Peer, got: list[Frame], reason: str) -> None:
    assert (got[-1].kind, got[-1].code) == (GOAWAY, ENHANCE_YOUR_CALM)
    assert peer.connection.done
    assert peer.counters.abuse_closes == {reason: 1}
    assert not peer.connection.streams
    assert peer.counters.streams_open == 0


def test_the_reserved_bit_of_a_stream_id_hides_no_stream() -> None:
    peer = Peer()
    (reset,) = peer.send(peer.open(1, ("content-length", "3")), frame(DATA, 0, 1 | 1 << 31, b"abcd"))
    assert (reset.kind, reset.stream_id, reset.code) == (RST_STREAM, 1, PROTOCOL_ERROR)
    assert not peer.connection.streams


@pytest.mark.parametrize(
    ("nuisance", "reason"),
    [
        (frame(PING, 0, 0, bytes(8)), "PING"),
        (frame(PING, ACK, 0, bytes(8)), "PING"),
        (frame(SETTINGS, 0, 0), "SETTINGS"),
        (settings(window=1) + settings(window=2), "SETTINGS"),
        (frame(SETTINGS, ACK, 0), "SETTINGS"),
        (window_update(0, 1), "WINDOW_UPDATE"),
        (window_update(1, 1), "WINDOW_UPDATE"),
        (frame(PRIORITY, 0, 77, b"\0\0\0\1\0"), "PRIORITY"),
        (frame(DATA, 0, 1), "empty DATA"),
        (frame(DATA, 8, 1, b"\4" + bytes(4)), "empty DATA"),
        (frame(0x99, 0, 0, b""), "unknown frames"),
        (frame(GOAWAY, 0, 0, bytes(8)), "GOAWAY"),
        (frame(RST_STREAM, 0, 1, bytes(4)), "RST_STREAM"),
    ],
)
def test_floods_of_frames_that_say_nothing(nuisance: bytes, reason: str) -> None:
    peer = Peer(FEW)
    got = peer.send(peer.open(1), nuisance * 150)
    calmed(peer, got, reason)


def test_the_account_fills_with_time_and_with_messages() -> None:
    peer = Peer(FEW)
    peer.send(peer.open(1))
    for _ in range(20):
        assert len(peer.send(frame(PING, 0, 0, bytes(8)) * 10)) == 10
        peer.later(1.0)
    for _ in range(200):
        peer.send(frame(PING, 0, 0, bytes(8)) * 2, peer.say(1, b"work"))
    assert not peer.connection.done


def test_rapid_reset() -> None:
    peer = Peer(FEW)
    reset = CANCEL.to_bytes(4, "big")
    got = peer.send(*(peer.open(i) + frame(RST_STREAM, 0, i, reset) for i in range(1, 401, 2)))
    calmed(peer, got, "streams reset before an answer")
    assert all(call.closed == 1 for call in peer.log.calls)


def test_resets_of_answered_streams_are_no_abuse() -> None:
    """Envoy ends every ext_proc stream so."""
    peer = Peer(FEW)
    for i in range(1, 2001, 2):
        peer.send(peer.open(i), peer.say(i, b"a"), frame(RST_STREAM, 0, i, CANCEL.to_bytes(4, "big")))
    assert not peer.connection.done
    assert peer.counters.streams_reset_by_client == 1000


def test_streams_over_the_limit_again_and_again() -> None:
    peer = Peer(TransportLimits(max_concurrent_streams=1, control_frames_burst=100))
    calmed(peer, peer.send(*(peer.open(i) for i in range(1, 401, 2))), "streams over the limit")


def test_malformed_requests_again_and_again() -> None:
    peer = Peer(FEW)
    got = peer.send(*(frame(HEADERS, 5, i, b"\x82") for i in range(1, 401, 2)))
    calmed(peer, got, "stream errors")


def test_requests_that_are_no_calls_again_and_again() -> None:
    peer = Peer(FEW)
    got = peer.send(*(peer.open(i, path="/nothing", end=True) for i in range(1, 401, 2)))
    calmed(peer, got, "refused requests")


def test_continuation_flood() -> None:
    peer = Peer(TransportLimits(max_continuations=10))
    got = peer.send(frame(HEADERS, 0, 1, b""), frame(CONTINUATION, 0, 1, b"") * 20)
    calmed(peer, got, "CONTINUATION")


def test_an_endless_header_block() -> None:
    peer = Peer(TransportLimits(max_header_list_bytes=10_000))
    got = peer.send(frame(HEADERS, 0, 1, b""), frame(CONTINUATION, 0, 1, bytes(16_000)) * 3)
    calmed(peer, got, "header block")


def test_hpack_bomb() -> None:
    """4 KB in the dynamic table, then one byte for each repetition."""
    peer = Peer()
    block = hpack.Encoder().encode([("x", "v" * 4000)]) + b"\xbe" * 12_000
    got = peer.send(frame(HEADERS, END_HEADERS | 1, 1, block))
    assert peer.headers(got[0])[":status"] == "431"


def test_tiny_pieces_of_a_message() -> None:
    peer = Peer(FEW)
    got = peer.send(peer.open(1), b"".join(frame(DATA, 0, 1, bytes((b,))) for b in message(bytes(200))))
    calmed(peer, got, "tiny DATA")
    assert peer.counters.buffered_bytes == 0


def test_single_bytes_of_a_message_weigh_no_more_than_the_message() -> None:
    peer = Peer()
    peer.send(peer.open(1), frame(DATA, 0, 1, b"\0\0\1\0\0"))
    tracemalloc.start()
    for _ in range(50):
        peer.send(frame(DATA, 0, 1, b"ab") * 100)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 3 * 10_000
    assert peer.counters.buffered_bytes == 10_000


def test_unfinished_messages_of_all_connections_together_are_bounded() -> None:
    peer = Peer(TransportLimits(max_buffered_bytes=50_000))
    peer.counters.buffered_bytes = 30_000  # other connections'
    start = b"\0" + (1 << 20).to_bytes(4, "big")
    got = peer.send(peer.open(1), peer.open(3), frame(DATA, 0, 1, start), frame(DATA, 0, 1, bytes(15_000)))
    assert got == []
    got = peer.send(frame(DATA, 0, 3, start + bytes(15_000)))
    assert [f.stream_id for f in got] == [3]
    assert peer.headers(got[0])["grpc-status"] == "8"
    assert peer.counters.buffered_bytes == 45_000


def test_messages_held_for_a_waiting_call_are_bounded_too() -> None:
    peer = Peer(TransportLimits(max_buffered_bytes=50_000))
    got = peer.send(peer.open(1), peer.say(1, b"wait"), *(peer.say(1, bytes(15_000)) for _ in range(4)))
    assert peer.headers(got[0])["grpc-status"] == "8"
    assert peer.log.pending[0].cancelled
    assert peer.counters.buffered_bytes == 0


def test_small_messages_held_for_a_waiting_call_count_as_what_they_take() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait"))
    tracemalloc.start()
    for _ in range(50):
        peer.send(peer.say(1, *[b"ab"] * 200))
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < peer.counters.buffered_bytes < 2 * used


def test_when_space_gets_short_messages_without_an_end_are_given_up() -> None:
    peer = Peer(TransportLimits(max_buffered_bytes=50_000, stall_seconds=5, keepalive_seconds=1e9))
    start = b"\0" + (1 << 20).to_bytes(4, "big")
    peer.send(peer.open(1), frame(DATA, 0, 1, start + bytes(10_000)), peer.open(3), peer.say(3, b"a"))
    assert peer.later(100) == []
    peer.counters.buffered_bytes += 30_000  # other connections'
    assert peer.later(1) == peer.later(4) == []
    peer.send(peer.open(5), frame(DATA, 0, 5, message(b"m" * 2000)[:1500]))
    (reset,) = peer.later(1)
    assert (reset.kind, reset.stream_id, reset.code) == (RST_STREAM, 1, ENHANCE_YOUR_CALM)
    assert peer.counters.abuse_closes == {"unfinished message": 1}
    assert peer.counters.buffered_bytes == 31_495
    # Who comes to an end again and again is left alone.
    for _ in range(5):
        assert peer.later(2) == []
        got = peer.send(frame(DATA, 0, 5, message(b"m" * 2000)[1500:] + message(b"m" * 2000)[:1500]))
        assert len(messages(got, 5)) == 1


def test_short_header_blocks_that_stand_for_much_are_not_kept() -> None:
    peer = Peer()
    encoder = hpack.Encoder()
    plain = [(":method", "POST"), (":scheme", "http"), (":path", "/test/Echo"), ("content-type", "application/grpc")]
    peer.send(frame(HEADERS, END_HEADERS, 1, encoder.encode([*plain, ("x", "v" * 3000)])))
    repeated = encoder.encode([*plain, *[("x", "v" * 3000)] * 5])
    assert len(repeated) < 100
    for i in range(3, 103, 2):
        peer.send(frame(HEADERS, END_HEADERS, i, repeated + b"\0\1a\3%03d" % i))
        assert len(peer.call.metadata["x"]) > 15_000
    assert not peer.connection._reader._cache


def test_many_settings_in_one_frame_cost_one_walk_over_the_streams() -> None:
    peer = Peer()
    peer.send(*(peer.open(i) for i in range(1, 201, 2)))
    got = peer.send(frame(SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff\0\4\0\0\0\1" * 1000))
    assert kinds(got) == [SETTINGS]
    assert {s.send_window for s in peer.connection.streams.values()} == {1}


def test_stream_window_updates_do_not_pile_up_while_the_connection_is_blocked() -> None:
    peer = Peer(window=1)
    peer.send(peer.open(1), peer.say(1, b"long 70000"), window_update(1, 65_534))
    for _ in range(500):
        peer.send(window_update(1, 1))
    assert len(peer.connection._queue) == 1
    got = peer.send(window_update(0, 100_000), window_update(1, 100_000))
    assert sum(len(f.payload) for f in got if f.kind == DATA) == 70_005 - 65_535


# Time.


def test_a_client_that_says_nothing_is_sent_away() -> None:
    peer = Peer(TransportLimits(handshake_seconds=5), greet=False)
    assert peer.later(4) == []
    (goaway,) = peer.later(2)
    assert (goaway.kind, goaway.code) == (GOAWAY, SETTINGS_TIMEOUT)
    assert peer.counters.abuse_closes == {"handshake timeout": 1}


def test_a_client_that_never_acknowledges_our_settings_is_sent_away() -> None:
    peer = Peer(TransportLimits(handshake_seconds=5), greet=False)
    peer.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings())
    assert peer.later(6)[-1].code == SETTINGS_TIMEOUT


def test_a_silent_client_is_pinged_and_then_taken_for_dead() -> None:
    peer = Peer(TransportLimits(keepalive_seconds=60, keepalive_timeout_seconds=20))
    peer.send(peer.open(1))
    peer.later(1)
    (ping,) = peer.later(60)
    assert ping.kind == PING
    assert peer.send(frame(PING, ACK, 0, ping.payload)) == []
    assert peer.later(1) == []
    (ping,) = peer.later(60)
    assert peer.later(19) == []
    (goaway,) = peer.later(2)
    assert (goaway.kind, goaway.code) == (GOAWAY, NO_ERROR)
    assert peer.counters.abuse_closes == {"keepalive timeout": 1}
    assert peer.call.closed == 1


def test_a_connection_without_streams_is_asked_to_leave() -> None:
    peer = Peer(TransportLimits(idle_seconds=100, keepalive_seconds=1e9))
    peer.send(peer.open(1))
    assert peer.later(200) == []
    peer.send(peer.say(1, b"a", end=True))
    assert peer.later(99) == []
    assert kinds(peer.later(2)) == [GOAWAY, PING]
    assert kinds(peer.later(1)) == [GOAWAY]
    assert peer.connection.done


# Shutdown.


def test_draining_in_two_steps() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"a"), peer.open(3), peer.say(3, b"idle"))
    peer.connection.start_drain()
    got = peer.send()
    assert [f.last_stream_id for f in got if f.kind == GOAWAY] == [(1 << 31) - 1]
    (ping,) = [f for f in got if f.kind == PING]
    assert peer.headers(got[-1])["grpc-status"] == "0"
    assert [call.closed for call in peer.log.calls] == [0, 1]
    # A request that crossed the first GOAWAY is served.
    assert messages(peer.send(peer.open(5), peer.say(5, b"b")), 5) == [b"<b>"]
    (goaway,) = peer.send(frame(PING, ACK, 0, ping.payload))
    assert (goaway.kind, goaway.code, goaway.last_stream_id) == (GOAWAY, NO_ERROR, 5)
    # One that crossed the second is not, and the client knows it; what it sends is ignored and decoded.
    assert peer.send(peer.open(7, ("x-new", "1")), peer.say(7, b"c", end=True)) == []
    assert peer.send(peer.open(9, ("x-new", "1"))) == []
    assert not peer.connection.done
    got = peer.send(peer.say(1, b"finish"), peer.say(5, b"idle"))
    assert messages(got, 1) == [b"<finish>"]
    assert not peer.connection.done
    peer.send(frame(DATA, 1, 1), frame(RST_STREAM, 0, 3, bytes(4)), frame(RST_STREAM, 0, 5, bytes(4)))
    assert peer.connection.done
    assert [call.closed for call in peer.log.calls] == [1, 1, 1]


def test_draining_does_not_wait_for_a_ping_that_never_comes() -> None:
    peer = Peer()
    peer.connection.start_drain()
    peer.send()
    assert peer.later(0.5) == []
    assert kinds(peer.later(1.0)) == [GOAWAY]
    assert peer.connection.done


def test_an_awaited_answer_is_given_before_the_end() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait"))
    peer.connection.start_drain()
    peer.call.idle = True
    got = peer.send()
    assert HEADERS not in kinds(got)
    got = peer.answer(0, b"done")
    assert messages(got, 1) == [b"done"]
    assert peer.headers(got[0]) and peer.headers(got[-1]) == {"grpc-status": "0"}
    peer.later(1.0)
    assert not peer.connection.done
    assert kinds(peer.later(2.0)) == [RST_STREAM]
    assert peer.connection.done


def test_when_the_grace_is_over_calls_end_with_unavailable() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"a"))
    peer.connection.start_drain()
    peer.send()
    peer.connection.abandon("the server is shutting down")
    got = parse(peer.connection.take())
    assert peer.headers(got[0]) == {"grpc-status": "14", "grpc-message": "the server is shutting down"}
    assert got[1].kind == GOAWAY
    peer.send(frame(DATA, 1, 1))
    assert peer.connection.done


def test_a_lost_connection_closes_every_call_once() -> None:
    peer = Peer()
    peer.send(peer.open(1), peer.say(1, b"wait"), peer.open(3), peer.say(3, b"a"), peer.open(5, path="/test/Watch"))
    peer.connection.lost()
    peer.connection.lost()
    assert [call.closed for call in peer.log.calls] == [1, 1, 1]
    assert peer.counters.streams_open == 0
    assert peer.log.pending[0].cancelled
