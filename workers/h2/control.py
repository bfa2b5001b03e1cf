"""The frames that carry no message (RFC 9113 6.3 to 6.9), how much of them is tolerated, and the connection's clock.

Tolerance is one account per connection. It starts full (`control_frames_burst`), every control frame takes from it,
time and messages fill it again. Who overdraws it, by PING, SETTINGS, WINDOW_UPDATE, PRIORITY, unknown frames, empty or
tiny DATA, CONTINUATION or streams that are reset before they are answered, gets GOAWAY with ENHANCE_YOUR_CALM (10.5).
"""

from collections.abc import Callable
from math import inf
from typing import Final

from workers.calls import Methods
from workers.h2.call_handler import CallHandler
from workers.h2.faults import ConnectionFault, StreamFault
from workers.h2.frames import (
    ACK,
    ENABLE_PUSH,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_WINDOW,
    MIN_MAX_FRAME,
    NO_ERROR,
    PING,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    SETTINGS_TIMEOUT,
    WINDOW_UPDATE,
    goaway,
    ping,
    read_settings,
    read_u32,
)
from workers.h2.hpack_decoder import TABLE_BYTES
from workers.h2.limits import TransportCounters, TransportLimits
from workers.h2.responses import TABLE_SIZE_ZERO

TICK_SECONDS: Final = 1.0
"""How often a connection wants its `tick`, unless a deadline is nearer."""

_SETTINGS_COST: Final = 20
_MAX_SEND_FRAME: Final = 1 << 20
_DRAIN_PING: Final = b"draining"
_DRAIN_PING_SECONDS: Final = 1.0
_KEEPALIVE_PING: Final = b"are you?"


