"""Numbers of RFC 9113 and the bytes of the frames that a server sends.

A frame is never an object here: it is a place in the read buffer on the way in, and packed bytes on the way out.
"""

from struct import Struct
from typing import Final

from workers.h2.responses import GRPC_HEADERS, TRAILERS_OK

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What every client says first (3.4)."""

HEADER_BYTES: Final = 9
PREFIX_BYTES: Final = 5
"""What stands before each gRPC message: compression flag and length."""
DEFAULT_WINDOW: Final = 65535
MAX_WINDOW: Final = 2**31 - 1
MIN_MAX_FRAME: Final = 16384

# Frame types (6).
DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

# Flags.
ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FIELDS: Final = 0x20

# Settings (6.5.2).
HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

# Error codes (7).
NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
INTERNAL_ERROR: Final = 2
FLOW_CONTROL_ERROR: Final = 3
SETTINGS_TIMEOUT: Final = 4
STREAM_CLOSED: Final = 5
FRAME_SIZE_ERROR: Final = 6
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
COMPRESSION_ERROR: Final = 9
ENHANCE_YOUR_CALM: Final = 11

read_header: Final = Struct(">IBI").unpack_from
"""(length << 8 | type, flags, stream id with its reserved bit) at an offset of a buffer."""

frame_header: Final = Struct(">IBI").pack
"""The same three numbers to bytes."""

message_header: Final = Struct(">IBIBI").pack
"""A DATA frame's header and the five bytes before a gRPC message, packed together."""

_FIRST: Final = Struct(f">IBI{len(GRPC_HEADERS)}sIBIBI").pack
_GRPC_HEADERS_WORD: Final = len(GRPC_HEADERS) << 8 | HEADERS


def first_message_header(stream_id: int, size: int) -> bytes:
    """Response headers and what `message_header` packs, for the first message of a stream."""
    word = (size + PREFIX_BYTES) << 8
    return _FIRST(_GRPC_HEADERS_WORD, END_HEADERS, stream_id, GRPC_HEADERS, word, 0, stream_id, 0, size)


def trailers_ok(stream_id: int) -> bytes:
    """HEADERS with END_STREAM and grpc-status 0."""
    return _TRAILERS(_TRAILERS_OK_WORD, END_HEADERS | END_STREAM, stream_id, TRAILERS_OK)


_TRAILERS: Final = Struct(f">IBI{len(TRAILERS_OK)}s").pack
_TRAILERS_OK_WORD: Final = len(TRAILERS_OK) << 8 | HEADERS

read_settings: Final = Struct(">HI").iter_unpack
_setting: Final = Struct(">HI").pack
_u32: Final = Struct(">I").pack
_u32_pair: Final = Struct(">II").pack


def read_u32(data: bytes, offset: int = 0) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")


def settings(values: dict[int, int]) -> bytes:
    payload = b"".join([_setting(key, value) for key, value in values.items()])
    return frame_header(len(payload) << 8 | SETTINGS, 0, 0) + payload


SETTINGS_ACK: Final = frame_header(SETTINGS, ACK, 0)


PING_ACK_HEADER: Final = frame_header(8 << 8 | PING, ACK, 0)


def window_update(stream_id: int, increment: int) -> bytes:
    return frame_header(4 << 8 | WINDOW_UPDATE, 0, stream_id) + _u32(increment)


def rst_stream(stream_id: int, code: int) -> bytes:
    return frame_header(4 << 8 | RST_STREAM, 0, stream_id) + _u32(code)


def ping(flags: int, payload: bytes) -> bytes:
    return frame_header(8 << 8 | PING, flags, 0) + payload


def goaway(last_stream_id: int, code: int, debug: bytes = b"") -> bytes:
    return frame_header(8 + len(debug) << 8 | GOAWAY, 0, 0) + _u32_pair(last_stream_id, code) + debug
