"""`/v1/completions`: a prompt as text or as token ids, one or many."""

from array import array
from typing import Any, ClassVar

from router.bodies.base import Body, Document, read_max_tokens, read_model, read_stream
from router.bodies.text import TURN, add_part, joined
from router.errors import RequestError, bad_body


class CompletionBody(Body):
    """One or several prompts."""

    __slots__ = ()
    kind: ClassVar[str] = "completion"

    def _write(self) -> bytes:
        document = self.json or {}
        prompt = document.get("prompt")
        pieces: list[str] = []
        salt = document.get("cache_salt")
        if type(salt) is str:
            pieces.append(f"{salt}{TURN}")
        if type(prompt) is str:
            pieces.append(prompt)
        elif type(prompt) is list:
            pieces.append(TURN.join(prompt))
        embeds = document.get("prompt_embeds")
        if embeds:
            add_part(pieces, {"type": "prompt_embeds", "data": embeds})
        return joined(pieces)


def read_completion(document: Document, size: int) -> CompletionBody:
    """`prompt` may be absent or null (an engine that takes `prompt_embeds` needs none)."""
    body = CompletionBody(document, size, read_model(document), read_stream(document))
    prompt = document.get("prompt")
    if type(prompt) is list:
        body._text = _tokens(prompt)
    elif prompt is not None and type(prompt) is not str:
        raise bad_body()
    options = document.get("stream_options")
    body.include_usage = type(options) is dict and options.get("include_usage") is True
    body.max_tokens = read_max_tokens(document, "max_tokens", "max_completion_tokens")
    return body


def _tokens(prompt: list[Any]) -> bytes | None:
    """A list prompt's token ids, four bytes each; None if it is a list of strings."""
    if not prompt:
        raise bad_body("'prompt' array cannot be empty", "prompt")
    first = type(prompt[0])
    if first is str:
        if {str}.issuperset(map(type, prompt)):
            return None
        raise _not_a_prompt()
    if first is int:
        return pack(prompt)
    if first is list:
        return b"".join([pack(ids) for ids in prompt])
    raise _not_a_prompt()


def pack(ids: Any) -> bytes:
    """Token ids as little-endian 32 bit numbers."""
    try:
        packed = array("I", ids)
    except (TypeError, OverflowError, ValueError) as error:
        raise _not_a_prompt() from error
    return packed.tobytes()


def _not_a_prompt() -> RequestError:
    return bad_body("'prompt' must be a string, an array of strings, token ids, or an array of token ids", "prompt")