class Control(CallHandler):
    """The connection as a whole: settings, liveness, shutdown."""

    def __init__(
        self, methods: Methods, limits: TransportLimits, counters: TransportCounters, clock: Callable[[], float]
    ) -> None:
        super().__init__(methods, limits, counters, clock)
        now = clock()
        self.last_id = 0
        """Highest stream id that the client has used."""
        self.accepted_id = 0
        """Highest stream id that was not ignored."""
        self.done = False
        """True when the connection is to be closed after the output that is left."""
        self.draining = False
        self.refusing = False
        """True once the last GOAWAY is out: new streams are ignored."""
        self.greeted = False
        """The client's preface and SETTINGS have come."""
        self.acknowledged = False
        """Our SETTINGS have been."""
        self.heard = False
        """Something was received since the last tick."""
        self.budget = limits.control_frames_burst
        self.alarm = now + TICK_SECONDS
        self._opened = self._ticked = self._last_heard = self._last_busy = now
        self._pinged = inf
        self._drain_started = inf
        self._control: dict[int, Callable[[int, int, bytes], None]] = {
            PRIORITY: self._on_priority,
            RST_STREAM: self._on_rst_stream,
            SETTINGS: self._on_settings,
            PUSH_PROMISE: self._on_push_promise,
            PING: self._on_ping,
            GOAWAY: self._on_goaway,
            WINDOW_UPDATE: self._on_window_update,
        }

    def spend(self, reason: str, cost: int = 1) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise ConnectionFault(ENHANCE_YOUR_CALM, f"too many: {reason}", abuse=reason)

    def on_control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Any frame but DATA, HEADERS and CONTINUATION. Raises `ConnectionFault` and `StreamFault`."""
        handler = self._control.get(kind)
        if handler is None:
            self.spend("unknown frames")  # 5.5: ignored
        else:
            handler(flags, stream_id, payload)

    def require_started(self, stream_id: int) -> None:
        """5.1: nothing but HEADERS and PRIORITY may come on an idle stream; clients own the odd ids (5.1.1)."""
        if stream_id > self.last_id or not stream_id & 1:
            raise ConnectionFault(PROTOCOL_ERROR, "frame on an idle stream")

    def _on_priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise ConnectionFault(PROTOCOL_ERROR, "PRIORITY on stream 0")  # 6.3
        self.spend("PRIORITY")
        if len(payload) != 5:
            raise StreamFault(FRAME_SIZE_ERROR, "PRIORITY of wrong size")  # 6.3
        self.check_dependency(stream_id, payload)

    @staticmethod
    def check_dependency(stream_id: int, payload: bytes) -> None:
        if read_u32(payload) & MAX_WINDOW == stream_id:
            raise StreamFault(PROTOCOL_ERROR, "stream depends on itself")  # RFC 7540 5.3.1

    def _on_rst_stream(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise ConnectionFault(PROTOCOL_ERROR, "RST_STREAM on stream 0")  # 6.4
        if len(payload) != 4:
            raise ConnectionFault(FRAME_SIZE_ERROR, "RST_STREAM of wrong size")  # 6.4
        stream = self.streams.get(stream_id)
        if stream is None:
            self.require_started(stream_id)
            self.spend("RST_STREAM")
            return
        if not stream.ended_local:
            # A stream that has been answered may end so: Envoy resets every ext_proc stream it needs no more.
            self.counters.streams_reset_by_client += 1
            if not stream.headers_sent:
                self.spend("streams reset before an answer")
            self.unheard(stream)
        self.forget(stream)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(PROTOCOL_ERROR, "SETTINGS on a stream")  # 6.5
        if flags & ACK:
            if payload:
                raise ConnectionFault(FRAME_SIZE_ERROR, "SETTINGS acknowledgement with a payload")  # 6.5
            self.acknowledged = True
            self.spend("SETTINGS")
            return
        if len(payload) % 6:
            raise ConnectionFault(FRAME_SIZE_ERROR, "SETTINGS of wrong size")  # 6.5
        self.spend("SETTINGS", _SETTINGS_COST)
        values: dict[int, int] = {}
        for key, value in read_settings(payload):
            if key == ENABLE_PUSH and value > 1:
                raise ConnectionFault(PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")  # 6.5.2
            if key == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE over 2^31-1")  # 6.5.2
            if key == MAX_FRAME_SIZE and not MIN_MAX_FRAME <= value < 1 << 24:
                raise ConnectionFault(PROTOCOL_ERROR, "MAX_FRAME_SIZE out of range")  # 6.5.2
            if key == HEADER_TABLE_SIZE and value < TABLE_BYTES:
                self.hpack_prefix = TABLE_SIZE_ZERO  # RFC 7541 4.2
            values[key] = value
        # 6.5.3: of several values of one setting only the last is seen. What a wider window lets go follows our ACK.
        self.out.append(SETTINGS_ACK)
        self.max_send_frame = min(values.get(MAX_FRAME_SIZE, self.max_send_frame), _MAX_SEND_FRAME)
        if INITIAL_WINDOW_SIZE in values:
            self.initial_window(values[INITIAL_WINDOW_SIZE])

    def _on_push_promise(self, flags: int, stream_id: int, payload: bytes) -> None:
        raise ConnectionFault(PROTOCOL_ERROR, "PUSH_PROMISE from a client")  # 8.4

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(PROTOCOL_ERROR, "PING on a stream")  # 6.7
        if len(payload) != 8:
            raise ConnectionFault(FRAME_SIZE_ERROR, "PING of wrong size")  # 6.7
        self.spend("PING")
        if not flags & ACK:
            self.out.append(ping(ACK, payload))
        elif payload == _DRAIN_PING and self.draining:
            self._last_goaway()

    def _on_goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        """The client opens no more streams (6.8). What is open goes on, and the client closes when it is done."""
        if stream_id:
            raise ConnectionFault(PROTOCOL_ERROR, "GOAWAY on a stream")  # 6.8
        if len(payload) < 8:
            raise ConnectionFault(FRAME_SIZE_ERROR, "GOAWAY of wrong size")  # 6.8
        self.spend("GOAWAY")

    def _on_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(FRAME_SIZE_ERROR, "WINDOW_UPDATE of wrong size")  # 6.9
        self.spend("WINDOW_UPDATE")
        if stream_id and stream_id not in self.streams:
            self.require_started(stream_id)
        increment = read_u32(payload) & MAX_WINDOW
        if not increment:  # 6.9
            if stream_id:
                raise StreamFault(PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            raise ConnectionFault(PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        self.window_update(stream_id, increment)

    # Shutdown.

    def start_drain(self) -> None:
        """Ask the client to leave (6.8): a GOAWAY that refuses nothing yet, and once it has arrived the real one."""
        if self.draining or self.done:
            return
        self.draining = True
        self._drain_started = self.clock()
        self.alarm = min(self.alarm, self._drain_started + _DRAIN_PING_SECONDS)
        self.out += (goaway(MAX_WINDOW, NO_ERROR), ping(0, _DRAIN_PING))
        self.end_idle_calls()
        self.wake()

    def _last_goaway(self) -> None:
        if not self.refusing:
            self.refusing = True
            self.out.append(goaway(self.accepted_id, NO_ERROR))
            self.check_drained()

    def spoke_unasked(self) -> None:
        if self.draining:
            self.check_drained()
        self.wake()

    def check_drained(self) -> None:
        """While draining, after anything that may have ended or idled a call.

        Streams that only the client has not ended yet are waited for, `linger_seconds` at most: gRPC clients take a
        connection that ends under such a stream for an error, even if they have its trailers.
        """
        self.end_idle_calls()
        if self.refusing and not self.streams:
            self.done = True

    def abandon(self, message: str) -> None:
        """The grace is over: an error for every open call, and the end as soon as the clients have heard it."""
        if not self.done:
            self.draining = True
            self.end_all_calls(message)
            if not self.refusing:
                self.refusing = True
                self.out.append(goaway(self.accepted_id, NO_ERROR))
            self.check_drained()
            self.wake()

    def fault(self, fault: ConnectionFault) -> None:
        """A connection error (5.4.1)."""
        if fault.abuse:
            self.counters.abuse(fault.abuse)
        else:
            self.counters.protocol_errors += 1
        self.out.append(goaway(self.accepted_id, fault.code, fault.reason.encode()[:128]))
        self.lost()

    def lost(self) -> None:
        """No byte will come or go any more."""
        self.done = True
        self.alarm = inf
        self.forget_all()

    # Time.

    def tick(self, now: float) -> None:
        """To be called when `alarm` is due; whatever it writes is then in the output."""
        if self.done:
            return
        try:
            self._tick(now)
        except ConnectionFault as fault:
            self.fault(fault)
        if not self.done:
            self.alarm = min(now + TICK_SECONDS, self.next_deadline)

    def _tick(self, now: float) -> None:
        limits = self.limits
        refill = int((now - self._ticked) * limits.control_frames_per_second)
        self._ticked = now
        self.budget = min(self.budget + refill, limits.control_frames_burst)
        self.check_calls(now)
        if self.heard:
            self.heard = False
            self._last_heard = now
            self._pinged = inf
        if self.streams:
            self._last_busy = now
        if not (self.greeted and self.acknowledged):
            if now - self._opened >= limits.handshake_seconds:
                raise ConnectionFault(SETTINGS_TIMEOUT, "no SETTINGS in time", abuse="handshake timeout")  # 6.5.3
        elif now - self._pinged >= limits.keepalive_timeout_seconds:
            raise ConnectionFault(NO_ERROR, "no sign of life", abuse="keepalive timeout")
        elif now - self._last_heard >= limits.keepalive_seconds and self._pinged == inf:
            self._pinged = now
            self.out.append(ping(0, _KEEPALIVE_PING))
        if now - self._last_busy >= limits.idle_seconds:
            self.start_drain()
        if self.draining:
            if now - self._drain_started >= _DRAIN_PING_SECONDS:
                self._last_goaway()
            self.check_drained()

    def refuse_stream(self, stream_id: int) -> None:
        self.counters.streams_refused += 1
        self.spend("streams over the limit")
        self.send_reset(stream_id, REFUSED_STREAM)  # 5.1.2
        self.remember_reset(stream_id)
