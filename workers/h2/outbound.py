"""What goes to the client: frames collected until the next write, and both flow-control windows (RFC 9113 5.2, 6.9).

A reply that does not fit into the windows waits in its stream's `pending`. A stream waits in one of two places: for a
WINDOW_UPDATE of its own (found through its id), or in `_queue` for the connection's window, served in turn. While a
stream waits none of its messages are read, and while a connection holds more than `max_pending_send_bytes` none of
any stream; so what is held is bounded by one reply per stream and the limit together, and for all connections by
`max_buffered_bytes`.
"""

from collections import OrderedDict, deque
from collections.abc import Callable

from workers.calls import Methods
from workers.h2.faults import ConnectionFault, StreamFault
from workers.h2.frames import (
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    HEADERS,
    MAX_WINDOW,
    MIN_MAX_FRAME,
    PREFIX_BYTES,
    frame_header,
    message_header,
    rst_stream,
)
from workers.h2.limits import TransportCounters, TransportLimits
from workers.h2.responses import GRPC_HEADERS
from workers.h2.stream import Stream


class Outbound:
    """The sending half of a connection."""

    def __init__(
        self, methods: Methods, limits: TransportLimits, counters: TransportCounters, clock: Callable[[], float]
    ) -> None:
        self.methods = methods
        self.limits = limits
        self.counters = counters
        self.clock = clock
        self.streams: dict[int, Stream] = {}
        self.out: list[bytes | memoryview] = []
        self.wake: Callable[[], None] = _ignore
        """Called when there is output that no `receive` will return."""
        self.send_window = DEFAULT_WINDOW
        self.initial_send_window = DEFAULT_WINDOW
        self.max_send_frame = MIN_MAX_FRAME
        self.writable = True
        """False while the socket is full."""
        self.pending_bytes = 0
        self.hpack_prefix = b""
        self.congested = False
        """True while more is pending than `max_pending_send_bytes`."""
        self.blocked: dict[int, Stream] = {}
        """Streams with `pending`, the one that has waited longest first."""
        self._queue: OrderedDict[int, Stream] = OrderedDict()

    def take(self) -> bytes:
        """Everything to be written now."""
        out = self.out
        if not out:
            return b""
        data = b"".join(out)
        out.clear()
        return data

    # Frames.

    def send_block(self, stream: Stream, block: bytes, *, end: bool) -> None:
        """A header block, whole: ours are far smaller than the smallest allowed frame."""
        if self.hpack_prefix:
            block = self.hpack_prefix + block
            self.hpack_prefix = b""
        flags = END_HEADERS | END_STREAM if end else END_HEADERS
        self.out += (frame_header(len(block) << 8 | HEADERS, flags, stream.id), block)

    def send_message(self, stream: Stream, message: bytes) -> None:
        """One gRPC message, after the response headers if they are due."""
        if not stream.headers_sent:
            stream.headers_sent = True
            self.send_block(stream, GRPC_HEADERS, end=False)
        size = len(message)
        total = size + PREFIX_BYTES
        if (
            stream.pending is None
            and total <= stream.send_window
            and total <= self.send_window
            and total <= self.max_send_frame
            and self.writable
        ):
            stream.send_window -= total
            self.send_window -= total
            self.out += (message_header(total << 8, 0, stream.id, 0, size), message)
        else:
            self.hold(stream, b"\0" + size.to_bytes(4, "big"))
            self.hold(stream, message)
            self.send_pending(stream)

    def end_with(self, stream: Stream, block: bytes) -> None:
        """End our half with trailers, now or after what is pending; b"" lets the last DATA frame end it."""
        if stream.pending is None:
            self.send_block(stream, block, end=True)
            self.local_end(stream)
        else:
            stream.last_block = block

    def local_end(self, stream: Stream) -> None:
        """END_STREAM has been sent."""
        raise NotImplementedError

    def unblocked(self, stream: Stream) -> None:
        """A window has let go everything that was pending, and the stream goes on."""
        raise NotImplementedError

    def send_reset(self, stream_id: int, code: int) -> None:
        self.out.append(rst_stream(stream_id, code))

    # Waiting for windows.

    def hold(self, stream: Stream, data: bytes) -> None:
        if not data:
            return
        if stream.pending is None:
            stream.pending = deque()
            stream.fast_path = False
            stream.since = self.clock()
            self.blocked[stream.id] = stream
        stream.pending.append(data)
        stream.pending_bytes += len(data)
        self._count_pending(len(data))

    def drop_pending(self, stream: Stream) -> None:
        if stream.pending is not None:
            stream.pending = None
            self._count_pending(-stream.pending_bytes)
            stream.pending_bytes = 0
            self.blocked.pop(stream.id, None)
            self._queue.pop(stream.id, None)

    def _count_pending(self, change: int) -> None:
        self.pending_bytes += change
        self.counters.buffered_bytes += change
        self.congested = self.pending_bytes > self.limits.max_pending_send_bytes

    def flush_stream(self, stream: Stream) -> None:
        """A window has opened: send, and go on with the stream if nothing is left to send."""
        self.send_pending(stream)
        if stream.pending is None and stream.last_block is None:
            self.unblocked(stream)

    def send_pending(self, stream: Stream) -> None:
        """Send as much of a stream's `pending` as both windows allow, and the trailers once it is empty.

        Whoever is not at the end of a reply may call it: nothing of what the client has said is read here.
        """
        pending = stream.pending
        while pending:
            room = min(stream.send_window, self.send_window, self.max_send_frame)
            if room <= 0 or not self.writable:
                if stream.send_window > 0:
                    self._queue[stream.id] = stream
                else:
                    self._queue.pop(stream.id, None)
                return
            pieces: list[bytes | memoryview] = []
            size = 0
            while pending and size < room:
                piece = pending.popleft()
                if len(piece) > room - size:
                    view = memoryview(piece)  # so that a 20 MB reply is not copied again for each of its frames
                    pending.appendleft(view[room - size :])
                    piece = view[: room - size]
                pieces.append(piece)
                size += len(piece)
            stream.send_window -= size
            self.send_window -= size
            stream.pending_bytes -= size
            self._count_pending(-size)
            flags = END_STREAM if not pending and stream.last_block == b"" else 0
            self.out += (frame_header(size << 8 | DATA, flags, stream.id), *pieces)
        if pending is None:
            return
        self.drop_pending(stream)
        if stream.last_block is not None:
            if stream.last_block:
                self.send_block(stream, stream.last_block, end=True)
            self.local_end(stream)

    def flush(self) -> None:
        """Serve the streams that wait for the connection's window, in turn. Others cost nothing."""
        queue = self._queue
        while queue and self.send_window > 0 and self.writable:
            self.flush_stream(next(iter(queue.values())))

    # Windows.

    def window_update(self, stream_id: int, increment: int) -> None:
        """A WINDOW_UPDATE of at least 1. Raises when a window passes 2^31-1 (6.9.1)."""
        if stream_id == 0:
            self.send_window += increment
            if self.send_window > MAX_WINDOW:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "connection window overflow")
            self.flush()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        stream.send_window += increment
        if stream.send_window > MAX_WINDOW:
            raise StreamFault(FLOW_CONTROL_ERROR, "stream window overflow")
        self._reopened(stream)

    def initial_window(self, size: int) -> None:
        """A new SETTINGS_INITIAL_WINDOW_SIZE: every stream's window moves by the difference (6.9.2)."""
        change = size - self.initial_send_window
        self.initial_send_window = size
        if not change:
            return
        for stream in self.streams.values():
            stream.send_window += change
            if stream.send_window > MAX_WINDOW:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "stream window overflow by SETTINGS")
        if change > 0:
            for stream in list(self.blocked.values()):
                self._reopened(stream)

    def _reopened(self, stream: Stream) -> None:
        if stream.pending is not None and stream.send_window > 0:
            self.flush_stream(stream)


def _ignore() -> None:
    pass
