"""What a transport and a gRPC method know of each other, and nothing more.

A transport (`grpcio_transport`, `h2`) moves message bytes and ends streams. A method (the ext_proc exchange, the
health service, the access log service) takes message bytes and gives reply bytes. This file is the seam: two
transports and three services meet here, so any of them can be replaced or tested alone.

The life of a call: `open(metadata)` once, `receive` for each message in order, `half_close` once if the client
finishes sending, `close` exactly once however the stream ended. A transport never calls `receive` again before
the awaitable that an earlier `receive` returned has finished.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

from protos import MessageError

Metadata = Mapping[str, str]
"""The call's request headers, names in lower case, pseudo headers and `-bin` values left out."""

Push = Callable[[bytes], None]
"""Sends one message to the client outside of any `receive`."""


Reply = bytes | tuple[bytes, ...] | None
"""One message, several in order, or none."""


class Status:
    """The gRPC status codes that this project sends."""

    OK: Final = 0
    UNKNOWN: Final = 2
    INVALID_ARGUMENT: Final = 3
    DEADLINE_EXCEEDED: Final = 4
    NOT_FOUND: Final = 5
    RESOURCE_EXHAUSTED: Final = 8
    UNIMPLEMENTED: Final = 12
    INTERNAL: Final = 13
    UNAVAILABLE: Final = 14


class CallError(Exception):
    """Ends the call with a gRPC status other than OK. `code` is one of `Status`, `message` is for a person."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def status_of(error: BaseException) -> tuple[int, str] | None:
    """The status and message that an error of a call ends it with; None for one that nobody meant.

    What is no message is INTERNAL: gRPC says so where a message cannot be read, and AIBrix where one is empty.
    """
    if isinstance(error, CallError):
        return error.code, error.message
    return (Status.INTERNAL, str(error)) if isinstance(error, MessageError) else None


class Call(Protocol):
    """One open gRPC stream, seen from the method's side."""

    finished: bool
    """True once nothing more will be said: the transport ends the stream with OK after the pending reply."""

    idle: bool
    """True while the client waits for nothing: a draining transport may end the stream with OK at once."""

    def receive(self, message: bytes, /) -> Reply | Awaitable[Reply]:
        """Take one message. Return the reply, None for no reply, or an awaitable of either where it must wait.

        Raises `CallError` to end the call with another status than OK, `MessageError` for one that is none.
        """

    def half_close(self) -> Reply:
        """The client has sent its last message. Return a last reply or None. The stream ends with OK afterwards."""

    def close(self) -> None:
        """The stream is over: finished, reset by the client, or cut with its connection. Called exactly once."""


class PushingCall(Call, Protocol):
    """A call that also speaks without being spoken to (server streaming)."""

    def start(self, push: Push, /) -> None:
        """Called once, before the first `receive`."""


class LateCall(Call, Protocol):
    """A call that wants to know what the client says after the stream was ended from this side."""

    def late(self, message: bytes | None, /) -> None:
        """Take one message that was under way when the call was closed, or None: the client ended its half before our
        end reached it, so it may not have read the last reply either (one that has read all resets the stream); or it
        reset a stream that was still open, and `close` follows."""


class Method:
    """A gRPC method: how to open a call on it.

    `pushes` says that `open` returns a `PushingCall`. A pushing call stays open after the client's half close.
    `listens` says that it returns a `LateCall`. Not every transport can tell.
    """

    __slots__ = ("listens", "open", "pushes")

    def __init__(self, open: Callable[[Metadata], Call], *, pushes: bool = False, listens: bool = False) -> None:
        self.open = open
        self.pushes = pushes
        self.listens = listens


Methods = Mapping[str, Method]
"""Methods by path, for example "/grpc.health.v1.Health/Check"."""
