"""Which reader a request body has, by its path."""

from collections.abc import Callable
from typing import Final

from router.bodies.audio import read_audio
from router.bodies.base import Body, Document, parse
from router.bodies.chat import read_chat, read_messages
from router.bodies.completions import read_completion
from router.bodies.embeddings import read_embeddings
from router.bodies.media import XDIT_PATHS, read_media
from router.bodies.pooling import read_classify, read_rerank
from router.bodies.responses import read_responses
from router.errors import unknown_path

Reader = Callable[[Document, int], Body]

READERS: Final[dict[str, Reader]] = {
    "/v1/chat/completions": read_chat,
    "/v1/messages": read_messages,
    "/v1/responses": read_responses,
    "/v1/completions": read_completion,
    "/v1/embeddings": read_embeddings,
    "/v1/rerank": read_rerank,
    "/v1/classify": read_classify,
    "/v1/images/generations": read_media,
    "/v1/video/generations": read_media,
}
FORMS: Final = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})


_BY_WIRE: Final = {path.encode(): reader for path, reader in READERS.items()}


def read_request(path: bytes, content_type: bytes, body: bytes) -> Body:
    """The body of a request, by the headers as they came. Raises `RequestError`, 501 for an unknown path."""
    reader = _BY_WIRE.get(path)
    if reader is not None:
        return reader(parse(body), len(body))
    return read_body(strip_query(path.decode("utf-8", "replace")), content_type.decode("latin-1"), body)


def takes_body(path: bytes) -> bool:
    """Whether a request to this path, as it came, means nothing without a body."""
    if path in _BY_WIRE:
        return True
    text = strip_query(path.decode("utf-8", "replace"))
    return text in READERS or text in FORMS


def strip_query(path: str) -> str:
    """The path without `?query`."""
    at = path.find("?")
    return path if at < 0 else path[:at]


def upstream_path(path: str, engine: str) -> str | None:
    """What `:path` must become for this engine; None to leave it, query and all."""
    return XDIT_PATHS.get(path) if engine == "xdit" else None


def read_body(path: str, content_type: str, body: bytes) -> Body:
    """The body of a request to `path` (without its query). Raises `RequestError`, 501 for an unknown path."""
    reader = READERS.get(path)
    if reader is not None:
        return reader(parse(body), len(body))
    if path in FORMS:
        return read_audio(content_type, body)
    raise unknown_path()
