"""`/v1/responses`."""

from typing import Any, ClassVar, Final

from router.bodies.base import SMALL, Body, Document, read_max_tokens, read_stream, require_model
from router.bodies.text import FIELD, TURN, Pieces, add_content, dumped, joined, media_in
from router.errors import bad_body, missing

_ITEMS: Final = frozenset({dict, type(None)})


class ResponsesBody(Body):
    """Instructions, tools and input items, in the order engines put them into the prompt."""

    __slots__ = ()
    kind: ClassVar[str] = "responses"

    def _write(self) -> bytes:
        document = self.json or {}
        pieces: Pieces = []
        self.media = 0
        salt = document.get("cache_salt")
        if type(salt) is str:
            pieces.append(f"{salt}{TURN}")
        instructions = document.get("instructions")
        if instructions:
            pieces.append(f"{TURN}system{FIELD}")
            self.media += add_content(pieces, instructions)
        tools = document.get("tools")
        if tools:
            pieces.append(f"{TURN}tools{FIELD}")
            pieces.append(dumped(tools))
        given = document.get("input")
        if type(given) is str:
            pieces.append(f"{TURN}user{FIELD}{given}")
        else:
            for item in given or ():
                self._add(pieces, item)
        return joined(pieces)

    def _add(self, pieces: Pieces, item: dict[str, Any] | None) -> None:
        if item is None:
            pieces.append(TURN)
            return
        role = item.get("role")
        if type(role) is str:
            pieces.append(f"{TURN}{role}{FIELD}")
            self.media += add_content(pieces, item.get("content"))
        else:  # tool calls, their outputs, reasoning
            pieces.append(TURN)
            pieces.append(dumped(item))

    def _textual_bytes(self) -> int:
        if self.size < SMALL:
            return self.size
        self.media, inline = media_in((self.json or {}).get("input"))
        return max(self.size - inline, 0)


def read_responses(document: Document, size: int) -> ResponsesBody:
    """A string (which may be empty) or input items. Its streams always tell their usage."""
    stream = read_stream(document)
    body = ResponsesBody(document, size, require_model(document), stream)
    given = document.get("input")
    if given is None:
        raise missing("input")
    if type(given) is not str:
        if type(given) is not list or not _ITEMS.issuperset(map(type, given)):
            raise bad_body("'input' must be a string or an array of input items", "input")
        if not given:
            raise bad_body("'input' array cannot be empty", "input")
    body.include_usage = True
    body.max_tokens = read_max_tokens(document, "max_output_tokens", "max_tokens", "max_completion_tokens")
    return body
