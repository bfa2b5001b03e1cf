"""Header blocks to header fields (RFC 7541), for blocks that change a little from stream to stream.

The static table and the Huffman code are the `hpack` library's; the loop is ours because a gRPC client with deadlines
puts a new `grpc-timeout` into the dynamic table with every stream, so that no block is ever seen twice. Here a
field is checked and converted once, when it enters the table, and later costs one lookup; and since the time that is
left when a client sends varies little, so does a literal (`_field`).

`version` changes whenever the dynamic table does. A block that left it alone decodes to the same fields as long as
`version` stays: that is what the cache of decoded blocks in `requests` rests on.

Cost: a fortieth of the library's decoder, interpreted an eighth, for grpc-go's block of eight fields with one new
deadline (`python -m bench.h2_micro`).
"""

import re
from functools import lru_cache
from typing import Final

from hpack.huffman_table import HUFFMAN_TABLE
from hpack.table import HeaderTable

from workers.h2.faults import ConnectionFault
from workers.h2.frames import COMPRESSION_ERROR


class Field:
    """A header field. `size` is that of RFC 7541 4.1, `fault` what is wrong with it by RFC 9113 8.2 ("": nothing)."""

    __slots__ = ("fault", "name", "size", "value")

    def __init__(self, name: str, value: str, fault: str) -> None:
        self.name = name
        self.value = value
        self.size = len(name) + len(value) + 32
        self.fault = fault


TABLE_BYTES: Final = 4096
"""SETTINGS_HEADER_TABLE_SIZE; we leave it at its default."""

