"""What is replayed: requests with lengths, an arrival, and names for the pieces of text they share.

A prompt is a row of *pieces*. A piece has an id and a length in tokens, and two prompts with the same id at the same
place have the same text up to the end of that piece: ids are chained, as in the traces that Mooncake published
(FAST '25), whose pieces are 512 tokens long. From the pieces follow the names of KV blocks of any size: the block
whose last token is token k of piece p is called by (p, k). So one trace can be replayed with any block size, and
the engine's blocks and the router's need not be of one size.
"""

import gzip
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from state.pods import Ints

MOONCAKE_PIECE_TOKENS = 512
_OFFSET_BITS = 24
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing


class TraceError(Exception):
    """The trace cannot be read; the message says what, where and why."""


class TraceRequest:
    """One request. Times are seconds."""

    __slots__ = (
        "_starts",
        "after",
        "at",
        "ids",
        "named_tokens",
        "output_tokens",
        "piece_tokens",
        "prompt_tokens",
        "session",
    )

    def __init__(
        self,
        at: float,
        prompt_tokens: int,
        output_tokens: int,
        ids: Sequence[int],
        piece_tokens: int | Sequence[int] = MOONCAKE_PIECE_TOKENS,
        *,
        after: int = -1,
        session: str = "",
    ) -> None:
        self.at = at
        """When it arrives; with `after`, how long after that request has ended."""
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.ids = array("q", ids)
        self.piece_tokens = piece_tokens
        """Of every piece, or of each."""
        self.named_tokens: int
        """Tokens that have names. Where these are more than the prompt, the answer's have them too."""
        self._starts: Ints | None
        if isinstance(piece_tokens, int):
            self.named_tokens = len(ids) * piece_tokens
            self._starts = None
        else:
            self.named_tokens = sum(piece_tokens)
            lengths = np.array(piece_tokens, np.int64)
            self._starts = np.cumsum(lengths) - lengths
        self.after = after
        """Index of the request whose answer this one waits for; -1: it comes at its time."""
        self.session = session

    def block_names(self, block_tokens: int, tokens: int) -> list[int]:
        """Names of the whole blocks within the first `tokens` tokens: chained, below 2**64."""
        count = min(tokens, self.named_tokens) // block_tokens
        if count <= 0:
            return []
        last = np.arange(block_tokens - 1, count * block_tokens, block_tokens, dtype=np.int64)
        if self._starts is None:
            piece, offset = np.divmod(last, self.piece_tokens)
        else:
            piece = np.searchsorted(self._starts, last, side="right") - 1
            offset = last - self._starts[piece]
        ids = np.frombuffer(self.ids, np.int64)[piece]
        names = ((ids << _OFFSET_BITS) + offset).astype(np.uint64) * _SPREAD
        named: list[int] = names.tolist()
        return named


def read_mooncake(path: Path, limit: int = 0) -> list[TraceRequest]:
    """A trace in Mooncake's format, plain or gzipped: JSON lines with timestamp (ms), input_length, output_length
    and hash_ids (one for each 512 tokens). Raises TraceError."""
    requests: list[TraceRequest] = []
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    requests.append(_request(line, f"{path}:{number}"))
                    if len(requests) == limit:
                        break
    except (OSError, EOFError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None
    if not requests:
        raise TraceError(f"{path}: holds no request")
    requests.sort(key=lambda request: request.at)
    first = requests[0].at
    for request in requests:
        request.at -= first
    return requests


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")


def _request(line: bytes, place: str) -> TraceRequest:
    try:
        row = orjson.loads(line)
        at, prompt, output, ids = row["timestamp"], row["input_length"], row["output_length"], row["hash_ids"]
        request = TraceRequest(float(at) / 1000, max(int(prompt), 1), max(int(output), 1), ids)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise TraceError(
            f"{place}: not a request with timestamp, input_length, output_length and hash_ids ({error!r})"
        ) from None
    return request
