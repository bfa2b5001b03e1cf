"""Reads Envoy's messages where they lie: the fields a decision needs, without building an object for each header.

Protobuf encoders write fields in the order of their numbers, so a ProcessingRequest from Envoy is

    12 <len> HttpHeaders | 22 <len> HttpBody | ...    the phase, field 2 to 7
    42 00 5a 04 08 02 10 01 ...                       metadata, attributes, modes: the same bytes for every request

and HttpHeaders is `0a <len> HeaderMap [18 01]`, HttpBody `[0a <len> bytes] [10 01]`. What stands behind the phase is
looked up whole. A header is found by its own encoding, `0a <len> name 1a`: a line feed, which neither a name nor a
value can contain, then the length, which is a control character, and as a length of its own a line feed is never
followed by one. Whatever does not look exactly like this is left to the general parser (None), so being quick never
decides what a message means; tests hold both against each other. Envoy writes names in lower case; that others count
too costs 0.2 µs a message.

Costs a third to a half of the general parser: `python -m bench.exchange_cost` prints both.
"""

import re

REQUEST_HEADERS, RESPONSE_HEADERS, REQUEST_BODY, RESPONSE_BODY = 0x12, 0x1A, 0x22, 0x2A
"""First byte of a message, by phase."""

REQUEST = (
    ":path",
    "content-type",
    "routing-strategy",
    "user",
    "authorization",
    "external-filter",
    "config-profile",
    "x-session-id",
    "x-aibrix-session-key",
    "traceparent",
    "x-pointsman-explain",
)
"""Request headers that anybody here reads."""

RESPONSE = (":status", "content-type", "content-length", "content-encoding", "target-pod-ip")
"""Response headers that anybody here reads."""


class Names:
    """Header names, and the pattern that finds them in an encoded message."""

    __slots__ = ("by_bytes", "find", "wanted")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.wanted = frozenset(names)
        self.by_bytes = {name.encode(): name for name in names}
        keys = b"|".join(bytes([len(name)]) + re.escape(name.encode()) for name in names)
        self.find = re.compile(b"\n(" + keys + b")([\x12\x1a\n]?)", re.DOTALL | re.IGNORECASE).finditer


REQUEST_NAMES = Names(REQUEST)
RESPONSE_NAMES = Names(RESPONSE)
_END_OF_HEADERS = b"\x18\x01"
_END_OF_BODY = b"\x10\x01"


Part = tuple[int, int]
"""Where a phase's message lies in the whole: start and end; the constant remainder follows."""


def phase_part(message: bytes) -> Part | None:
    """The extent of the first field. None: read it with the general parser."""
    if len(message) < 2:
        return None
    length = message[1]
    start = 2
    if length >= 0x80:
        length, start = _varint(message, 1)
    end = start + length
    return (start, end) if start > 0 and end <= len(message) else None


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """(value, next place); next place is 0 when there is none of at most five bytes."""
    value = shift = 0
    for byte in message[place : place + 5]:
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    return 0, 0


def read_headers(message: bytes, part: Part, names: Names) -> tuple[dict[str, bytes], bool] | None:
    """(those of the headers that are there, end of stream). Of a repeated header the last one counts."""
    start, end = part
    if start >= end or message[start] != 0x0A:
        return None
    length, begin = _varint(message, start + 1)
    stop = begin + length
    if not begin or stop > end:
        return None
    if stop == end:
        over = False
    elif message[stop:end] == _END_OF_HEADERS:
        over = True
    else:
        return None
    found: dict[str, bytes] = {}
    for match in names.find(message, begin, stop):
        key, tag = match.groups()
        place = match.end()
        if tag != b"\x1a":
            if tag == b"\x12":
                return None  # in `value`
            found[names.by_bytes[key[1:].lower()]] = b""  # an empty field is not written: here the next header begins
            continue
        if place >= stop:
            return None
        size = message[place]
        if size < 0x80:
            place += 1
        else:
            size, place = _varint(message, place)
            if not place:
                return None
        if place + size > stop:
            return None
        found[names.by_bytes[key[1:].lower()]] = message[place : place + size]
    return found, over


def read_body(message: bytes, part: Part) -> tuple[int, int, bool] | None:
    """(start of the bytes, their end, end of stream)."""
    start, end = part
    if start == end:
        return start, start, False
    if message[start] == 0x0A:
        length, begin = _varint(message, start + 1)
        stop = begin + length
        if not begin or stop > end:
            return None
    else:
        begin = stop = start
    if stop == end:
        return begin, stop, False
    return (begin, stop, True) if message[stop:end] == _END_OF_BODY else None
