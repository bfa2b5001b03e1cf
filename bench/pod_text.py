"""Text for simulated pods: a tokenizer that needs no vocabulary, prompt blocks and their hashes, and answers.

A token is four bytes of UTF-8 (the last one may be shorter), which is about what English makes in real vocabularies.
A block of the prompt is `block_tokens` tokens, named by the xxh3 of its bytes, seeded with the name of the block before
it; the first is seeded with the model, so that two adapters share nothing. An answer is a slice of one long random
text, and both its length and its text follow from the seed and the prompt alone: the same request gets the same answer
from every pod that has the same seed.

Cost: a prompt of 4 KB in 16-token blocks is hashed in about 10 µs.
"""

import random
from array import array
from collections.abc import Iterable
from math import exp, log
from typing import Any

import orjson
import xxhash

TOKEN_BYTES = 4
_VOCABULARY = 128_000
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CORPUS_TOKENS = 1 << 14
_corpus_random = random.Random("answers")
_CORPUS = "".join("".join(_corpus_random.choices(_LETTERS, k=TOKEN_BYTES - 1)) + " " for _ in range(_CORPUS_TOKENS))
_SIGMA = 0.7  # of the logarithm of answer lengths


def count_tokens(text: bytes) -> int:
    return -(-len(text) // TOKEN_BYTES)


def tokens(text: bytes) -> list[int]:
    padded = text + bytes(-len(text) % TOKEN_BYTES)
    return [value % _VOCABULARY for value in array("I", padded)]


def from_token_ids(ids: Iterable[int]) -> bytes:
    """A text whose tokens stand for these."""
    return b"".join((value & 0xFFFFFFFF).to_bytes(TOKEN_BYTES, "little") for value in ids)


def render_chat(messages: list[Any], tools: Any = None) -> bytes:
    """What a chat template would make of the messages, up to where the assistant begins.

    ValueError if a message has no role, content that is neither text nor parts, or anything is nested too deep.
    """
    parts = [] if not tools else ["<|tools|>\n", _written(tools), "<|end|>\n"]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("each message is an object with a role")
        parts += "<|", message["role"], "|>\n"
        content = message.get("content")
        if isinstance(content, str):
            parts.append(content)
        elif isinstance(content, list):
            for part in content:
                text = part.get("text") if isinstance(part, dict) else part
                parts.append(text if isinstance(text, str) else _written(part))
        elif content is not None:
            raise ValueError("the content of a message is a string, a list of parts, or null")
        if message.get("tool_calls"):
            parts.append(_written(message["tool_calls"]))
        parts.append("<|end|>\n")
    parts.append("<|assistant|>\n")
    return "".join(parts).encode("utf-8", "surrogatepass")


def _written(document: Any) -> str:
    try:
        return orjson.dumps(document).decode()
    except orjson.JSONEncodeError as error:  # it reads what is nested deeper than what it writes
        raise ValueError(f"cannot be written as JSON: {error}") from None


def block_hashes(text: bytes, block_tokens: int, model: str) -> list[int]:
    """One for each full block."""
    size = block_tokens * TOKEN_BYTES
    digest = xxhash.xxh3_64_intdigest
    h = digest(model.encode())
    hashes = []
    for start in range(0, len(text) - size + 1, size):
        h = digest(text[start : start + size], seed=h)
        hashes.append(h)
    return hashes


class Answers:
    """Lengths are log-normal with the given mean."""

    def __init__(self, mean_tokens: int, seed: int) -> None:
        self._mu = log(mean_tokens) - _SIGMA * _SIGMA / 2
        self._seed = seed

    def draw(self, prompt: bytes, salt: int) -> tuple[int, int]:
        """How many tokens the model would say before it stops, and where in the corpus."""
        chance = random.Random(xxhash.xxh3_64_intdigest(prompt, seed=(self._seed + salt) % (1 << 64)))
        length = max(1, round(exp(chance.gauss(self._mu, _SIGMA))))
        return length, chance.randrange(_CORPUS_TOKENS)


def answer_text(offset: int, first: int, last: int) -> str:
    """Tokens first..last-1 of the answer that begins at `offset` of the corpus; ASCII, needs no JSON escapes."""
    start = (offset + first) % _CORPUS_TOKENS * TOKEN_BYTES
    length = (last - first) * TOKEN_BYTES
    text = _CORPUS[start : start + length]
    while len(text) < length:
        text += _CORPUS[: length - len(text)]
    return text
