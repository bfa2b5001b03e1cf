"""Header blocks to header fields (RFC 7541), for blocks that change a little from stream to stream.

The static table and the Huffman code are the `hpack` library's; the loop is ours because a gRPC client with deadlines
puts a new `grpc-timeout` into the dynamic table with every stream, so that no block is ever seen twice. Here a
field is checked and converted once, when it enters the table, and later costs one lookup; and since the time that is
left when a client sends varies little, so does a literal (`_field`).

`version` changes whenever the dynamic table does. A block that left it alone decodes to the same fields as long as
`version` stays: that is what the cache of decoded blocks in `requests` rests on.

Cost: a fifth of the library's decoder for grpc-go's block of eight fields with one new deadline
(`python -m bench.h2_micro`).
"""

import re
from functools import lru_cache

from hpack import HPACKDecodingError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from workers.h2.faults import ConnectionFault
from workers.h2.frames import COMPRESSION_ERROR

Field = tuple[str, str, int, str]
"""Name, value, size by RFC 7541 4.1, and what is wrong with it by RFC 9113 8.2 ("" if nothing)."""

TABLE_BYTES = 4096
"""SETTINGS_HEADER_TABLE_SIZE; we leave it at its default."""

_NAME = re.compile(r":?[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_VALUE = re.compile(r"(?:[^\0\r\n \t](?:[^\0\r\n]*[^\0\r\n \t])?)?").fullmatch
_CONNECTION_SPECIFIC = {"connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"}


def make_field(name: str, value: str) -> Field:
    fault = ""
    if not _NAME(name):
        fault = "invalid field name"  # 8.2.1
    elif not _VALUE(value):
        fault = "invalid field value"  # 8.2.1
    elif name in _CONNECTION_SPECIFIC or (name == "te" and value != "trailers"):
        fault = "connection-specific field"  # 8.2.2
    return name, value, len(name) + len(value) + 32, fault


_STATIC: list[Field] = [
    make_field(name.decode(), value.decode()) for name, value in ((b"", b""), *HeaderTable.STATIC_TABLE)
]
_STATIC_SIZE = len(_STATIC)
_LAST_STATIC_BYTE = 0x80 | _STATIC_SIZE - 1
_INDEXED = re.compile(rb"[\x81-\xfe]+").match
_SHORT = 32
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


def _decoded(raw: bytes, huffman: bool) -> str:
    if huffman:
        try:
            raw = decode_huffman(raw)
        except HPACKDecodingError:
            raise _bad("invalid Huffman code") from None
    return raw.decode("latin-1")


def _new_field(name: str, raw: bytes, huffman: bool) -> Field:
    return make_field(name, _decoded(raw, huffman))


_field = lru_cache(maxsize=4096)(_new_field)


class HpackDecoder:
    """One connection's decoding context."""

    __slots__ = ("_capacity", "_entries", "_max_list_bytes", "_used", "newest", "version")

    def __init__(self, max_list_bytes: int) -> None:
        self._entries: list[Field] = []
        """The newest last."""
        self.newest: Field | None = None
        """The field that entered the table last."""
        self._used = 0
        self._capacity = TABLE_BYTES
        self._max_list_bytes = max_list_bytes
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
        updates = 0
        pos = 0
        end = len(block)
        while pos < end:
            run = _INDEXED(block, pos)
            if run is not None:  # 6.1 indexed, one byte each
                pos = run.end()
                fields += [
                    _STATIC[byte & 0x7F] if byte <= _LAST_STATIC_BYTE else entries[_LAST_STATIC_BYTE - byte]
                    for byte in run[0]
                ]
                continue
            byte = block[pos]
            if byte & 0x80:
                index, pos = _integer(block, pos, 0x7F)
                if not index:
                    raise _bad("header index 0")
                fields.append(entries[_STATIC_SIZE - 1 - index])
            elif byte & 0x40:  # 6.2.1 literal that enters the table
                field, pos = self._literal(block, pos, 0x3F)
                self._insert(field)
                fields.append(field)
            elif byte & 0x20:  # 6.3 table size update, only before the first field (4.2)
                updates += 1
                if fields or updates > 2:
                    raise _bad("misplaced table size update")
                capacity, pos = _integer(block, pos, 0x1F)
                if capacity > TABLE_BYTES:
                    raise _bad("table size update over the limit")
                self._capacity = capacity
                self._evict()
            else:  # 6.2.2, 6.2.3 literal that does not
                field, pos = self._literal(block, pos, 0x0F)
                fields.append(field)
        # No field out of the table is larger than the table, and Huffman code makes of a byte less than two.
        if len(fields) * TABLE_BYTES + 2 * end > self._max_list_bytes and self._size(fields) > self._max_list_bytes:
            return None
        return fields

    @staticmethod
    def _size(fields: list[Field]) -> int:
        return sum([field[2] for field in fields])

    def _literal(self, block: bytes, pos: int, mask: int) -> tuple[Field, int]:
        index, pos = _integer(block, pos, mask)
        if index >= _STATIC_SIZE:
            name = self._entries[_STATIC_SIZE - 1 - index][0]
        elif index:
            name = _STATIC[index][0]
        else:
            raw, huffman, pos = _string(block, pos)
            name = _decoded(raw, huffman)
        raw, huffman, pos = _string(block, pos)
        short = len(raw) <= _SHORT and len(name) <= _SHORT
        return (_field if short else _new_field)(name, raw, huffman), pos

    def _insert(self, field: Field) -> None:
        self._entries.append(field)
        self.newest = field
        self._used += field[2]
        self._evict()

    def _evict(self) -> None:
        """Make the table fit (4.3, 4.4: an entry larger than the table empties it)."""
        self.version += 1
        while self._used > self._capacity:
            self._used -= self._entries.pop(0)[2]
