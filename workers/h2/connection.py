"""One HTTP/2 connection, seen from the server, without a socket: bytes in, bytes out.

Read this file from `receive`: bytes are walked once, frame by frame, in `_frames`. A DATA frame that holds whole
messages of a stream on which nothing is pending is answered there and then, without leaving the function; everything
else has a method of its own. Nothing is built per frame. Other DATA is in `inbound`, frames that carry no message in
`control`, what the calls say in `call_handler`, what is sent in `outbound`.

A cut frame at the end of a read is kept in `_rest` and completed from the next read, so that a byte of a large body is
copied once out of the read and once into its message.

Cost, compiled (`python -m bench.h2_micro`): 10 to 12 us of CPU for a whole stream of two messages with 1 KB of body, 28
us with 64 KB, 66 us with 220 KB, 3 us for each further message and its reply. What was measured and paid, when it was
interpreted: answering in the loop instead of in methods (-4 us a stream), PING and WINDOW_UPDATE in the loop (-4 us,
grpc-go sends one each per message), the cache of header blocks (-10 us where it hits); compiled: constants that are
`Final`, types for what `struct` returns (-8 us).
"""

from collections.abc import Callable
from math import inf
from typing import Final

from workers.calls import Call, Methods
from workers.h2.faults import ConnectionFault, StreamFault
from workers.h2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    HEADER_BYTES,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_HEADER_LIST_SIZE,
    MAX_WINDOW,
    MIN_MAX_FRAME,
    PADDED,
    PING,
    PING_ACK_HEADER,
    PREFACE,
    PREFIX_BYTES,
    PRIORITY_FIELDS,
    PROTOCOL_ERROR,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    first_message_header,
    message_header,
    read_header,
    settings,
    trailers_ok,
    window_update,
)
from workers.h2.inbound import Inbound
from workers.h2.limits import CREDIT_PER_MESSAGE, TransportCounters, TransportLimits
from workers.h2.requests import Request, RequestReader
from workers.h2.stream import Stream

_MAX_FRAME: Final = MIN_MAX_FRAME
"""What we allow a client's frames to hold: SETTINGS_MAX_FRAME_SIZE stays at its default."""

_NOT_PLAIN: Final = PADDED | PRIORITY_FIELDS | END_HEADERS
_INSIDE_HEADERS: Final = 1
_EXPECT_SETTINGS: Final = 2


