"""DATA frames that are not simply whole messages: parts of messages, padding, content-length, what comes too late, and
the window that lets a client send (RFC 9113 6.1, 6.9, 8.1.1).
"""

from typing import Final

from workers.calls import CallError, LateCall
from workers.h2.control import Control
from workers.h2.faults import ConnectionFault, StreamFault
from workers.h2.frames import (
    END_STREAM,
    FLOW_CONTROL_ERROR,
    MAX_WINDOW,
    NO_ERROR,
    PADDED,
    PROTOCOL_ERROR,
    STREAM_CLOSED,
    window_update,
)
from workers.h2.limits import CREDIT_PER_MESSAGE
from workers.h2.messages import MessageDeframer, deframe
from workers.h2.stream import Stream

_TINY_PIECE: Final = 256
_MAX_DISCARDED: Final = 64 << 10


class Inbound(Control):
    """What becomes of a DATA frame's payload."""

    def data(self, stream: Stream | None, stream_id: int, flags: int, buf: bytes, start: int, end: int) -> None:
        """A DATA frame that is not one message of a quiet stream. Its payload is `buf[start:end]`."""
        length = end - start
        if stream is None:
            stream_id &= MAX_WINDOW
            stream = self.streams.get(stream_id)
            if stream is None:
                self._late_data(stream_id)
                return
        if stream.ended_remote:
            raise StreamFault(STREAM_CLOSED, "DATA after END_STREAM")  # 5.1
        stream.unread += length
        if flags & PADDED:
            if not length or (padding := buf[start]) >= length:
                raise ConnectionFault(PROTOCOL_ERROR, "padding longer than its frame")  # 6.1
            start += 1
            end -= padding
        piece = buf[start:end]
        if stream.content_left >= 0:
            stream.content_left -= len(piece)
            if stream.content_left < 0 or (flags & END_STREAM and stream.content_left):
                raise StreamFault(PROTOCOL_ERROR, "content and content-length differ")  # 8.1.1
        call = stream.call
        if call is None:
            if stream.late is not None and piece:
                self._hear_out(stream, stream.late, piece)
            else:
                self._discard(stream, piece)
        elif piece:
            self.collect(stream, piece)
        elif not flags & END_STREAM:
            self.spend("empty DATA")
        self._account(stream)
        if flags & END_STREAM and stream.id in self.streams:
            self.remote_end(stream)

    def _late_data(self, stream_id: int) -> None:
        if not stream_id:
            raise ConnectionFault(PROTOCOL_ERROR, "DATA on stream 0")  # 6.1
        self.require_started(stream_id)
        self.spend("frames on closed streams")
        if stream_id not in self.reset_ids:
            self.send_reset(stream_id, STREAM_CLOSED)  # 5.1
            self.remember_reset(stream_id)

    def _discard(self, stream: Stream, piece: bytes) -> None:
        """The answer is out, what still comes is of no use; a client that does not stop is stopped (8.1)."""
        if stream.unread > _MAX_DISCARDED and stream.ended_local:
            self.reset(stream, NO_ERROR)
        elif len(piece) < _TINY_PIECE:
            self.spend("tiny DATA")

    def _hear_out(self, stream: Stream, call: LateCall, piece: bytes) -> None:
        """What was under way when we ended the call: half a window at most, and no more is opened."""
        if stream.unread > self.limits.stream_window_bytes // 2 + _MAX_DISCARDED and stream.ended_local:
            self.reset(stream, NO_ERROR)
            return
        messages = self._cut(stream, piece)
        if messages is None or self.counters.buffered_bytes > self.limits.max_buffered_bytes:
            stream.late = None
            self._drop_deframer(stream)
            self._discard(stream, piece)
            return
        for message in messages:
            self.tell_late(call, message)
        if not messages and len(piece) < _TINY_PIECE:
            self.spend("tiny DATA")

    def collect(self, stream: Stream, piece: bytes) -> None:
        messages = self._cut(stream, piece)
        if messages is None:
            return
        if messages:
            self.budget += CREDIT_PER_MESSAGE
            self.deliver(stream, messages)
        else:
            if len(piece) < _TINY_PIECE:
                self.spend("tiny DATA")
            self.check_buffered(stream)
        self.settle(stream)

    def _cut(self, stream: Stream, piece: bytes) -> list[bytes] | None:
        """The messages that a piece completes. None after one that is not acceptable, which fails the call."""
        deframer = stream.deframer
        held = 0
        try:
            if deframer is None:
                messages: list[bytes] = []
                pos, wanted = deframe(piece, 0, self.limits.max_message_bytes, messages)
                if pos < len(piece) or wanted >= 0:
                    deframer = stream.deframer = MessageDeframer(self.limits.max_message_bytes, piece[pos:], wanted)
            else:
                held = deframer.held
                messages = deframer.feed(piece)
        except CallError as error:
            if deframer is not None:
                self.counters.buffered_bytes += deframer.held - held
            self.fail(stream, error)
            return None
        if deframer is not None:
            self.counters.buffered_bytes += deframer.held - held
        return messages

    def settle(self, stream: Stream) -> None:
        """Back to the fast path if nothing stands against it any more."""
        if stream.call is None or stream.inbox is not None:
            return
        if stream.deframer is not None and stream.deframer.empty:
            stream.deframer = None
        stream.fast_path = (
            stream.deframer is None
            and stream.content_left < 0
            and stream.pending is None
            and not (stream.ended_remote or stream.pushes)
        )
        self._account(stream)

    def _account(self, stream: Stream) -> None:
        """The stream's receive window (6.9): enforced, and opened again while the call keeps up."""
        window = self.limits.stream_window_bytes
        if stream.unread > window:
            raise StreamFault(FLOW_CONTROL_ERROR, "stream window overrun")
        if (
            stream.unread >= window // 2
            and stream.inbox is None
            and stream.call is not None
            and not stream.ended_remote
        ):
            self.out.append(window_update(stream.id, stream.unread))
            stream.unread = 0
