"""Reads the entries of Envoy's access log where they lie, as `router.wire` reads Envoy's other messages.

    12 <len> HTTPAccessLogEntries { 0a <len> HTTPAccessLogEntry ... }     behind the identifier, in the first message
    0a <len> AccessLogCommon { 6a <len> upstream_remote_address, 82 01 <len> response_flags, 8a 01 <len> metadata }
    22 <len> HTTPResponseProperties { 0a <len> UInt32Value { 08 <code> } }

An entry has some forty fields, of which five are read: of the others only the lengths are looked at. It is left to the
general parser (None) where flags are set (an error of Envoy's own, or a client that left), where there may have been a
retry, and where anything does not look like this; tests hold both against each other. What a client can make Envoy
write, as the path or the request's id, lies in other fields.

Costs two fifths of the general parser; `python -m bench.exchange_cost` prints both.
"""

from typing import Final

from router.replies import ENVOY_LB, NAMESPACE

_NAMESPACE: Final = NAMESPACE.encode()
_ENVOY_LB: Final = ENVOY_LB.encode()
_LENGTH_DELIMITED: Final = 2
_COMMON: Final = 0x0A
_RESPONSE: Final = 0x22
_UPSTREAM: Final = 0x6A
# Keys of two bytes, of fields from 16 on.
_FLAGS: Final = 16
_METADATA: Final = 17


class Ended:
    """What an entry says of a request without an error of Envoy's own, whose client stayed, and of no retry."""

    __slots__ = ("code", "had_pod", "pod", "ticket")

    def __init__(self) -> None:
        self.ticket = b""
        self.pod = b""
        self.code = 0
        self.had_pod = False


def entries(message: bytes) -> list[tuple[int, int]] | None:
    """Where the entries of a StreamAccessLogsMessage start and end."""
    found: list[tuple[int, int]] = []
    place, end = 0, len(message)
    while place < end:
        key = message[place]
        length, place = _length(message, place + 1, end)
        if place == 0:
            return None
        stop = place + length
        if key == 0x12:
            while place < stop:
                if message[place] != 0x0A:
                    return None
                length, place = _length(message, place + 1, stop)
                if place == 0:
                    return None
                found.append((place, place + length))
                place += length
        elif key != 0x0A:
            return None
        place = stop
    return found


def read(message: bytes, start: int, end: int) -> Ended | None:
    """The entry that lies there."""
    ended = Ended()
    described = answered = False
    place = start
    while place < end:
        key = message[place]
        if key == _COMMON:
            length, place = _length(message, place + 1, end)
            if place == 0 or described or not _common(message, place, place + length, ended):
                return None
            described = True
            place += length
        elif key == _RESPONSE:
            length, place = _length(message, place + 1, end)
            if place == 0 or answered or not _response(message, place, place + length, ended):
                return None
            answered = True
            place += length
        else:
            place = _skip(message, place, end)
            if place == 0:
                return None
    return ended


def _common(message: bytes, place: int, end: int, ended: Ended) -> bool:
    addressed = described = False
    while place < end:
        key = message[place]
        if key == _UPSTREAM:
            length, place = _length(message, place + 1, end)
            # 0a <len> SocketAddress { 12 <len> address, ... }; anything else is no usual address.
            if place == 0 or addressed or length < 5:
                return False
            if message[place] != 0x0A or message[place + 1] != length - 2 or message[place + 2] != 0x12:
                return False
            addressed = ended.had_pod = 0 < message[place + 3] < 0x80
            if not addressed or message[place + 3] > length - 4:
                return False
            place += length
        elif key >= 0x80 and place + 1 < end and message[place + 1] == 1 and key & 7 == _LENGTH_DELIMITED:
            field = 16 + (key - 0x80 >> 3)
            length, place = _length(message, place + 2, end)
            if place == 0:
                return False
            if field == _METADATA:
                if described or not _metadata(message, place, place + length, ended):
                    return False
                described = True
            elif field == _FLAGS and length:
                return False
            place += length
        else:
            place = _skip(message, place, end)
            if place == 0:
                return False
    return True


