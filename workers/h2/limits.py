"""What a client may ask of the server, and what is counted about it."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Bounds of the transport. Each has a counter or an error of its own when it is reached."""

    max_message_bytes: int = 64 << 20
    """A longer gRPC message ends its call with RESOURCE_EXHAUSTED."""
    max_buffered_bytes: int = 512 << 20
    """Parts of messages, waiting messages and waiting replies of all connections together; the call that passes it is
    ended with RESOURCE_EXHAUSTED, or reset where it was a reply. From half of it on, a message must come to its end
    within `stall_seconds`."""
    max_connections: int = 4096
    """As many TLS handshakes may be under way beside them."""
    max_concurrent_streams: int = 65536
    """Per connection (SETTINGS_MAX_CONCURRENT_STREAMS); the next one is refused."""
    max_open_streams: int = 131072
    """All connections together; the next one is refused."""
    max_header_list_bytes: int = 16 << 10
    """Decoded size by RFC 9113 6.5.2; above it HTTP 431. Twice as much in one encoded block ends the connection."""
    max_continuations: int = 64
    """CONTINUATION frames of one header block."""
    stream_window_bytes: int = 16 << 20
    """What a client may send on a stream before we read on. Also bounds the messages held while a call waits."""
    connection_window_bytes: int = 64 << 20
    max_pending_send_bytes: int = 16 << 20
    """Replies held per connection because the client's windows are closed; above it no message is read."""
    max_pending_push_bytes: int = 256 << 10
    """Pushed messages that one slow client may leave unread before its stream is reset."""
    write_buffer_bytes: int = 256 << 10
    """Bytes the socket may owe the client before we stop reading from it."""
    header_cache_entries: int = 64
    """Decoded header blocks kept per connection."""
    handshake_seconds: float = 10.0
    """From the connection's start to the client's SETTINGS and its acknowledgement of ours."""
    idle_seconds: float = 900.0
    """A connection without streams for this long is asked to leave."""
    keepalive_seconds: float = 60.0
    """A silent client is pinged after this long..."""
    keepalive_timeout_seconds: float = 20.0
    """...and taken for dead after this long without any byte."""
    stall_seconds: float = 30.0
    """How long a reply may wait for a closed window, the socket for its reader, and a message for its end where much
    is held already."""
    linger_seconds: float = 2.0
    """How long a client may keep its half of an answered stream, or of a closed connection, open."""
    control_frames_burst: int = 10_000
    """PING, SETTINGS, WINDOW_UPDATE, empty DATA and other frames that carry no message: so many at once..."""
    control_frames_per_second: int = 1_000
    """...and so many per second on top, and `CREDIT_PER_MESSAGE` more for each message."""


CREDIT_PER_MESSAGE: Final = 8


COUNTED: Final = (
    "abuse_closes",
    "buffered_bytes",
    "calls_crashed",
    "connections_open",
    "connections_opened",
    "connections_refused",
    "deadlines_exceeded",
    "protocol_errors",
    "streams_open",
    "streams_opened",
    "streams_refused",
    "streams_reset_by_client",
    "streams_reset_by_server",
)


class TransportCounters:
    """Plain numbers since the start of the process, copied into metrics by whoever wants them.

    `streams_open`, `connections_open` and `buffered_bytes` are levels, the others only grow.
    """

    __slots__ = COUNTED

    def __init__(self) -> None:
        self.connections_opened = 0
        self.connections_open = 0
        self.connections_refused = 0
        self.streams_opened = 0
        self.streams_open = 0
        self.streams_refused = 0
        self.streams_reset_by_client = 0
        self.streams_reset_by_server = 0
        self.protocol_errors = 0
        self.deadlines_exceeded = 0
        self.calls_crashed = 0
        """Calls that raised something else than `CallError`."""
        self.buffered_bytes = 0
        self.abuse_closes: dict[str, int] = {}
        """Connections closed and streams reset for abuse, by reason."""

    def abuse(self, reason: str) -> None:
        self.abuse_closes[reason] = self.abuse_closes.get(reason, 0) + 1
