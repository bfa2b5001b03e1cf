"""gRPC messages out of a stream's bytes, where they do not come one to a DATA frame.

The common case, one whole message in one frame, never gets here (`connection`). A long message is a list of the
pieces it came in, joined once when the last one is there. Pieces below `_SMALL` are gathered in a bytearray, so
that a client that sends single bytes cannot make the list weigh more than the bytes.
"""

from math import inf
from typing import Final

from workers.calls import CallError, Status
from workers.h2.frames import PREFIX_BYTES

_SMALL: Final = 1024


def deframe(piece: bytes, pos: int, limit: int, messages: list[bytes]) -> tuple[int, int]:
    """Append the whole messages in `piece` from `pos` on. Returns where the rest begins and how long its message is.

    The length is -1 if not even the prefix of the next message is there. Raises `CallError` for a message that is
    compressed or too long; the messages before it are lost with the call.
    """
    end = len(piece)
    while end - pos >= PREFIX_BYTES:
        size = int.from_bytes(piece[pos + 1 : pos + PREFIX_BYTES], "big")
        if piece[pos]:
            raise CallError(Status.UNIMPLEMENTED, "compressed messages are not supported")
        if size > limit:
            raise CallError(Status.RESOURCE_EXHAUSTED, f"message of {size} bytes is over the limit of {limit}")
        pos += PREFIX_BYTES
        if end - pos < size:
            return pos, size
        messages.append(piece[pos : pos + size])
        pos += size
    return pos, -1


class MessageDeframer:
    """The bytes of one stream since its last whole message: at least one byte of a prefix."""

    __slots__ = ("_limit", "_parts", "_prefix", "_wanted", "held", "seen")

    def __init__(self, max_message_bytes: int, rest: bytes, wanted: int) -> None:
        """`rest` is the beginning of a message of `wanted` bytes, or with -1 of its prefix."""
        self._limit = max_message_bytes
        self._parts: list[bytes | bytearray] = []
        self._begin(rest, wanted)

    def _begin(self, rest: bytes, wanted: int) -> None:
        self._wanted = wanted
        """Length of the message being collected, -1 while its prefix is not complete."""
        self._prefix = rest if wanted < 0 else b""
        self.held = 0
        """Message bytes collected."""
        self.seen = inf
        """When somebody who looks for messages without an end first saw this one."""
        if wanted >= 0 and rest:
            self.held = len(rest)
            self._keep(rest)

    @property
    def empty(self) -> bool:
        return self._wanted < 0 and not self._prefix

    def feed(self, piece: bytes) -> list[bytes]:
        """The messages that `piece` completes. Raises `CallError` as `deframe` does."""
        messages: list[bytes] = []
        pos = 0
        if self._wanted >= 0:
            missing = self._wanted - self.held
            if len(piece) < missing:
                self.held += len(piece)
                self._keep(piece)
                return messages
            self._parts.append(piece if len(piece) == missing else piece[:missing])
            messages.append(b"".join(self._parts))
            self._parts = []
            pos = missing
        elif self._prefix:
            piece = self._prefix + piece
        pos, wanted = deframe(piece, pos, self._limit, messages)
        self._begin(piece[pos:], wanted)
        return messages

    def _keep(self, piece: bytes) -> None:
        parts = self._parts
        if len(piece) >= _SMALL:
            parts.append(piece)
        elif parts and isinstance(parts[-1], bytearray):
            parts[-1] += piece
        else:
            parts.append(bytearray(piece))
