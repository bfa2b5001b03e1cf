"""`/v1/audio/transcriptions` and `/v1/audio/translations`: forms (RFC 7578, RFC 2046 section 5.1) with a file in them.

Two short fields are wanted of a body that is mostly sound, so the parts are walked with `bytes.find` and nothing is
copied but those fields: 0.5 ms a megabyte (`pytest tests/router/bodies/test_body_cost.py --benchmark-enable`). Parts,
header bytes and field lengths are bounded. The standard library's `email` builds a message tree of copies instead,
and python-multipart is another dependency for eighty lines.
"""

import re
from collections.abc import Iterator
from typing import ClassVar, Final

from router.bodies.base import MEDIA_TOKENS, Body
from router.errors import bad_body, bad_multipart

MAX_PARTS: Final = 256
MAX_PART_HEADER_LENGTH: Final = 16 << 10
MAX_BOUNDARY_LENGTH: Final = 256
MAX_FIELD_LENGTH: Final = 4096
MAX_CONTENT_TYPE_LENGTH: Final = 1024
MAX_FALSE_BOUNDARIES: Final = 1 << 16
"""Places in a part that look like its end and are not: a form with more is made to take time."""

_PARAMETER: Final = re.compile(r';\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))\s*')
_FORM_NAME: Final = re.compile(
    rb'^content-disposition[ \t]*:[^\r\n]*?;[ \t]*name[ \t]*=[ \t]*(?:"([^"\r\n]*)"|([^;\s"]+))', re.I | re.M
)


class AudioBody(Body):
    """A file to transcribe."""

    __slots__ = ()
    kind: ClassVar[str] = "audio"

    @property
    def approximate_tokens(self) -> int:
        """One medium, whatever its length in bytes: encoders cut sound into windows of fixed size."""
        return MEDIA_TOKENS


def read_audio(content_type: str, body: bytes) -> AudioBody:
    """The form's `model` and `stream`; of a repeated field the last counts, as for engines."""
    boundary = read_boundary(content_type)
    model = ""
    stream = False
    for name, value in form_fields(body, boundary):
        if name == b"model":
            if value is None:
                raise bad_multipart("failed to read model field", "model")
            try:
                model = value.decode().strip()
            except UnicodeDecodeError as error:
                raise bad_multipart("failed to read model field", "model") from error
        elif name == b"stream" and value is not None:
            stream = value.strip().lower() in (b"true", b"1")
    if not model:
        raise bad_multipart("'model' is a required property", "model")
    return AudioBody(None, len(body), model, stream)


def read_boundary(content_type: str) -> bytes:
    """The boundary of a multipart content type."""
    if len(content_type) > MAX_CONTENT_TYPE_LENGTH:
        raise bad_multipart("invalid content-type header")
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type.startswith("multipart/"):
        raise bad_body("audio requests must use multipart/form-data content-type")
    at = content_type.find(";")
    boundary = ""
    while at >= 0 and content_type[at:].strip(" \t;"):
        match = _PARAMETER.match(content_type, at)
        if match is None:
            raise bad_multipart("invalid content-type header")
        if match[1].lower() == "boundary":
            boundary = match[2] if match[3] is None else match[3]
        at = match.end() if match.end() < len(content_type) else -1
    if not boundary:
        raise bad_multipart("missing boundary in content-type")
    if len(boundary) > MAX_BOUNDARY_LENGTH:
        raise bad_multipart("invalid content-type header")
    return boundary.encode("utf-8", "replace")


def form_fields(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """Name and value of each part, in order; files and long fields come as empty values, a part that is cut off as
    None, after which the form counts as broken."""
    delimiter = b"--" + boundary
    at = 0 if body.startswith(delimiter) else body.find(b"\n" + delimiter) + 1
    if not at and not body.startswith(delimiter):
        raise bad_multipart("failed to parse multipart form")
    at += len(delimiter)
    newline = b"\r\n" if body[at : at + 64].lstrip(b" \t").startswith(b"\r\n") else b"\n"
    closing = newline + delimiter
    for _ in range(MAX_PARTS):
        if body.startswith(b"--", at):
            return
        line_end = body.find(newline, at)
        if line_end < 0 or body[at:line_end].strip(b" \t"):
            break
        start = line_end + len(newline)
        if body.startswith(newline, start):  # no headers at all
            header_end = start - len(newline)
        else:
            header_end = body.find(newline + newline, start, start + MAX_PART_HEADER_LENGTH)
            if header_end < 0:
                break
        header = body[start:header_end]
        value_start = header_end + 2 * len(newline)
        value_end = _end_of_value(body, closing, value_start - len(newline))
        match = _FORM_NAME.search(header)
        name = b"" if match is None else match[1] if match[2] is None else match[2]
        if value_end < 0:
            yield name, None
            break
        short = name in (b"model", b"stream") and value_end - value_start <= MAX_FIELD_LENGTH
        yield name, body[value_start:value_end] if short else b""
        at = value_end + len(closing)
    raise bad_multipart("failed to parse multipart form")


def _end_of_value(body: bytes, closing: bytes, start: int) -> int:
    """Where the next delimiter line begins. A boundary that is only the beginning of a longer word is content."""
    at = start
    for _ in range(MAX_FALSE_BOUNDARIES):
        at = body.find(closing, at)
        if at < 0:
            break
        after = at + len(closing)
        if body[after : after + 1] in (b"\r", b"\n", b" ", b"\t", b"-"):
            return at
        at += 1
    return -1
