"""Request bodies by path: bytes in, a checked `Body` with its model, its options and its routing text out.

Cost beside `orjson.loads`: see `bench/bodies.py`.
"""

from collections.abc import Callable
from typing import Final

from router.bodies.base import Body, Document, parse
from router.bodies.chat import read_chat
from router.bodies.completions import read_completion
from router.errors import unknown_path

Reader = Callable[[Document, int], Body]

READERS: Final[dict[str, Reader]] = {
    "/v1/chat/completions": read_chat,
    "/v1/completions": read_completion,
}


def strip_query(path: str) -> str:
    """The path without `?query` or `#fragment`."""
    if "?" in path:
        path = path[: path.index("?")]
    return path


def known_path(path: str) -> bool:
    """Whether requests to this path (without its query) are read here."""
    return path in READERS


def read_body(path: str, content_type: str, body: bytes) -> Body:
    """The body of a request to `path` (without its query). Raises `RequestError`, 501 for an unknown path."""
    reader = READERS.get(path)
    if reader is None:
        raise unknown_path()
    return reader(parse(body), len(body))


__all__ = ["Body", "known_path", "read_body", "strip_query"]
