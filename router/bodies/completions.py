"""`/v1/completions`: a prompt as text or as token ids, one or many."""

from typing import Any, ClassVar

from router.bodies.base import Body, Document, read_max_tokens, read_model, read_stream, wants_usage
from router.bodies.text import TURN, joined, medium, packed_ids
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
            pieces.append(medium("prompt_embeds", embeds))
        return joined(pieces)


def read_completion(document: Document, size: int) -> CompletionBody:
    """`prompt` may be absent or null (an engine that takes `prompt_embeds` needs none)."""
    body = CompletionBody(document, size, read_model(document), read_stream(document))
    prompt = document.get("prompt")
    if type(prompt) is list:
        body._text = _tokens(prompt)
    elif prompt is not None and type(prompt) is not str:
        raise bad_body()
    body.include_usage = wants_usage(document)
    body.max_tokens = read_max_tokens(document, "max_tokens", "max_completion_tokens")
    return body


def _tokens(prompt: list[Any]) -> bytes | None:
    """A list prompt's token ids, four bytes each; None if it is a list of strings."""
    if not prompt:
        raise bad_body("'prompt' array cannot be empty", "prompt")
    first = type(prompt[0])
    if first is str and {str}.issuperset(map(type, prompt)):
        return None
    if first is int:
        packed = packed_ids(prompt)
    elif first is list:
        arrays = [packed_ids(ids) if type(ids) is list else None for ids in prompt]
        packed = None if None in arrays else b"".join([ids for ids in arrays if ids])
    else:
        packed = None
    if packed is None:
        raise _not_a_prompt()
    return packed


def _not_a_prompt() -> RequestError:
    return bad_body("'prompt' must be a string, an array of strings, token ids, or an array of token ids", "prompt")
