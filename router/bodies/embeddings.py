"""`/v1/embeddings`, with OpenAI's limits on its input.

The limits are in tokens, which only the model's own tokenizer can count. AIBrix counts with tiktoken's cl100k, we by
words (`counted_tokens`), and only the texts that could be over the limit.
"""

from typing import Any, ClassVar, Final

from router.bodies.base import BYTES_PER_TOKEN, Body, Document, read_model, refuse_stream
from router.bodies.text import TURN, Pieces, add_content, counted_tokens, dumped, joined, packed_ids
from router.errors import RequestError, bad_body

MAX_TOKENS: Final = 8192
"""Per input."""
MAX_TOKENS_IN_ALL: Final = 300_000
MAX_TOKEN_ARRAY_LENGTH: Final = 2048

_FLAT: Final = ("text", "image", "video")
_STRING_FIELDS: Final = ("type", *_FLAT)
_URL_FIELDS: Final = ("image_url", "video_url")


class EmbeddingsBody(Body):
    """Texts, token ids or content parts."""

    __slots__ = ()
    kind: ClassVar[str] = "embeddings"

    def _write(self) -> bytes:
        given = (self.json or {}).get("input")
        if type(given) is str:
            return joined([given])
        pieces: Pieces = []
        if type(given) is list:
            for item in given:
                if pieces:
                    pieces.append(TURN)
                if type(item) is dict:
                    self.media += add_content(pieces, [item])
                else:
                    pieces.append(item if type(item) is str else dumped(item))
        return joined(pieces)

    def _textual_bytes(self) -> int:
        given = (self.json or {}).get("input")
        if type(given) is list and given and type(given[0]) is dict:
            return len(self.routing_text())
        return self.size


def read_embeddings(document: Document, size: int) -> EmbeddingsBody:
    """The input's shape and size first, then `stream`, which embeddings cannot do."""
    body = EmbeddingsBody(document, size, read_model(document), False)
    if "input" in document:
        body._text = _check(document["input"])
    refuse_stream(document, "embeddings")
    return body


def _wrong(message: str) -> RequestError:
    return bad_body(message, "input")


def _check(given: Any) -> bytes | None:
    """Raises if the input is none or too much; returns the packed ids of token inputs."""
    if given is None:
        raise _wrong("input cannot be an empty string")
    if type(given) is str:
        _check_texts([given])
        return None
    if type(given) is not list:
        raise bad_body()
    if not given:
        raise _wrong("input array cannot be empty")
    types = set(map(type, given))
    if types == {str}:
        _check_texts(given)
    elif types == {int}:
        _check_tokens([given])
        return packed_ids(given)
    elif types == {list}:
        _check_tokens(given)
        arrays = [packed_ids(ids) for ids in given]
        return None if None in arrays else b"".join(ids for ids in arrays if ids)
    elif dict in types:
        _check_parts(given)
    return None


def _check_texts(texts: list[str]) -> None:
    single = len(texts) == 1
    total = 0
    for index, text in enumerate(texts):
        if not text:
            raise _wrong(
                "input cannot be an empty string" if single else f"input at index {index} cannot be an empty string"
            )
        tokens = _at_most(text)
        if tokens > MAX_TOKENS:
            which = "input" if single else f"input at index {index}"
            raise _wrong(f"{which} exceeds max tokens per model ({MAX_TOKENS}), estimated tokens: {tokens}")
        total += tokens
    if total > MAX_TOKENS_IN_ALL:
        raise _wrong(f"total tokens across all inputs exceeds maximum ({MAX_TOKENS_IN_ALL}), estimated total: {total}")


def _at_most(text: str) -> int:
    """Tokens of a text: counted where it could be over the limit, else a quarter of its characters."""
    return len(text) // BYTES_PER_TOKEN if len(text) <= MAX_TOKENS else counted_tokens(text)


def _check_tokens(arrays: list[list[Any]]) -> None:
    single = len(arrays) == 1
    total = 0
    for index, ids in enumerate(arrays):
        which = "token array" if single else f"token array at index {index}"
        length = len(ids)
        if not length:
            raise _wrong(f"{which} cannot be empty")
        if length > MAX_TOKENS:
            raise _wrong(f"{which} exceeds max tokens per model ({MAX_TOKENS}), actual tokens: {length}")
        if length > MAX_TOKEN_ARRAY_LENGTH:
            raise _wrong(f"{which} exceeds max dimensions ({MAX_TOKEN_ARRAY_LENGTH}), actual dimensions: {length}")
        total += length
    if total > MAX_TOKENS_IN_ALL:
        raise _wrong(f"total tokens across all inputs exceeds maximum ({MAX_TOKENS_IN_ALL}), actual total: {total}")


def _check_parts(parts: list[Any]) -> None:
    """OpenAI's typed content parts, or SGLang's flat ones: {"text"} / {"image"} / {"video"}."""
    for part in parts:
        if part is None:
            continue
        if type(part) is not dict:
            raise bad_body()
        for name in _STRING_FIELDS:
            if part.get(name) is not None and type(part[name]) is not str:
                raise bad_body()
    if not _is_part(parts[0]):
        raise bad_body()
    for index, part in enumerate(parts):
        _check_part(index, part or {})


def _is_part(part: Any) -> bool:
    return part is not None and (any(part.get(name) for name in _STRING_FIELDS) or any(n in part for n in _URL_FIELDS))


def _check_part(index: int, part: dict[str, Any]) -> None:
    kind = part.get("type") or next((name for name in _FLAT if part.get(name)), None)
    where = f"input at index {index}"
    if kind is None:
        raise _wrong(f"{where} must set one of text, image, or video")
    if kind == "text":
        if not part.get("text"):
            raise _wrong(f"{where} cannot be an empty string")
    elif kind in _URL_FIELDS:
        if kind not in part:
            raise _wrong(f"{where} is missing {kind}")
    elif kind in _FLAT:
        if not part.get(kind):
            raise _wrong(f"{where} is missing {kind}")
    else:
        raise _wrong(f"{where} has unsupported content type {dumped(kind[:64])}")
