"""Routing text: one string per request whose prefix tells which KV blocks an engine may still hold.

The order is that of the usual chat templates: the leading system message, the tools, then turn after turn, so that a
conversation that goes on begins with the text it had before. A turn is `RS role US content` and, where it has them,
its further fields, each after a US. Text parts count as text, whether they came as a string or in a list; every other
part stands as its type and the hash of its content, so that a megabyte of image is 40 characters here.
"""

from typing import Any, Final

import orjson
from xxhash import xxh3_128_hexdigest

TURN: Final = "\x1e"
FIELD: Final = "\x1f"
MEDIUM: Final = "\x1d"

TEXT_TYPES: Final = frozenset({"text", "input_text", "output_text", "summary_text", "reasoning_text"})

Pieces = list[str]


def dumped(value: Any) -> str:
    """A value as compact JSON in the key order it was sent in, which is the order templates print it in."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # nested deeper than orjson writes (254), which no template prints either
        return MEDIUM


def add_content(pieces: Pieces, content: Any) -> int:
    """Append a content of any shape; returns how many media were in it."""
    if type(content) is str:
        pieces.append(content)
        return 0
    if content is None:
        return 0
    if type(content) is not list:
        pieces.append(dumped(content))
        return 0
    media = 0
    first = True
    for part in content:
        if not first:
            pieces.append("\n")
        first = False
        if type(part) is str:
            pieces.append(part)
        elif type(part) is dict:
            media += add_part(pieces, part)
        else:
            pieces.append(dumped(part))
    return media


def add_part(pieces: Pieces, part: dict[str, Any]) -> int:
    """Append one element of a content list; returns 1 if it was a medium."""
    text = part.get("text")
    kind = part.get("type")
    if type(text) is str and (kind is None or kind in TEXT_TYPES):
        pieces.append(text)
        return 0
    name = kind if type(kind) is str else ""
    try:
        digest = xxh3_128_hexdigest(orjson.dumps(part))
    except TypeError:
        digest = ""
    pieces.append(f"{MEDIUM}{name}:{digest}")
    return 1


def medium_bytes(part: Any) -> int:
    """Characters of a part's own strings and of those one level below: where inline data stands. 0 for text parts."""
    if type(part) is not dict or part.get("type", "text") in TEXT_TYPES:
        return 0
    total = 0
    for value in part.values():
        if type(value) is str:
            total += len(value)
        elif type(value) is dict:
            total += sum(len(inner) for inner in value.values() if type(inner) is str)
    return total


def media_in(turns: Any, field: str) -> tuple[int, int]:
    """Number of media and their characters in a list of turns whose contents stand under `field`."""
    count = total = 0
    if type(turns) is not list:
        return 0, 0
    for turn in turns:
        if type(turn) is not dict:
            continue
        content = turn.get(field)
        if type(content) is list:
            for part in content:
                size = medium_bytes(part)
                if size:
                    count += 1
                    total += size
    return count, total


def joined(pieces: Pieces) -> bytes:
    """The pieces as UTF-8."""
    return "".join(pieces).encode("utf-8", "surrogatepass")