def _metadata(message: bytes, place: int, end: int, ended: Ended) -> bool:
    """{ 0a <len> { 0a <len> namespace, 12 <len> Struct } ... }"""
    found = False
    while place < end:
        if message[place] != 0x0A:
            return False
        length, place = _length(message, place + 1, end)
        stop = place + length
        if place == 0 or length < 2 or message[place] != 0x0A:
            return False
        length, place = _length(message, place + 1, stop)
        if place == 0:
            return False
        name = message[place : place + length]
        if name == _ENVOY_LB:
            return False
        if name == _NAMESPACE:
            place += length
            if found or place >= stop or message[place] != 0x12:
                return False
            found = True
            length, place = _length(message, place + 1, stop)
            if place == 0 or place + length != stop or not _fields(message, place, stop, ended):
                return False
        place = stop
    return True


def _fields(message: bytes, place: int, end: int, ended: Ended) -> bool:
    """Struct { 0a <len> { 0a <len> name, 12 <len> Value { 1a <len> string } } ... }, all of less than 128 bytes."""
    seen = 0
    while place < end:
        if place + 4 > end or message[place] != 0x0A or message[place + 2] != 0x0A:
            return False
        length, size = message[place + 1], message[place + 3]
        place += 4
        stop = place - 2 + length
        start = place + size + 4
        if length >= 0x80 or stop > end or start > stop:
            return False
        # Of the value, all three lengths must agree: it is one string.
        if message[start - 4] != 0x12 or message[start - 3] != stop - start + 2:
            return False
        if message[start - 2] != 0x1A or message[start - 1] != stop - start:
            return False
        if size == 6 and message[place : place + 6] == b"ticket":
            if seen & 1:
                return False
            seen |= 1
            ended.ticket = message[start:stop]
        elif size == 3 and message[place : place + 3] == b"pod":
            if seen & 2:
                return False
            seen |= 2
            ended.pod = message[start:stop]
        place = stop
    return True


def _response(message: bytes, place: int, end: int, ended: Ended) -> bool:
    first = True
    while place < end:
        if message[place] == 0x0A:
            length, place = _length(message, place + 1, end)
            if place == 0 or not first:
                return False
            first = False
            if length == 3 and message[place] == 0x08 and message[place + 1] >= 0x80 > message[place + 2]:
                ended.code = message[place + 1] + (message[place + 2] - 1 << 7)
            elif length:
                return False
            place += length
        else:
            place = _skip(message, place, end)
            if place == 0:
                return False
    return True


def _length(message: bytes, place: int, end: int) -> tuple[int, int]:
    """(length, where that many bytes begin, which are there); 0 for the place where they are not."""
    if place >= end:
        return 0, 0
    length = message[place]
    place += 1
    if length >= 0x80:
        shift = 7
        length -= 0x80
        while True:
            if place >= end or shift > 28:
                return 0, 0
            byte = message[place]
            place += 1
            if byte < 0x80:
                length += byte << shift
                break
            length += byte - 0x80 << shift
            shift += 7
    return (length, place) if length <= end - place else (0, 0)


def _skip(message: bytes, place: int, end: int) -> int:
    """Behind the field that begins there, 0 where that cannot be told."""
    key = message[place]
    place += 1
    if key >= 0x80:
        if place >= end or message[place] == 0 or message[place] >= 0x80:
            return 0
        place += 1
    elif key < 8:
        return 0
    kind = key & 7
    if kind == _LENGTH_DELIMITED:
        if place >= end:
            return 0
        length = message[place]
        if length < 0x80:
            place += 1 + length
        else:
            length, place = _length(message, place, end)
            if place == 0:
                return 0
            place += length
    elif kind == 0:
        most = place + 10
        while place < end and message[place] >= 0x80:
            place += 1
        place += 1
        if place > most:
            return 0
    elif kind == 5:
        place += 4
    elif kind == 1:
        place += 8
    else:
        return 0
    return place if place <= end else 0
