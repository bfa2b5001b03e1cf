"""`/v1/chat/completions`."""

from typing import Any, ClassVar, Final

from router.bodies.base import SMALL, Body, Document, read_max_tokens
from router.bodies.text import FIELD, TURN, Pieces, add_content, dumped, joined, media_in
from router.errors import bad_body

_TURNS: Final = frozenset({dict, type(None)})
_LEADING: Final = frozenset({"system", "developer"})
_STRINGS: Final = ("name", "reasoning_content", "reasoning", "tool_call_id", "refusal")
_CALLS: Final = ("tool_calls", "function_call")


class ChatBody(Body):
    """Messages, tools and what else a chat template prints."""

    __slots__ = ()
    kind: ClassVar[str] = "chat"

    def _write(self) -> bytes:
        document = self.json or {}
        pieces: Pieces = []
        self.media = 0
        salt = document.get("cache_salt")
        if type(salt) is str:  # vLLM shares no block between salts
            pieces.append(f"{salt}{TURN}")
        messages = document["messages"]
        first = messages[0]
        rest = messages
        if type(first) is dict and first.get("role") in _LEADING:
            self._add(pieces, first)
            rest = messages[1:]
        for name in ("tools", "functions", "documents"):
            value = document.get(name)
            if value:
                pieces.append(f"{TURN}{name}{FIELD}")
                pieces.append(dumped(value))
        for message in rest:
            self._add(pieces, message)
        return joined(pieces)

    def _add(self, pieces: Pieces, message: dict[str, Any] | None) -> None:
        if message is None:
            pieces.append(TURN)
            return
        role = message.get("role")
        pieces.append(f"{TURN}{role}{FIELD}" if type(role) is str else f"{TURN}{FIELD}")
        content = message.get("content")
        if type(content) is str:
            pieces.append(content)
        else:
            self.media += add_content(pieces, content)
        if len(message) > 2:
            for name in _STRINGS:
                value = message.get(name)
                if type(value) is str and value:
                    pieces.append(f"{FIELD}{name}{FIELD}")
                    pieces.append(value)
            for name in _CALLS:
                value = message.get(name)
                if value:
                    pieces.append(f"{FIELD}{name}{FIELD}")
                    pieces.append(dumped(value))

    def _textual_bytes(self) -> int:
        if self.size < SMALL:
            return self.size
        self.media, inline = media_in((self.json or {}).get("messages"), "content")
        return max(self.size - inline, 0)


def read_chat(document: Document, size: int) -> ChatBody:
    """Checks in AIBrix's order: the types of what is read, then whether there are messages."""
    get = document.get
    model = get("model")
    if type(model) is not str:
        if model is not None:
            raise bad_body()
        model = ""
    stream = get("stream")
    if type(stream) is not bool:
        if stream is not None:
            raise bad_body()
        stream = False
    messages = get("messages")
    if messages is not None and (type(messages) is not list or not _TURNS.issuperset(map(type, messages))):
        raise bad_body()
    options = get("stream_options")
    include_usage = False
    if options is not None:
        if type(options) is not dict:
            raise bad_body()
        wanted = options.get("include_usage")
        if wanted is not None and type(wanted) is not bool:
            raise bad_body()
        include_usage = wanted is True
    if not messages:
        raise bad_body("no messages in the request body", "messages")
    body = ChatBody(document, size, model, stream)
    body.include_usage = include_usage
    body.max_tokens = read_max_tokens(document, "max_tokens", "max_completion_tokens")
    return body
