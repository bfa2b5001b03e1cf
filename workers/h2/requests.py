"""From header fields to what is to be done with a stream: RFC 9113 8.2, 8.3 and the gRPC wire protocol.

`RequestReader.read` is the only place where a request's header block is looked at. What it finds is a `Request`,
kept under the block's bytes as long as the dynamic table stands still: clients that repeat themselves cost one dict
lookup.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Final

from workers.calls import Call, Metadata, Method, Methods, Status
from workers.h2.faults import StreamFault
from workers.h2.frames import PROTOCOL_ERROR
from workers.h2.hpack_decoder import Field, HpackDecoder
from workers.h2.responses import GRPC_HEADERS, plain, trailers

_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])").fullmatch
_UNIT_SECONDS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_GRPC: Final = re.compile(r"application/grpc(?:[+;].*)?", re.IGNORECASE).fullmatch
_PSEUDO: Final = {":method", ":scheme", ":path", ":authority"}
_MAX_CACHED_LENGTH: Final = 1024
_MAX_CACHED_LIST_BYTES: Final = 4096
"""A short block can stand for much by repeating what is in the dynamic table."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A whole response: header block and body (empty: the headers end the stream)."""

    block: bytes
    body: bytes = b""


class Request:
    """A well-formed request. `method` is None when the answer is `refusal`, `content_length` -1 when it is not stated.

    `plain_method` is `method.open` for the many requests that have no length and whose method does not push, `listens`
    what the method says.
    """

    __slots__ = ("content_length", "listens", "metadata", "method", "plain_method", "refusal", "timeout_seconds")

    def __init__(
        self,
        method: Method | None,
        metadata: Metadata = MappingProxyType({}),
        timeout_seconds: float = inf,
        content_length: int = -1,
        refusal: Refusal | None = None,
        plain_method: Callable[[Metadata], Call] | None = None,
    ) -> None:
        self.method = method
        self.listens = method is not None and method.listens
        self.metadata = metadata
        self.timeout_seconds = timeout_seconds
        self.content_length = content_length
        self.refusal = refusal
        self.plain_method = plain_method


TOO_LARGE: Final = Request(
    None, refusal=Refusal(plain(431, b"request headers too large\n"), b"request headers too large\n")
)


class RequestReader:
    """Reads the header blocks of one connection."""

    __slots__ = ("_but_for_deadline", "_cache", "_cache_entries", "_decoder", "_methods", "cached")

    def __init__(self, methods: Methods, max_header_list_bytes: int, cache_entries: int) -> None:
        self._methods = methods
        self._decoder = HpackDecoder(max_header_list_bytes)
        self._cache: dict[bytes, Request] = {}
        self.cached = self._cache.get
        """The first half of `read`, for callers in a hurry."""
        self._cache_entries = cache_entries
        self._but_for_deadline: dict[tuple[object, ...], Request] = {}

    def read(self, block: bytes) -> Request:
        """Raises `ConnectionFault` if the block cannot be decoded, `StreamFault` if it is no request."""
        request = self._cache.get(block)
        if request is not None:
            return request
        decoder = self._decoder
        version = decoder.version
        fields = decoder.decode(block)
        if decoder.version != version:
            self._cache.clear()
            if fields is None:
                return TOO_LARGE
            newest = decoder.newest
            if newest is None or newest.name != "grpc-timeout" or not self._may_be_kept(block):
                return read_request(fields, self._methods)
            return self._with_deadline(fields, newest)
        if fields is None:
            return TOO_LARGE
        request = read_request(fields, self._methods)
        if self._may_be_kept(block):
            if len(self._cache) >= self._cache_entries:
                self._cache.clear()
            self._cache[block] = request
        return request

    def _may_be_kept(self, block: bytes) -> bool:
        """Whether the block that was just decoded is small, in both of its forms."""
        return len(block) <= _MAX_CACHED_LENGTH and self._decoder.list_bytes <= _MAX_CACHED_LIST_BYTES

    def _with_deadline(self, fields: list[Field], deadline: Field) -> Request:
        """A request like others but for its deadline, which is one of its fields."""
        if deadline not in fields:
            return read_request(fields, self._methods)
        place = fields.index(deadline)
        key = (place, *fields[:place], *fields[place + 1 :])
        known = self._but_for_deadline.get(key)
        match = _TIMEOUT(deadline.value)
        if known is not None and match:
            seconds = int(match[1]) * _UNIT_SECONDS[match[2]]
            return Request(known.method, known.metadata, seconds, -1, None, known.plain_method)
        request = read_request(fields, self._methods)
        if request.plain_method is not None:
            if len(self._but_for_deadline) >= self._cache_entries:
                self._but_for_deadline.clear()
            self._but_for_deadline[key] = request
        return request

    def skip(self, block: bytes) -> None:
        """Keep the decoding state right for a block whose fields nobody wants (RFC 9113 4.3)."""
        self._decode(block)

    def read_trailers(self, block: bytes) -> None:
        """Raises `StreamFault` if the block cannot be a request's trailers (8.1)."""
        for field in self._decode(block) or ():
            if field.fault or field.name[0] == ":":
                raise StreamFault(PROTOCOL_ERROR, field.fault or "pseudo header in trailers")

    def _decode(self, block: bytes) -> list[Field] | None:
        version = self._decoder.version
        fields = self._decoder.decode(block)
        if self._decoder.version != version:
            self._cache.clear()
        return fields


