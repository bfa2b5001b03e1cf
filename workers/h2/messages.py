"""gRPC messages out of a stream's bytes, where they do not come one to a DATA frame.

The common case, one whole message in one frame, never gets here (`connection`). A long message is a list of the
pieces it came in, joined once when the last one is there. Pieces below `_SMALL` are gathered in a bytearray, so
that a client that sends single bytes cannot make the list weigh more than the bytes.
"""

from workers.calls import CallError, Status
from workers.h2.frames import PREFIX_BYTES

_SMALL = 1024


class MessageCutter:
    """The bytes of one stream since its last whole message."""

    __slots__ = ("_limit", "_parts", "_prefix", "_wanted", "held")

    def __init__(self, max_message_bytes: int) -> None:
        self._limit = max_message_bytes
        self._parts: list[bytes | bytearray] = []
        self._prefix = b""
        self._wanted = -1
        """Length of the message being collected, -1 while its prefix is not complete."""
        self.held = 0
        """Message bytes collected."""

    @property
    def empty(self) -> bool:
        return self._wanted < 0 and not self._prefix

    def feed(self, piece: bytes) -> list[bytes]:
        """The messages that `piece` completes.

        Raises `CallError` for a message that is compressed or too long; the messages before it are lost with the call.
        """
        wanted = self._wanted
        if wanted >= 0:
            held = self.held + len(piece)
            if held < wanted:
                self.held = held
                self._keep(piece)
                return []
            pos = wanted - self.held
            self._parts.append(piece if len(piece) == pos else piece[:pos])
            messages = [self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)]
            self._parts = []
            self.held = 0
        else:
            messages = []
            pos = 0
            if self._prefix:
                piece = self._prefix + piece
                self._prefix = b""
        end = len(piece)
        while end - pos >= PREFIX_BYTES:
            wanted = int.from_bytes(piece[pos + 1 : pos + 5], "big")
            if piece[pos]:
                raise CallError(Status.UNIMPLEMENTED, "compressed messages are not supported")
            if wanted > self._limit:
                text = f"message of {wanted} bytes is over the limit of {self._limit}"
                raise CallError(Status.RESOURCE_EXHAUSTED, text)
            pos += PREFIX_BYTES
            if end - pos < wanted:
                self._wanted = wanted
                self.held = end - pos
                if pos < end:
                    self._keep(piece[pos:])
                return [bytes(message) for message in messages]
            messages.append(piece[pos : pos + wanted])
            pos += wanted
        self._wanted = -1
        self._prefix = piece[pos:]
        return [bytes(message) for message in messages]

    def _keep(self, piece: bytes) -> None:
        parts = self._parts
        if len(piece) >= _SMALL:
            parts.append(piece)
        elif parts and isinstance(parts[-1], bytearray):
            parts[-1] += piece
        else:
            parts.append(bytearray(piece))
