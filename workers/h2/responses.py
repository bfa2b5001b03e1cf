"""Header blocks that the server sends. They are constants or built without state: literals that never enter the
client's dynamic table (RFC 7541 6.2.2), so that one block fits every connection at any time.
"""

from typing import Final
from urllib.parse import quote

TABLE_SIZE_ZERO: Final = b"\x20"
"""The table size update that a client which shrinks its table must see before the next field (RFC 7541 4.2)."""


def _integer(value: int, mask: int, top: int) -> bytes:
    if value < mask:
        return bytes((top | value,))
    out = bytearray((top | mask,))
    value -= mask
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def literal(name: str, value: str) -> bytes:
    raw_name, raw_value = name.encode("ascii"), value.encode("latin-1")
    return b"\0" + _integer(len(raw_name), 0x7F, 0) + raw_name + _integer(len(raw_value), 0x7F, 0) + raw_value


_STATUS_200: Final = b"\x88"
GRPC_HEADERS: Final = _STATUS_200 + literal("content-type", "application/grpc")
TRAILERS_OK: Final = literal("grpc-status", "0")


def trailers(code: int, message: str) -> bytes:
    """grpc-status and, if there is one, grpc-message in its percent encoding, cut at 1 KiB."""
    if code == 0:
        return TRAILERS_OK
    block = literal("grpc-status", str(code))
    if message:
        safe = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"
        # A field's value neither begins nor ends with a space (RFC 9113 8.2.1).
        text = quote(message[:1024].strip(" "), safe=safe, errors="replace")
        block += literal("grpc-message", text)
    return block


def plain(status: int, body: bytes, allow: str = "") -> bytes:
    """Headers of a response to something that is not a gRPC call."""
    block = literal(":status", str(status)) + literal("content-type", "text/plain")
    if allow:
        block += literal("allow", allow)
    return block + literal("content-length", str(len(body)))