def read_request(fields: list[Field], methods: Methods) -> Request:
    pseudo: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for field in fields:
        if field.fault:
            raise StreamFault(PROTOCOL_ERROR, field.fault)
        name, value = field.name, field.value
        if name[0] == ":":
            if metadata or name in pseudo or name not in _PSEUDO:  # 8.3
                raise StreamFault(PROTOCOL_ERROR, "unknown, repeated or misplaced pseudo header")
            pseudo[name] = value
        elif name in metadata:
            if name == "content-length":
                if metadata[name] != value:
                    raise StreamFault(PROTOCOL_ERROR, "contradicting content-length")
                continue
            metadata[name] += ("; " if name == "cookie" else ", ") + value  # 8.2.3, RFC 9110 5.3
        else:
            metadata[name] = value
    verb, path = pseudo.get(":method"), pseudo.get(":path")
    if not verb or (verb != "CONNECT" and (not path or ":scheme" not in pseudo)):  # 8.3.1
        raise StreamFault(PROTOCOL_ERROR, "missing pseudo header")
    content_length = -1
    if "content-length" in metadata:
        text = metadata["content-length"]
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise StreamFault(PROTOCOL_ERROR, "invalid content-length")
        content_length = int(text)
    if verb != "POST":
        body = b"" if verb == "HEAD" else b"gRPC calls are POST requests\n"
        return Request(None, content_length=content_length, refusal=Refusal(plain(405, body, "POST"), body))
    if not _GRPC(metadata.get("content-type", "")):
        body = b"gRPC calls have content-type application/grpc\n"
        return Request(None, content_length=content_length, refusal=Refusal(plain(415, body), body))
    method = methods.get(path or "")
    if method is None:
        return _trailers_only(content_length, Status.UNIMPLEMENTED, f"unknown method {path}")
    timeout = inf
    if "grpc-timeout" in metadata:
        match = _TIMEOUT(metadata["grpc-timeout"])
        if not match:
            return _trailers_only(content_length, Status.INTERNAL, "malformed grpc-timeout")
        timeout = int(match[1]) * _UNIT_SECONDS[match[2]]
        del metadata["grpc-timeout"]  # no two calls of a client have the same
    for name in [name for name in metadata if name.endswith("-bin")]:
        del metadata[name]
    plain_method = method.open if content_length < 0 and not method.pushes else None
    return Request(method, metadata, timeout, content_length, None, plain_method)


def _trailers_only(content_length: int, code: int, message: str) -> Request:
    return Request(None, content_length=content_length, refusal=Refusal(GRPC_HEADERS + trailers(code, message)))
