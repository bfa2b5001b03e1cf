"""Reads Envoy's messages where they lie: the fields a decision needs, without building an object for each header.

Protobuf encoders write fields in the order of their numbers, so a ProcessingRequest from Envoy is

    12 <len> HttpHeaders | 22 <len> HttpBody | ...    the phase, field 2 to 7
    42 00 5a 04 08 02 10 01 ...                       metadata, attributes, modes: the same bytes for every request

and HttpHeaders is `0a <len> HeaderMap [18 01]`, HttpBody `[0a <len> bytes] [10 01]`. What stands behind the phase is
looked up whole. A header is `0a <len> 0a <len> name [1a <len> value]`; only names that somebody reads are taken out. A
message that does not look like this is left to the general parser (None); tests hold both against each other.

Costs a sixth of the general parser, interpreted two thirds of it: `python -m bench.exchange_cost` prints both.
"""

from typing import Final

REQUEST_HEADERS: Final = 0x12
RESPONSE_HEADERS: Final = 0x1A
REQUEST_BODY: Final = 0x22
RESPONSE_BODY: Final = 0x2A
"""First byte of a message, by phase."""

REQUEST: Final = (
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
    "access-control-request-method",
)
"""Request headers that anybody here reads."""

RESPONSE: Final = (":status", "content-type", "content-length", "content-encoding", "target-pod-ip")
"""Response headers that anybody here reads."""


class Names:
    """Header names that are looked for, as Envoy writes them, in lower case, or in any case."""

    __slots__ = ("any_case", "lengths", "of", "wanted")

    def __init__(self, names: tuple[str, ...], *, any_case: bool = False) -> None:
        self.wanted = frozenset(names)
        self.of = {name.encode(): name for name in names}
        self.any_case = any_case
        self.lengths = bytes([any(len(name) == length for name in names) for length in range(128)])
        """Whether any of them has so many bytes: most headers need not be looked up."""


REQUEST_NAMES: Final = Names(REQUEST)
RESPONSE_NAMES: Final = Names(RESPONSE)
ANY_REQUEST_NAMES: Final = Names(REQUEST, any_case=True)
ANY_RESPONSE_NAMES: Final = Names(RESPONSE, any_case=True)
"""For whoever may be no Envoy."""
_END_OF_HEADERS: Final = b"\x18\x01"
_END_OF_BODY: Final = b"\x10\x01"


Part = tuple[int, int]
"""Where a phase's message lies in the whole: start and end; the constant remainder follows."""


def phase_part(message: bytes) -> Part | None:
    """The extent of the first field. None: read it with the general parser."""
    try:
        end = message[1] + 2
        start = 2
        if end >= 0x82:
            # Two bytes of length, as in most messages, or more.
            more = message[2]
            if more < 0x80:
                start = 3
                end += (more - 1 << 7) + 1
            else:
                length, start = _varint(message, 1)
                end = start + length
    except IndexError:
        return None
    return (start, end) if start and end <= len(message) else None


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """(value, next place); next place is 0 when there is none of at most five bytes."""
    try:
        value = message[place]
        if value < 0x80:
            return value, place + 1
        byte = message[place + 1]
        value += (byte - 1) << 7
        if byte < 0x80:
            return value, place + 2
        byte = message[place + 2]
        value += (byte - 1) << 14
        if byte < 0x80:
            return value, place + 3
        byte = message[place + 3]
        value += (byte - 1) << 21
        if byte < 0x80:
            return value, place + 4
        byte = message[place + 4]
        return (value + ((byte - 1) << 28), place + 5) if byte < 0x80 else (0, 0)
    except IndexError:
        return 0, 0


def read_headers(message: bytes, part: Part, names: Names) -> tuple[dict[str, bytes], bool] | None:
    """(those of the headers that are there, end of stream). Of a repeated header the last one counts."""
    start, end = part
    if end - start < 2 or message[start] != 0x0A:
        return None
    length = message[start + 1]
    if length < 0x80:
        begin = start + 2
    elif start + 2 < end and message[start + 2] < 0x80:
        begin = start + 3
        length += message[start + 2] - 1 << 7
    else:
        length, begin = _varint(message, start + 1)
    stop = begin + length
    if not begin or stop > end:
        return None
    if stop == end:
        end_of_stream = False
    elif message[stop:end] == _END_OF_HEADERS:
        end_of_stream = True
    else:
        return None
    of, any_case, lengths = names.of, names.any_case, names.lengths
    found: dict[str, bytes] = {}
    place = begin
    try:
        while place < stop:
            if message[place] != 0x0A:
                return None
            length = message[place + 1]
            place += 2
            if length >= 0x80:
                length, place = _varint(message, place - 1)
            after = place + length
            if not place or after > stop or message[place] != 0x0A:
                return None
            size = message[place + 1]
            place += 2
            if size < 0x80 and lengths[size]:  # nobody reads a longer name
                name_end = place + size
                key = message[place:name_end]
                name = of.get(key.lower() if any_case else key)
                if name is not None:
                    if name_end < after:
                        if message[name_end] != 0x1A:
                            return None
                        length = message[name_end + 1]
                        place = name_end + 2
                        if length >= 0x80:
                            length, place = _varint(message, name_end + 1)
                        if not place or place + length != after:
                            return None
                        found[name] = message[place:after]
                    elif name_end == after:
                        found[name] = b""
                    else:
                        return None
            place = after
    except IndexError:
        return None
    return found, end_of_stream


def read_body(message: bytes, part: Part) -> tuple[int, int, bool] | None:
    """(start of the bytes, their end, end of stream)."""
    start, end = part
    if start == end:
        return start, start, False
    if message[start] == 0x0A:
        if start + 3 < end and message[start + 1] >= 0x80 > message[start + 2]:
            begin = start + 3
            length = message[start + 1] + (message[start + 2] - 1 << 7)
        else:
            length, begin = _varint(message, start + 1)
        stop = begin + length
        if not begin or stop > end:
            return None
    else:
        begin = stop = start
    if stop == end:
        return begin, stop, False
    return (begin, stop, True) if message[stop:end] == _END_OF_BODY else None
