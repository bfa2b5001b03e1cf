"""Errors of engines, brought into the one shape OpenAI clients read.

Engines answer `{"error": {...}}` (vLLM since 0.10, SGLang, Anthropic's form), the same fields at the top level (older
vLLM, TensorRT-LLM), or text. The first two are rewritten to OpenAI's four fields, a text becomes the message. The
whole body is looked at, whatever the status; what cannot be read is left exactly as it came, which is what `None`
means below. Nothing is replaced by words of our own.
"""

from typing import Any, Final, NamedTuple

import orjson

from router.errors import SERVICE_UNAVAILABLE, TRUE, X_ERROR_RESPONSE_UNKNOWN, Header, error_body, error_type

MAX_BYTES: Final = 1 << 20
"""An error longer than this is passed on as it is."""
UNKNOWN: Final = "unknown response"


class Normalised(NamedTuple):
    """What the client gets instead."""

    status: int
    body: bytes
    headers: tuple[Header, ...]


def normalise(status: int, body: bytes) -> Normalised | None:
    """The reply for a response with a status of 400 or more and this whole body. None: leave it alone, because it is
    empty, too long, or no text (compressed, say)."""
    if not body or len(body) > MAX_BYTES:
        return None
    found = _error_in(_parsed(body))
    if found is not None:
        return Normalised(status, _rendered(found), ((X_ERROR_RESPONSE_UNKNOWN, TRUE),))
    try:
        return _in_words(status, body.decode())
    except UnicodeDecodeError:
        return None


def without_words(status: int) -> Normalised:
    """AIBrix's reply for an error whose body came and was empty: an error that says nothing."""
    return _in_words(status, "")


def _in_words(status: int, text: str) -> Normalised:
    code = SERVICE_UNAVAILABLE if status == 503 else None
    return Normalised(status, error_body(text, error_type(status), code), ())


def disguised(document: dict[str, Any] | None) -> Normalised | None:
    """The reply for a 200 whose body is an error, from the parsed body. The status is the body's own numeric `code`,
    500 if it has none. None: a reply like any other."""
    if document is None or document.get("model"):
        return None
    found = _error_in(document)
    if found is None:
        return None
    status = _status(found.get("code"))
    if status < 400:
        return None
    return Normalised(status, _rendered(found), ((X_ERROR_RESPONSE_UNKNOWN, TRUE),))


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _error_in(document: Any) -> dict[str, Any] | None:
    """The object that holds the error's fields."""
    if type(document) is not dict:
        return None
    nested = document.get("error")
    if type(nested) is dict:
        return nested
    return document if "message" in document else None


def _rendered(found: dict[str, Any]) -> bytes:
    message = _text(found.get("message"))
    return error_body(
        UNKNOWN if message is None else message, _text(found.get("type")), found.get("code"), found.get("param")
    )


def _text(value: Any) -> str | None:
    """Messages and types become strings, whatever they were."""
    if value is None or type(value) is str:
        return value
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return UNKNOWN


def _status(code: Any) -> int:
    """The HTTP status that a body's own code names; 500 where it names none."""
    if type(code) is str and code.isascii() and code.isdigit() and len(code) == 3:
        code = int(code)
    if type(code) in (int, float) and 100 <= code < 600:
        return int(code)
    return 500