_NAME: Final = re.compile(r":?[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_VALUE: Final = re.compile(r"(?:[^\0\r\n \t](?:[^\0\r\n]*[^\0\r\n \t])?)?").fullmatch
_CONNECTION_SPECIFIC: Final = {"connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"}


def make_field(name: str, value: str) -> Field:
    fault = ""
    if not _NAME(name):
        fault = "invalid field name"  # 8.2.1
    elif not _VALUE(value):
        fault = "invalid field value"  # 8.2.1
    elif name in _CONNECTION_SPECIFIC or (name == "te" and value != "trailers"):
        fault = "connection-specific field"  # 8.2.2
    return Field(name, value, fault)


_STATIC: Final[list[Field]] = [
    make_field(name.decode(), value.decode()) for name, value in ((b"", b""), *HeaderTable.STATIC_TABLE)
]
_STATIC_SIZE: Final = len(_STATIC)
_LAST_STATIC_BYTE: Final = 0x80 | _STATIC_SIZE - 1

_NEXT: Final = bytes([state for state, _, _ in HUFFMAN_TABLE])
_FLAGS: Final = bytes([flags for _, flags, _ in HUFFMAN_TABLE])
_SYMBOL: Final = bytes([symbol for _, _, symbol in HUFFMAN_TABLE])
_COMPLETE: Final = 1
_EMIT: Final = 2
_FAIL: Final = 4
"""By sixteen times the state plus half a byte of input: the next state, what to do, and the byte to put out."""

_SHORT: Final = 32
"""Bytes of a name and of a value. Longer literals are not remembered."""


def _bad(reason: str) -> ConnectionFault:
    return ConnectionFault(COMPRESSION_ERROR, reason)  # RFC 9113 4.3


def _integer(block: bytes, pos: int, mask: int) -> tuple[int, int]:
    """The integer whose prefix is `block[pos] & mask`, and the position after it (5.1)."""
    number = block[pos] & mask
    pos += 1
    if number < mask:
        return number, pos
    for shift in (0, 7, 14, 21):
        byte = block[pos]
        pos += 1
        number += (byte & 0x7F) << shift
        if byte < 0x80:
            return number, pos
    raise _bad("header integer too long")


def _string(block: bytes, pos: int) -> tuple[bytes, bool, int]:
    """The string literal at `pos` as it stands, whether that is in Huffman code, and the position after it (5.2)."""
    first = block[pos]
    length = first & 0x7F
    pos += 1
    if length == 0x7F:
        length, pos = _integer(block, pos - 1, 0x7F)
    end = pos + length
    if end > len(block):
        raise _bad("header string cut short")
    return block[pos:end], first >= 0x80, end


def decode_huffman(raw: bytes) -> bytes:
    """A string in Huffman code (5.2), by the library's state machine and four times as fast as in its loop."""
    out = bytearray()
    state = 0
    flags = _COMPLETE
    for byte in raw:
        for shift in range(4, -1, -4):
            index = state << 4 | byte >> shift & 0x0F
            flags = _FLAGS[index]
            if flags & _FAIL:
                raise _bad("invalid Huffman code")
            if flags & _EMIT:
                out.append(_SYMBOL[index])
            state = _NEXT[index]
    if not flags & _COMPLETE:
        raise _bad("invalid Huffman code")
    return bytes(out)


def _decoded(raw: bytes, huffman: bool) -> str:
    return (decode_huffman(raw) if huffman else raw).decode("latin-1")


def _new_field(name: str, raw: bytes, huffman: bool) -> Field:
    return make_field(name, _decoded(raw, huffman))


_field: Final = lru_cache(maxsize=4096)(_new_field)


class HpackDecoder:
    """One connection's decoding context."""

    __slots__ = ("_capacity", "_entries", "_max_list_bytes", "_used", "list_bytes", "newest", "version")

    def __init__(self, max_list_bytes: int) -> None:
        self._entries: list[Field] = []
        """The newest last."""
        self.newest: Field | None = None
        """The field that entered the table last."""
        self._used = 0
        self._capacity = TABLE_BYTES
        self._max_list_bytes = max_list_bytes
        self.list_bytes = 0
        """What the last block decoded to, by RFC 9113 6.5.2."""
        self.version = 0

    def decode(self, block: bytes) -> list[Field] | None:
        """The fields in order, or None if together they are larger than the limit.

        The dynamic table is right in both cases, so that the connection can go on. Raises `ConnectionFault`.
        """
        try:
            return self._decode(block)
        except IndexError:
            raise _bad("header block cut short or index out of range") from None

    def _decode(self, block: bytes) -> list[Field] | None:
        entries = self._entries
        fields: list[Field] = []
        updates = size = 0
        pos = 0
        end = len(block)
        while pos < end:
            byte = block[pos]
            if 0x80 < byte < 0xFF:  # 6.1 indexed, in one byte
                pos += 1
                field = _STATIC[byte & 0x7F] if byte <= _LAST_STATIC_BYTE else entries[_LAST_STATIC_BYTE - byte]
            elif byte & 0x80:
                index, pos = _integer(block, pos, 0x7F)
                if not index:
                    raise _bad("header index 0")
                field = entries[_STATIC_SIZE - 1 - index]
            elif byte & 0x40:  # 6.2.1 literal that enters the table
                field, pos = self._literal(block, pos, 0x3F)
                self._insert(field)
            elif byte & 0x20:  # 6.3 table size update, only before the first field (4.2)
                updates += 1
                if fields or updates > 2:
                    raise _bad("misplaced table size update")
                capacity, pos = _integer(block, pos, 0x1F)
                if capacity > TABLE_BYTES:
                    raise _bad("table size update over the limit")
                self._capacity = capacity
                self._evict()
                continue
            else:  # 6.2.2, 6.2.3 literal that does not
                field, pos = self._literal(block, pos, 0x0F)
            fields.append(field)
            size += field.size
        self.list_bytes = size
        return fields if size <= self._max_list_bytes else None

    def _literal(self, block: bytes, pos: int, mask: int) -> tuple[Field, int]:
        index, pos = _integer(block, pos, mask)
        if index >= _STATIC_SIZE:
            name = self._entries[_STATIC_SIZE - 1 - index].name
        elif index:
            name = _STATIC[index].name
        else:
            raw, huffman, pos = _string(block, pos)
            name = _decoded(raw, huffman)
        raw, huffman, pos = _string(block, pos)
        short = len(raw) <= _SHORT and len(name) <= _SHORT
        return (_field if short else _new_field)(name, raw, huffman), pos

    def _insert(self, field: Field) -> None:
        self._entries.append(field)
        self.newest = field
        self._used += field.size
        self._evict()

    def _evict(self) -> None:
        """Make the table fit (4.3, 4.4: an entry larger than the table empties it)."""
        self.version += 1
        while self._used > self._capacity:
            self._used -= self._entries.pop(0).size
