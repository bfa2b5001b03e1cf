"""One stream's state. 10,000 of them may lie idle, so it is slots and small numbers."""

from collections import deque
from math import inf
from typing import Protocol

from workers.calls import Call, LateCall
from workers.h2.messages import MessageDeframer


class Waiter(Protocol):
    """The handle of an awaited answer."""

    def cancel(self) -> object: ...


class Stream:
    """States of RFC 9113 5.1 are two flags: open has none of them set, half-closed has one. A closed stream is deleted.

    `fast_path` says that the next DATA frame may take the fast path: a call is open, nothing of a message, no answer
    and no reply is pending, and the client has not said how much it will send. Whoever changes one of these sets it.
    """

    __slots__ = (
        "call",
        "content_left",
        "deadline",
        "deframer",
        "ended_local",
        "ended_remote",
        "fast_path",
        "half_closed",
        "headers_sent",
        "id",
        "inbox",
        "last_block",
        "late",
        "pending",
        "pending_bytes",
        "pushes",
        "send_window",
        "since",
        "unread",
        "waiter",
    )

    def __init__(self, stream_id: int, send_window: int) -> None:
        self.id = stream_id
        self.call: Call | None = None
        """None once the call is closed, or if there never was one."""
        self.late: LateCall | None = None
        """The call again, for as long as it may want to know what the client says after it was closed."""
        self.send_window = send_window
        """Bytes the client lets us send; negative after it shrank its initial window (6.9.2)."""
        self.unread = 0
        """Bytes received and not given back by WINDOW_UPDATE."""
        self.fast_path = False
        self.headers_sent = False
        self.ended_remote = False
        self.ended_local = False
        self.half_closed = False
        """The call has been told that the client has sent its last message."""
        self.pushes = False
        self.content_left = -1
        """Bytes that content-length promises and that have not come; -1 without a promise."""
        self.deadline = inf
        self.deframer: MessageDeframer | None = None
        self.inbox: deque[bytes] | None = None
        """Messages that wait. Not None also means that the answer to an earlier one is awaited or blocked."""
        self.waiter: Waiter | None = None
        self.pending: deque[bytes | memoryview] | None = None
        """DATA payload that waits for a window."""
        self.pending_bytes = 0
        self.last_block: bytes | None = None
        """Trailers to send after `pending`; b"" to end the stream with its last DATA frame."""
        self.since = 0.0
        """When `pending` last became non-empty, or when our half was closed."""
