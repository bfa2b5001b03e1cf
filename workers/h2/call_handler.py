"""Between streams and calls: messages in order to `receive`, replies out, and every way in which a call ends.

A call is closed exactly once, in `_close_call`, which all ends pass: `finish` (a status is sent), `reset` (we give the
stream up), `forget` (the client reset it, or the connection is gone).
"""

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Final

import structlog

from workers.calls import Call, CallError, LateCall, Methods, PushingCall, Reply, Status, status_of
from workers.h2.frames import ENHANCE_YOUR_CALM, NO_ERROR, trailers_ok
from workers.h2.limits import TransportCounters, TransportLimits
from workers.h2.outbound import Outbound
from workers.h2.requests import Refusal, Request
from workers.h2.responses import GRPC_HEADERS, trailers
from workers.h2.stream import Stream, Waiter

log: Final = structlog.get_logger()

Result = Reply | BaseException
"""What an awaited answer became."""

_REMEMBERED_RESETS: Final = 1024
_WAITING_COST: Final = 64
"""What a message that waits takes besides its bytes."""


class CallHandler(Outbound):
    """The calls of a connection."""

    def __init__(
        self, methods: Methods, limits: TransportLimits, counters: TransportCounters, clock: Callable[[], float]
    ) -> None:
        super().__init__(methods, limits, counters, clock)
        self.wait: Callable[[Awaitable[Reply], Callable[[Result], None]], Waiter] = _no_waiting
        """Runs an awaitable and reports its result; set by whoever owns an event loop."""
        self.lingering: dict[int, Stream] = {}
        """Streams that we have ended and the client has not, oldest first."""
        self.reset_ids: dict[int, None] = {}
        """Streams that we reset while the client might still be sending (RFC 9113 5.1, closed)."""
        self.next_deadline = inf
        self.alarm = inf
        """When the passing of time has to be looked at next, by the clock."""
        self._parked: dict[int, Stream] = {}
        self._crash_logged = False

    # The beginning.

    def open_call(self, stream: Stream, request: Request) -> None:
        if request.method is None:
            if request.refusal is not None:
                self._refuse(stream, request.refusal)
            return
        try:
            call = request.method.open(request.metadata)
        except Exception as error:
            self.fail(stream, error)
            return
        stream.call = call
        stream.fast_path = request.content_length < 0
        if request.listens:
            stream.late = call  # type: ignore[assignment]
        if request.timeout_seconds != inf:
            self.set_deadline(stream, self.clock() + request.timeout_seconds)
        if request.method.pushes:
            stream.pushes = True
            stream.fast_path = False
            pushing: PushingCall = call  # type: ignore[assignment]
            try:
                pushing.start(partial(self._push, stream))
            except Exception as error:
                self.fail(stream, error)
                return
            if stream.call is not None and call.finished:
                self.finish(stream)

    def set_deadline(self, stream: Stream, deadline: float) -> None:
        stream.deadline = deadline
        if deadline < self.next_deadline:
            self.next_deadline = deadline
            self.alarm = min(self.alarm, deadline)

    def _refuse(self, stream: Stream, refusal: Refusal) -> None:
        stream.headers_sent = True
        if not refusal.body:
            self.end_with(stream, refusal.block)
            return
        self.send_block(stream, refusal.block, end=False)
        stream.last_block = b""
        self.hold(stream, refusal.body)
        self.send_pending(stream)

    # Messages.

    def deliver(self, stream: Stream, messages: list[bytes]) -> None:
        """Hand messages to the call, or keep them while it waits."""
        for message in messages:
            if stream.call is None:
                return
            if stream.inbox is None and self.congested:
                self._park(stream)
            if stream.inbox is None:
                self._receive(stream, stream.call, message)
            else:
                self.counters.buffered_bytes += len(message) + _WAITING_COST
                stream.inbox.append(message)
        self.check_buffered(stream)

    def check_buffered(self, stream: Stream) -> None:
        if self.counters.buffered_bytes > self.limits.max_buffered_bytes and stream.call is not None:
            self.fail(stream, CallError(Status.RESOURCE_EXHAUSTED, "the server holds too many unfinished messages"))

    def _receive(self, stream: Stream, call: Call, message: bytes) -> None:
        try:
            reply = call.receive(message)
        except Exception as error:
            self.fail(stream, error)
            return
        self.take_result(stream, call, reply)

    def take_result(self, stream: Stream, call: Call, reply: Reply | Awaitable[Reply]) -> None:
        """What `receive` gave, where it is not a plain reply that can be sent at once."""
        if reply is None or isinstance(reply, bytes | tuple):
            self.reply(stream, call, reply)
        else:
            stream.fast_path = False
            if stream.inbox is None:
                stream.inbox = deque()
            stream.waiter = self.wait(reply, partial(self._answered, stream))

    def reply(self, stream: Stream, call: Call, reply: Reply) -> None:
        """Send a reply if there is one, and end the call if it was the last."""
        if stream.call is None:
            return  # ended by a push of its own while it was making this reply
        if reply is not None:
            self._send(stream, reply)
            if stream.pending is not None:
                if self.counters.buffered_bytes > self.limits.max_buffered_bytes:
                    self.counters.abuse("unread reply")
                    self.reset(stream, ENHANCE_YOUR_CALM)
                    return
                if stream.inbox is None:
                    stream.inbox = deque()
        if call.finished:
            self.finish(stream)

    def _send(self, stream: Stream, reply: bytes | tuple[bytes, ...]) -> None:
        if isinstance(reply, bytes):
            self.send_message(stream, reply)
            return
        for message in reply:
            self.send_message(stream, message)

    def _answered(self, stream: Stream, result: Result) -> None:
        """An awaited answer is there."""
        call = stream.call
        if call is None or stream.waiter is None:
            return
        stream.waiter = None
        if isinstance(result, BaseException):
            self.fail(stream, result)
        else:
            self.reply(stream, call, result)
            self._resume(stream)
        self.spoke_unasked()

    def unblocked(self, stream: Stream) -> None:
        self._resume(stream)

    def _resume(self, stream: Stream) -> None:
        """Go on with what came meanwhile, as far as possible."""
        inbox = stream.inbox
        while inbox and stream.waiter is None and stream.pending is None and stream.call is not None:
            if self.congested:
                self._park(stream)
                return
            message = inbox.popleft()
            self.counters.buffered_bytes -= len(message) + _WAITING_COST
            self._receive(stream, stream.call, message)
        if stream.call is None or stream.waiter is not None or stream.pending is not None:
            return
        stream.inbox = None
        if stream.ended_remote:
            self._half_close(stream)
            return
        self.settle(stream)

    def settle(self, stream: Stream) -> None:
        """Put the stream back on the fast path if nothing stands against it, and let the client send on."""
        raise NotImplementedError

    def _park(self, stream: Stream) -> None:
        stream.fast_path = False
        if stream.inbox is None:
            stream.inbox = deque()
        self._parked[stream.id] = stream

    def unpark(self) -> None:
        """Read the messages that were held because the connection owed its client too much."""
        while self._parked and not self.congested:
            stream = self._parked.pop(next(iter(self._parked)))
            self._resume(stream)

    def _push(self, stream: Stream, message: bytes) -> None:
        if stream.call is None:
            return
        self.send_message(stream, message)
        if stream.pending_bytes > self.limits.max_pending_push_bytes:
            self.counters.abuse("unread pushes")
            self.reset(stream, ENHANCE_YOUR_CALM)
        elif stream.call.finished:
            self.finish(stream)
        self.spoke_unasked()

    def spoke_unasked(self) -> None:
        """There is output that no `receive` will return."""
        self.wake()

    # The ends.

    def remote_end(self, stream: Stream) -> None:
        """END_STREAM has come and is not in conflict with what came before."""
        stream.ended_remote = True
        stream.fast_path = False
        if stream.call is None:
            if stream.ended_local:
                self.unheard(stream)
                self.forget(stream)
        elif stream.deframer is not None and not stream.deframer.empty:
            self.fail(stream, CallError(Status.INTERNAL, "the stream ended within a message"))
        elif stream.inbox is None:
            self._half_close(stream)

    def _half_close(self, stream: Stream) -> None:
        call = stream.call
        if call is None or stream.half_closed:
            return
        stream.half_closed = True
        try:
            reply = call.half_close()
        except Exception as error:
            self.fail(stream, error)
            return
        if reply is not None:
            self._send(stream, reply)
        if not stream.pushes or call.finished:
            self.finish(stream)

    def finish(self, stream: Stream, code: int = Status.OK, message: str = "") -> None:
        """End the call with a status. Trailers alone if no reply was sent before."""
        if code != Status.OK:
            stream.late = None
        self._close_call(stream)
        if code == Status.OK and stream.headers_sent and stream.pending is None and not self.hpack_prefix:
            self.out.append(trailers_ok(stream.id))
            self.local_end(stream)
            return
        block = trailers(code, message)
        if not stream.headers_sent:
            stream.headers_sent = True
            block = GRPC_HEADERS + block
        self.end_with(stream, block)

    def fail(self, stream: Stream, error: BaseException) -> None:
        """End the call with the status that an exception stands for."""
        status = status_of(error)
        if status is None:
            status = Status.INTERNAL, "internal error"
            self._crashed(error)
        if stream.id in self.streams and not stream.ended_local and stream.last_block is None:
            self.finish(stream, *status)

    def local_end(self, stream: Stream) -> None:
        stream.ended_local = True
        if stream.ended_remote:
            self.unheard(stream)
            self.forget(stream)
        else:
            stream.since = self.clock()
            self.lingering[stream.id] = stream

    def reset(self, stream: Stream, code: int) -> None:
        """Give a stream up: RST_STREAM, nothing else. NO_ERROR after a whole response asks for no more data (8.1)."""
        self.counters.streams_reset_by_server += code != NO_ERROR
        self.send_reset(stream.id, code)
        if not stream.ended_remote:
            self.remember_reset(stream.id)
        self.forget(stream)

    def remember_reset(self, stream_id: int) -> None:
        self.reset_ids[stream_id] = None
        if len(self.reset_ids) > _REMEMBERED_RESETS:
            del self.reset_ids[next(iter(self.reset_ids))]

    def forget(self, stream: Stream) -> None:
        """The stream is closed (5.1)."""
        if self.streams.pop(stream.id, None) is None:
            return
        self.counters.streams_open -= 1
        self.lingering.pop(stream.id, None)
        self._close_call(stream)
        if stream.pending is not None:
            self.unheard(stream)
        stream.late = None
        self._drop_deframer(stream)
        self.drop_pending(stream)

    def forget_all(self) -> None:
        for stream in list(self.streams.values()):
            self.forget(stream)

    def _close_call(self, stream: Stream) -> None:
        call = stream.call
        if call is None:
            return
        stream.call = None
        stream.fast_path = False
        stream.deadline = inf
        self._parked.pop(stream.id, None)
        if stream.inbox:
            self.counters.buffered_bytes -= sum(map(len, stream.inbox)) + _WAITING_COST * len(stream.inbox)
        stream.inbox = None
        if stream.late is None:
            self._drop_deframer(stream)
        if stream.waiter is not None:
            stream.waiter.cancel()
            stream.waiter = None
        self.close_call(call)

    def _drop_deframer(self, stream: Stream) -> None:
        if stream.deframer is not None:
            self.counters.buffered_bytes -= stream.deframer.held
            stream.deframer = None

    def unheard(self, stream: Stream) -> None:
        """The client went before it had everything that we said, or might have said."""
        late = stream.late
        if late is not None:
            stream.late = None
            self.tell_late(late, None)

    def tell_late(self, call: LateCall, message: bytes | None) -> None:
        try:
            call.late(message)
        except Exception as error:
            self._crashed(error)

    def close_call(self, call: Call) -> None:
        try:
            call.close()
        except Exception as error:
            self._crashed(error)

    def _crashed(self, error: BaseException) -> None:
        """A bug in a call. Counted always, described at most once between two ticks of the connection."""
        self.counters.calls_crashed += 1
        if not self._crash_logged:
            self._crash_logged = True
            log.error("a call failed unexpectedly", exc_info=error)

    # Time.

    def check_calls(self, now: float) -> None:
        """Deadlines, replies that nobody reads, and clients that keep their half open."""
        self._crash_logged = False
        if now >= self.next_deadline:
            late = [stream for stream in self.streams.values() if stream.deadline <= now]
            for stream in late:
                self.counters.deadlines_exceeded += 1
                self.finish(stream, Status.DEADLINE_EXCEEDED, "deadline exceeded")
            self.next_deadline = min((s.deadline for s in self.streams.values()), default=inf)
        before = now - self.limits.stall_seconds
        while self.blocked and (stream := next(iter(self.blocked.values()))).since <= before:
            self.counters.abuse("unread reply")
            self.reset(stream, ENHANCE_YOUR_CALM)
        self.unpark()  # what was reset may have been what they waited for
        if self.counters.buffered_bytes > self.limits.max_buffered_bytes // 2:
            self._give_up_unfinished(now)
        before = now - self.limits.linger_seconds
        while self.lingering and (stream := next(iter(self.lingering.values()))).since <= before:
            self.reset(stream, NO_ERROR)

    def _give_up_unfinished(self, now: float) -> None:
        """Space is getting short: whoever has begun a message and does not come to its end makes room for others."""
        before = now - self.limits.stall_seconds
        for stream in list(self.streams.values()):
            deframer = stream.deframer
            if deframer is None or not deframer.held:
                continue
            deframer.seen = min(deframer.seen, now)
            if deframer.seen <= before:
                self.counters.abuse("unfinished message")
                self.reset(stream, ENHANCE_YOUR_CALM)

    def end_idle_calls(self) -> None:
        """End with OK whatever waits for nothing."""
        for stream in list(self.streams.values()):
            if stream.call is not None and stream.inbox is None and stream.call.idle:
                self.finish(stream)

    def end_all_calls(self, message: str) -> None:
        for stream in list(self.streams.values()):
            if stream.call is not None:
                self.finish(stream, Status.UNAVAILABLE, message)


def _no_waiting(awaitable: Awaitable[Reply], done: Callable[[Result], None]) -> Waiter:
    raise RuntimeError("this connection has nobody to wait for answers")
