"""A client made of a socket and bytes: what is said must not depend on how the bytes are cut into writes."""

import socket
from typing import Any

import hpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test.Echo/Stream"),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def message(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


def conversation(streams: list[list[bytes]]) -> bytes:
    """A whole connection: all streams opened, their messages in turn, half of them in two frames, and ended."""
    encoder = hpack.Encoder()
    wire = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"\0\4\0\x0f\xff\xff") + frame(8, 0, 0, b"\0\x0f\xff\xff")
    )
    ids = [2 * i + 1 for i in range(len(streams))]
    for stream_id in ids:
        wire += frame(1, 4, stream_id, encoder.encode(HEADERS))
    for turn in range(max(map(len, streams))):
        for stream_id, words in zip(ids, streams, strict=True):
            if turn < len(words):
                data = message(words[turn])
                half = len(data) // 2 if turn % 2 else 0
                if half:
                    wire += frame(0, 0, stream_id, data[:half])
                wire += frame(0, 0, stream_id, data[half:])
    for stream_id in ids:
        wire += frame(0, 1, stream_id)
    return wire + frame(4, 1, 0) + frame(6, 0, 0, b"12345678")


def replies(
    wire: bytes, address: str, cuts: list[int], ends: int
) -> tuple[dict[int, bytes], dict[int, dict[str, str]]]:
    """Write `wire` in pieces and read until `ends` streams have ended: their DATA and their last headers."""
    host, _, port = address.rpartition(":")
    decoder = hpack.Decoder()
    data: dict[int, bytes] = {}
    trailers: dict[int, dict[str, str]] = {}
    buffer = b""
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
            sock.sendall(wire[start:end])
        while len(trailers) < ends:
            read = sock.recv(1 << 16)
            assert read, "the server hung up"
            buffer += read
            while len(buffer) >= 9 and len(buffer) >= 9 + (size := int.from_bytes(buffer[:3], "big")):
                kind, flags, stream_id = buffer[3], buffer[4], int.from_bytes(buffer[5:9], "big")
                payload, buffer = buffer[9 : 9 + size], buffer[9 + size :]
                assert kind not in (3, 7), "reset or sent away"
                if kind == 0:
                    data[stream_id] = data.get(stream_id, b"") + payload
                elif kind == 1:
                    headers = dict(decoder.decode(payload))
                    if flags & 1:
                        trailers[stream_id] = headers
    return data, trailers


def test_every_position_of_a_conversation_may_be_a_cut(served: Any) -> None:
    streams = [[b"one", b"", b"three"], [b"a" * 30]]
    wire = conversation(streams)
    for cut in range(1, len(wire), 3):
        data, trailers = replies(wire, served.address, [cut], 2)
        assert data == {1: b"".join(map(message, streams[0])), 3: message(streams[1][0])}
        assert [t["grpc-status"] for t in trailers.values()] == ["0", "0"]


def test_a_conversation_in_single_bytes(served: Any) -> None:
    wire = conversation([[b"one", b"two"], [b"three"]])
    data, _ = replies(wire, served.address, list(range(1, len(wire))), 2)
    assert data == {1: message(b"one") + message(b"two"), 3: message(b"three")}


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_streams_cut_anyhow(served: Any, data: st.DataObject) -> None:
    words = st.binary(max_size=60).map(lambda b: b"-" + b) | st.just(b"x" * 9000)
    streams = data.draw(st.lists(st.lists(words, min_size=1, max_size=4), min_size=1, max_size=4))
    wire = conversation(streams)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(wire) - 1), max_size=20)))
    got, trailers = replies(wire, served.address, cuts, len(streams))
    assert got == {2 * i + 1: b"".join(map(message, words)) for i, words in enumerate(streams)}
    assert all(t["grpc-status"] == "0" for t in trailers.values())
