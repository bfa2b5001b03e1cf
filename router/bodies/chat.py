"""`/v1/chat/completions`, and `/v1/messages`, which is a chat with the system prompt apart."""

from typing import Any, ClassVar, Final

from router.bodies.base import SMALL, Body, Document, read_max_tokens
from router.bodies.text import FIELD, TURN, Pieces, add_content, dumped, joined, media_in
from router.errors import bad_body

_LEADING: Final = ("system", "developer")
_STRINGS: Final = ("name", "reasoning_content", "reasoning", "tool_call_id", "refusal")
_CALLS: Final = ("tool_calls", "function_call")
_BEFORE_TURNS: Final = ("tools", "functions", "documents")


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
        turns = self._add_system(pieces, document)
        for name in _BEFORE_TURNS:
            value = document.get(name)
            if value:
                pieces.append(f"{TURN}{name}{FIELD}")
                pieces.append(dumped(value))
        for turn in turns:
            self._add(pieces, turn)
        return joined(pieces)

    def _add_system(self, pieces: Pieces, document: Document) -> list[Any]:
        """Append what comes before the tools; returns the turns that come after them."""
        turns: list[Any] = document["messages"]
        first = turns[0]
        if type(first) is dict and first.get("role") in _LEADING:
            self._add(pieces, first)
            return turns[1:]
        return turns

    def _add(self, pieces: Pieces, turn: dict[str, Any] | None) -> None:
        if turn is None:
            pieces.append(TURN)
            return
        role = turn.get("role")
        pieces.append(f"{TURN}{role}{FIELD}" if type(role) is str else f"{TURN}{FIELD}")
        content = turn.get("content")
        if type(content) is str:
            pieces.append(content)
        else:
            self.media += add_content(pieces, content)
        if len(turn) > 2:
            for name in _STRINGS:
                value = turn.get(name)
                if type(value) is str and value:
                    pieces.append(f"{FIELD}{name}{FIELD}")
                    pieces.append(value)
            for name in _CALLS:
                value = turn.get(name)
                if value:
                    pieces.append(f"{FIELD}{name}{FIELD}")
                    pieces.append(dumped(value))

    def _textual_bytes(self) -> int:
        if self.size < SMALL:
            return self.size
        self.media, inline = media_in((self.json or {}).get("messages"))
        return max(self.size - inline, 0)


class MessagesBody(ChatBody):
    """Anthropic's form: `system` as a string or as text blocks, content blocks in the turns."""

    __slots__ = ()
    kind: ClassVar[str] = "messages"

    def _add_system(self, pieces: Pieces, document: Document) -> list[Any]:
        system = document.get("system")
        if system:
            self._add(pieces, {"role": "system", "content": system})
        turns: list[Any] = document["messages"]
        return turns


def read_chat(document: Document, size: int) -> ChatBody:
    """A chat completion."""
    body = _read(ChatBody, document, size)
    body.max_tokens = read_max_tokens(document, "max_tokens", "max_completion_tokens")
    return body


def read_messages(document: Document, size: int) -> ChatBody:
    """An Anthropic message. Its streams always tell their usage."""
    body = _read(MessagesBody, document, size)
    body.include_usage = True
    body.max_tokens = read_max_tokens(document, "max_tokens")
    return body


def _read(form: type[ChatBody], document: Document, size: int) -> ChatBody:
    """Checks in AIBrix's order: the types of what is read, then whether there are messages."""
    model = document.get("model")
    if type(model) is not str:
        if model is not None:
            raise bad_body()
        model = ""
    stream = document.get("stream")
    if type(stream) is not bool:
        if stream is not None:
            raise bad_body()
        stream = False
    messages = document.get("messages")
    if messages is not None:
        if type(messages) is not list:
            raise bad_body()
        for turn in messages:
            if type(turn) is not dict and turn is not None:
                raise bad_body()
    options = document.get("stream_options")
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
    body = form(document, size, model, stream)
    body.include_usage = include_usage
    return body