class Connection(Inbound):
    """`receive` takes what was read and returns what to write. `done` says that the connection is to be closed then."""

    def __init__(
        self, methods: Methods, limits: TransportLimits, counters: TransportCounters, clock: Callable[[], float]
    ) -> None:
        super().__init__(methods, limits, counters, clock)
        self._reader = RequestReader(methods, limits.max_header_list_bytes, limits.header_cache_entries)
        self._max_streams = limits.max_concurrent_streams
        self._max_open_streams = limits.max_open_streams
        self._cached_request = self._reader.cached
        self._half_window = limits.stream_window_bytes // 2
        self._half_connection_window = limits.connection_window_bytes // 2
        self._rest = bytearray()
        self._at_boundary = False
        """The next byte is the first of a frame."""
        self._unread = 0
        self._special = _EXPECT_SETTINGS
        """Not 0 while only one kind of frame is allowed."""
        self._block = b""
        self._block_id = 0
        self._block_flags = 0
        self._continuations = 0
        self._preface_done = False
        announced = {
            MAX_CONCURRENT_STREAMS: limits.max_concurrent_streams,
            INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
            MAX_HEADER_LIST_SIZE: limits.max_header_list_bytes,
        }
        self.out.append(settings(announced))
        if limits.connection_window_bytes > DEFAULT_WINDOW:
            self.out.append(window_update(0, limits.connection_window_bytes - DEFAULT_WINDOW))

    def receive(self, data: bytes) -> bytes:
        if self.done:
            return b""
        self.heard = True
        try:
            if self._at_boundary:
                self._frames(data, 0)
            else:
                self._continue(data)
            if self._parked:
                self.unpark()
        except ConnectionFault as fault:
            self.fault(fault)
        if self.draining:
            self.check_drained()
        out = self.out
        if not out:
            return b""
        written = b"".join(out)
        out.clear()
        return written

    def set_writable(self, writable: bool) -> bytes:
        """The socket is full, or no longer. Returns what can now be written."""
        self.writable = writable
        if not writable:
            return b""
        if not self.done:
            self.flush()
            self.unpark()
        return self.take()

    def _continue(self, data: bytes) -> None:
        """A read that begins within the preface or within a frame."""
        rest = self._rest
        self._at_boundary = True
        if not self._preface_done:
            rest += data
            if not PREFACE.startswith(rest[: len(PREFACE)]):
                raise ConnectionFault(PROTOCOL_ERROR, "not an HTTP/2 client")  # 3.4
            if len(rest) < len(PREFACE):
                self._at_boundary = False
                return
            self._preface_done = True
            data = bytes(rest[len(PREFACE) :])
            rest.clear()
            self._frames(data, 0)
            return
        if len(rest) < HEADER_BYTES:
            data = bytes(rest) + data
            rest.clear()
            self._frames(data, 0)
            return
        missing = HEADER_BYTES + int.from_bytes(rest[:3], "big") - len(rest)
        if len(data) < missing:
            rest += data
            self._at_boundary = False
            return
        frame = bytes(rest) + data[:missing]
        rest.clear()
        self._frames(frame, 0)
        if missing < len(data):
            self._frames(data, missing)

    def _frames(self, buf: bytes, pos: int) -> None:
        """Everything from `pos` on; an incomplete frame at the end goes to `_rest`. Raises `ConnectionFault`."""
        end = len(buf)
        streams = self.streams
        out = self.out
        word: int
        flags: int
        stream_id: int
        half_window = self._half_window
        received = self._unread
        special = self._special
        credit = 0
        nuisance = ""
        while end - pos >= HEADER_BYTES:
            word, flags, stream_id = read_header(buf, pos)
            length = word >> 8
            start = pos + HEADER_BYTES
            pos = start + length
            if length > _MAX_FRAME:
                raise ConnectionFault(FRAME_SIZE_ERROR, "frame over SETTINGS_MAX_FRAME_SIZE")  # 4.2
            if pos > end:
                pos = start - HEADER_BYTES
                break
            kind = word & 0xFF
            if kind == DATA and not special:
                received += length
                stream = streams.get(stream_id)
                if (
                    stream is not None
                    and stream.fast_path
                    and flags <= END_STREAM
                    and (unread := stream.unread + length) < half_window
                    and not self.congested
                ):
                    stream.unread = unread
                    call: Call = stream.call  # type: ignore[assignment]
                    while start < pos:
                        # The compression flag is the highest of the five bytes: set, it makes the number too large.
                        stop = start + PREFIX_BYTES + int.from_bytes(buf[start : start + PREFIX_BYTES], "big")
                        if stop > pos:
                            self.collect(stream, buf[start:pos])
                            break
                        credit += CREDIT_PER_MESSAGE
                        try:
                            reply = call.receive(buf[start + PREFIX_BYTES : stop])
                        except Exception as error:
                            self.fail(stream, error)
                            break
                        start = stop
                        if (
                            isinstance(reply, bytes)
                            and (total := (size := len(reply)) + PREFIX_BYTES) <= stream.send_window
                            and total <= self.send_window
                            and total <= MIN_MAX_FRAME
                            and not self.hpack_prefix
                        ):
                            stream.send_window -= total
                            self.send_window -= total
                            if stream.headers_sent:
                                out.append(message_header(total << 8, 0, stream_id, 0, size))
                            else:
                                stream.headers_sent = True
                                out.append(first_message_header(stream_id, size))
                            out.append(reply)
                            if call.finished:
                                stream.ended_remote = bool(flags)
                                self.finish(stream)
                        else:
                            self.take_result(stream, call, reply)
                        if not stream.fast_path:
                            if stream.call is not None:
                                if start < pos:
                                    self.collect(stream, buf[start:pos])
                                else:
                                    self.settle(stream)
                            break
                    if flags:
                        if stream.fast_path and stream.headers_sent:
                            self._half_close_quietly(stream)
                        elif not stream.ended_remote:
                            self.remote_end(stream)
                    elif not length:
                        self.spend("empty DATA")
                else:
                    try:
                        self.data(stream, stream_id, flags, buf, start, pos)
                    except StreamFault as fault:
                        self._stream_fault(stream_id & MAX_WINDOW, fault)
                continue
            # What grpc-go sends with every message, to measure the path, comes before the general case.
            if kind == WINDOW_UPDATE and not (stream_id or special) and length == 4:
                increment = int.from_bytes(buf[start:pos], "big")
                window = self.send_window + increment
                if increment and window <= MAX_WINDOW:
                    self.send_window = window
                    credit -= 1
                    nuisance = "WINDOW_UPDATE"
                    if self.blocked:
                        self.flush()
                    continue
            elif kind == PING and not (stream_id or special or flags) and length == 8:
                out.append(PING_ACK_HEADER)
                out.append(buf[start:pos])
                credit -= 1
                nuisance = "PING"
                continue
            try:
                if kind == HEADERS and not special:
                    if flags & _NOT_PLAIN == END_HEADERS and stream_id & 1:
                        self._header_block(stream_id & MAX_WINDOW, flags & END_STREAM, buf[start:pos])
                    else:
                        self._headers(stream_id & MAX_WINDOW, flags, buf[start:pos])
                elif special:
                    self._in_order(kind, flags, stream_id & MAX_WINDOW, buf[start:pos])
                elif kind == CONTINUATION:
                    raise ConnectionFault(PROTOCOL_ERROR, "CONTINUATION without HEADERS")  # 6.10
                else:
                    self.on_control(kind, flags, stream_id & MAX_WINDOW, buf[start:pos])
            except StreamFault as fault:
                self._stream_fault(stream_id & MAX_WINDOW, fault)
            special = self._special
        if pos < end:
            self._rest += buf[pos:]
            self._at_boundary = False
        if received > self._half_connection_window:
            if received > self.limits.connection_window_bytes:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "connection window overrun")  # 6.9
            out.append(window_update(0, received))
            received = 0
        self._unread = received
        if credit:
            self.budget += credit
            if self.budget < 0:
                self.spend(nuisance)

    def _half_close_quietly(self, stream: Stream) -> None:
        """The client has finished sending, and nothing stands between that and the trailers: `remote_end` at once."""
        call: Call = stream.call  # type: ignore[assignment]
        stream.ended_remote = stream.half_closed = True
        try:
            reply = call.half_close()
        except Exception as error:
            self.fail(stream, error)
            return
        if reply is not None or self.hpack_prefix:
            self.reply(stream, call, reply)
            if stream.call is not None:
                self.finish(stream)
            return
        self.out.append(trailers_ok(stream.id))
        # `forget`, without looking for what a stream on the fast path cannot have.
        del self.streams[stream.id]
        self.counters.streams_open -= 1
        stream.call = None
        stream.fast_path = False
        self.close_call(call)

    def _stream_fault(self, stream_id: int, fault: StreamFault) -> None:
        """A stream error (5.4.2)."""
        self.counters.protocol_errors += 1
        self.spend("stream errors")
        stream = self.streams.get(stream_id)
        if stream is not None:
            self.reset(stream, fault.code)
        else:
            self.send_reset(stream_id, fault.code)
            self.remember_reset(stream_id)

    def _in_order(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """A frame where only one kind is allowed."""
        if self._special == _EXPECT_SETTINGS:
            if kind != SETTINGS or flags & ACK:
                raise ConnectionFault(PROTOCOL_ERROR, "the first frame is not SETTINGS")  # 3.4
            self._special = 0
            self.greeted = True
            self.on_control(kind, flags, stream_id, payload)
            return
        if kind != CONTINUATION or stream_id != self._block_id:
            raise ConnectionFault(PROTOCOL_ERROR, "header block interrupted")  # 4.3, 6.2
        self.spend("CONTINUATION")
        self._continuations += 1
        if self._continuations > self.limits.max_continuations:
            raise ConnectionFault(ENHANCE_YOUR_CALM, "too many CONTINUATION frames", abuse="CONTINUATION")
        self._collect_block(payload, flags)

    # Headers.

    def _headers(self, stream_id: int, flags: int, block: bytes) -> None:
        if not stream_id & 1:
            raise ConnectionFault(PROTOCOL_ERROR, "HEADERS on a stream that no client may open")  # 5.1.1
        fault = None
        if flags & (PADDED | PRIORITY_FIELDS):
            block, fault = self._strip(stream_id, flags, block)
        if flags & END_HEADERS and fault is None:
            self._header_block(stream_id, flags & END_STREAM, block)
            return
        if fault is not None:
            # The block must be decoded all the same (4.3); self-dependency is the only fault found so far.
            if flags & END_HEADERS:
                self._reader.skip(block)
                self.last_id = max(self.last_id, stream_id)
                raise fault
            raise ConnectionFault(fault.code, fault.reason)
        self._special = _INSIDE_HEADERS
        self._block_id = stream_id
        self._block_flags = flags & END_STREAM
        self._continuations = 0
        self._block = b""
        self._collect_block(block, 0)

    def _strip(self, stream_id: int, flags: int, block: bytes) -> tuple[bytes, StreamFault | None]:
        """Padding and priority fields off (6.2)."""
        if flags & PADDED:
            block = _unpad(block)
        if not flags & PRIORITY_FIELDS:
            return block, None
        if len(block) < 5:
            raise ConnectionFault(FRAME_SIZE_ERROR, "HEADERS too short for its priority fields")
        try:
            self.check_dependency(stream_id, block)
        except StreamFault as fault:
            return block[5:], fault
        return block[5:], None

    def _collect_block(self, piece: bytes, flags: int) -> None:
        self._block += piece
        if len(self._block) > 2 * self.limits.max_header_list_bytes:
            raise ConnectionFault(ENHANCE_YOUR_CALM, "header block too long", abuse="header block")  # 10.5.1
        if flags & END_HEADERS:
            block, self._block = self._block, b""
            self._special = 0
            self._header_block(self._block_id, self._block_flags, block)

    def _header_block(self, stream_id: int, end: int, block: bytes) -> None:
        """A whole header block: a new stream, trailers, or something that comes too late. `end`: with END_STREAM."""
        if stream_id <= self.last_id:
            self._late_headers(stream_id, end, block)
            return
        self.last_id = stream_id
        if self.refusing:  # 6.8: the client knows from GOAWAY that this stream was not processed
            self._reader.skip(block)
            self.remember_reset(stream_id)
            self.spend("streams after GOAWAY")
            return
        self.accepted_id = stream_id
        request = self._cached_request(block) or self._reader.read(block)
        counters = self.counters
        if len(self.streams) >= self._max_streams or counters.streams_open >= self._max_open_streams:
            self.refuse_stream(stream_id)
            return
        self.streams[stream_id] = stream = Stream(stream_id, self.initial_send_window)
        counters.streams_opened += 1
        counters.streams_open += 1
        if request.plain_method is not None:
            try:
                stream.call = request.plain_method(request.metadata)
                stream.fast_path = True
                if request.listens:
                    stream.late = stream.call  # type: ignore[assignment]
                if request.timeout_seconds != inf:
                    self.set_deadline(stream, self.clock() + request.timeout_seconds)
            except Exception as error:
                self.fail(stream, error)
        else:
            self._unusual(stream, request, end)
        if end and stream_id in self.streams:
            self.remote_end(stream)

    def _unusual(self, stream: Stream, request: Request, end: int) -> None:
        """A request with a length, a method that pushes or none at all."""
        if request.content_length >= 0:
            stream.content_left = request.content_length
            if end and stream.content_left:
                raise StreamFault(PROTOCOL_ERROR, "content-length without content")  # 8.1.1
        if request.method is None:
            self.spend("refused requests")
        self.open_call(stream, request)

    def _late_headers(self, stream_id: int, end: int, block: bytes) -> None:
        stream = self.streams.get(stream_id)
        if stream is None:
            self._reader.skip(block)
            if stream_id in self.reset_ids:
                self.spend("frames on closed streams")
                return  # 5.1: sent before our RST_STREAM arrived
            # 5.1, 5.1.1: an id that was skipped can never be used; of other closed streams only the last is known.
            code = STREAM_CLOSED if stream_id == self.last_id else PROTOCOL_ERROR
            raise ConnectionFault(code, "HEADERS on a closed stream")
        self._reader.read_trailers(block)
        if stream.ended_remote:
            raise StreamFault(STREAM_CLOSED, "HEADERS after END_STREAM")  # 5.1
        if not end:
            raise StreamFault(PROTOCOL_ERROR, "trailers that do not end the stream")  # 8.1
        if stream.content_left > 0:
            raise StreamFault(PROTOCOL_ERROR, "less content than content-length")  # 8.1.1
        self.remote_end(stream)


def _unpad(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(PROTOCOL_ERROR, "padding longer than its frame")  # 6.1, 6.2
    return payload[1 : len(payload) - payload[0]]
