"""What all request bodies have in common: the one parse, the checks every path shares, and the `Body` they give.

A path's reader takes the parsed document and returns a `Body`, or raises `RequestError`. Reading does the checks and
no more; the routing text is built when a strategy asks for it, because most strategies never do.

Keys are taken as they are spelt. Of a repeated key the last one counts, which is also how engines read it, so what
is checked and routed on is what the engine will see.
"""

import re
from typing import Any, ClassVar, Final

import orjson
from mypy_extensions import mypyc_attr

from router.bodies.text import counted_tokens
from router.errors import RequestError, bad_body, missing

Document = dict[str, Any]

BYTES_PER_TOKEN: Final = 4
MEDIA_TOKENS: Final = 512
"""What an image, a clip or a file is taken to cost in the prompt; vision models make some 200 to 2,000 of one."""
SMALL: Final = 8192
"""Bytes. A body this small is not searched for inline media before its tokens are estimated."""

COUNTED_BYTES: Final = 1 << 20
MAX_VALUES: Final = 1 << 20
"""A body longer than the first with more values than the second is refused. Parsed, each takes up to 150 bytes and
0.6 µs, however short it was sent: 32 MiB of `{},` would take 1.6 GB, and the worker's other requests ten seconds."""
REPAIRABLE_BYTES: Final = 4 << 20
REPAIRABLE_ESCAPES: Final = 50_000
"""Bodies past these with lone surrogates in them are refused: repairing costs 0.5 µs an escape."""
_ESCAPE: Final = re.compile(
    rb"\\(?:([^u]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u(?![dD][89a-fA-F]))"
    rb"|u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
"""One escape of a JSON string. The first group takes all but lone surrogates."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Body:
    """A request body that passed the checks of its path."""

    __slots__ = ("_text", "include_usage", "json", "max_tokens", "media", "model", "size", "stream")

    kind: ClassVar[str]

    def __init__(self, document: Document | None, size: int, model: str, stream: bool) -> None:
        self.json = document
        """The parsed document; None for a form."""
        self.size = size
        """Bytes of the body as sent."""
        self.model = model
        self.stream = stream
        self.include_usage = False
        """Whether a streamed answer will tell its usage: `stream_options.include_usage`, or the path always does."""
        self.max_tokens = 0
        """The client's bound on output tokens, 0 when it gave none."""
        self.media = 0
        """Images and the like, known once the routing text or the estimate was asked for."""
        self._text: bytes | None = None

    def routing_text(self) -> bytes:
        """The prompt as UTF-8, or as four little-endian bytes per token id. Built once, when first asked for. Equal
        beginnings of prompts give equal beginnings of text."""
        text = self._text
        if text is None:
            text = self._text = self._write()
        return text

    @property
    def approximate_tokens(self) -> int:
        """Prompt tokens: exact for token ids, otherwise bytes / 4. Taken from the size of the body, less inline media,
        as long as nobody needed the text."""
        size = self._textual_bytes() if self._text is None else len(self._text)
        return size // BYTES_PER_TOKEN + self.media * MEDIA_TOKENS

    @property
    def wants_no_usage(self) -> bool:
        """Whether it is a streamed chat whose answer will not tell its usage, although it could."""
        return self.stream and not self.include_usage and self.kind == "chat"

    def counted_tokens(self) -> int:
        """Prompt tokens by counting words: nearer to a tokenizer than `approximate_tokens` and some 100 times slower.
        For what compares the prompt with a threshold that somebody chose."""
        return counted_tokens(self.routing_text().decode("utf-8", "replace"))

    def _write(self) -> bytes:
        """Build the routing text."""
        return b""

    def _textual_bytes(self) -> int:
        """Bytes of the body that are prompt; sets `media`."""
        return self.size


def parse(body: bytes) -> Document:
    """The JSON object of a body; `null` counts as one without fields."""
    if len(body) > COUNTED_BYTES and _has_too_many_values(body):
        raise bad_body(f"request body has more than {MAX_VALUES} JSON values")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        document = _parse_repaired(body, error)
    if type(document) is dict:
        return document
    if document is None:
        return {}
    raise bad_body()


def _has_too_many_values(body: bytes) -> bool:
    if _max_values(body) <= MAX_VALUES:
        return False
    # It may be a long text with many commas: look again without strings.
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > 2 * MAX_VALUES:
        return True
    return _max_values(b"".join(unescaped.split(b'"')[::2])) > MAX_VALUES


def _max_values(json: bytes) -> int:
    """At least as many as there are: each value but the first follows a comma or begins an array or object."""
    return json.count(b",") + json.count(b"[") + json.count(b"{") + 1


def _parse_repaired(body: bytes, error: orjson.JSONDecodeError) -> Any:
    """Escaped lone surrogates are what a JavaScript client sends of a text that was cut inside an emoji. Engines take
    them, orjson does not, so they are read as U+FFFD here; the body itself goes on as it came."""
    if "surrogate" in error.msg and len(body) <= REPAIRABLE_BYTES and 0 < body.count(b"\\") <= REPAIRABLE_ESCAPES:
        try:
            return orjson.loads(_ESCAPE.sub(lambda match: match[0] if match[1] else b"\\ufffd", body))
        except orjson.JSONDecodeError:
            pass
    raise bad_body() from error


def read_model(document: Document) -> str:
    """The model's name, empty when there is none: no pod serves it, which is said where models are looked up."""
    model = document.get("model")
    if type(model) is str:
        return model
    if model is None:
        return ""
    raise bad_body()


def require_model(document: Document) -> str:
    """The model's name, on the paths that say so when it is missing."""
    model = read_model(document)
    if not model:
        raise missing("model")
    return model


def read_stream(document: Document) -> bool:
    """Whether the answer shall be streamed."""
    stream = document.get("stream")
    if stream is None:
        return False
    if type(stream) is bool:
        return stream
    raise bad_body()


def refuse_stream(document: Document, what: str) -> None:
    """For the paths whose answers cannot be streamed."""
    stream = document.get("stream")
    if stream is not None and stream is not False:
        raise bad_body(f"stream not supported for {what}", "stream")


def read_max_tokens(document: Document, *names: str) -> int:
    """The first of the named bounds that is a positive number. What else may stand there is the engine's to refuse."""
    for name in names:
        value = document.get(name)
        if type(value) is int and value > 0:
            return value
    return 0


def wants_usage(document: Document) -> bool:
    """`stream_options.include_usage`, on the paths that do not check it."""
    options = document.get("stream_options")
    return type(options) is dict and options.get("include_usage") is True


def not_strings(param: str) -> RequestError:
    """An `input` of neither form."""
    return bad_body(f"'{param}' must be a string or array of strings", param)
