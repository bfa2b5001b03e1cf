"""One ext_proc stream, that is one HTTP request, as a state machine without I/O: message bytes in, reply bytes out.

    request headers   remember path, strategy and the like; take away every header that names a destination
    request body      parse, decide, charge; the reply carries the pod
    response headers  say which pod answered, count the outcome
    response body     pass; with the last one the request is over

Envoy wants one reply of the matching type per message, in order. Which messages come depends on how Envoy is set up
(the first message says so), and the exchange takes any: headers only, body only, response messages without a
request body (Envoy's own error replies), empty last chunks, full duplex, where nothing is said before the whole body
is there and the body is then given back.

How the end of the request is known depends on the Envoy too. *By stream*: the stream stays open until the response
is over and its end releases the charge. *By access log*: Envoy (ours says so in the gRPC metadata of the stream) will
report each finished request to the access log service, so the stream is ended right after the decision: an open
stream costs memory at both ends, and if this process died Envoy would cut the client's answer.
"""

from collections.abc import Callable

from google.protobuf.message import DecodeError

from protos.ext_proc_pb2 import HttpHeaders, ProcessingMode, ProcessingRequest
from router import replies, wire
from router.bodies import known_path, read_body, strip_query
from router.errors import RequestError, body_too_large, unknown_path
from router.replies import Destination
from router.request import RoutingRequest
from router.scheduler import Decision, Scheduler

Reply = bytes | tuple[bytes, ...] | None

ACCOUNTING_KEY = "x-pointsman-accounting"
DESTINATION_KEY = "x-pointsman-destination"
"""gRPC metadata by which an Envoy says what it does. Set in Envoy's configuration, so no client can."""

_FULL_DUPLEX = ProcessingMode.FULL_DUPLEX_STREAMED
_BUFFERED = frozenset({ProcessingMode.BUFFERED, ProcessingMode.BUFFERED_PARTIAL})

_ATTRIBUTES = "envoy.filters.http.ext_proc"
_MOST_KNOWN = 64
_LONGEST_KNOWN = 256


class MessageError(Exception):
    """The peer sent something that is no ext_proc message."""


class Modes:
    """How an Envoy is set up, as the `protocol_config` of a stream's first message says."""

    __slots__ = ("ask_for_body", "buffered", "duplex_request", "duplex_response")

    def __init__(self, request: ProcessingRequest) -> None:
        config = request.protocol_config
        mode = config.request_body_mode
        self.duplex_request: bool = mode == _FULL_DUPLEX
        self.duplex_response: bool = config.response_body_mode == _FULL_DUPLEX
        self.buffered: bool = mode in _BUFFERED
        self.ask_for_body: bytes | None = None
        if mode == ProcessingMode.NONE and request.HasField("protocol_config"):
            self.buffered = True
            self.ask_for_body = replies.REQUEST_HEADERS_ASK_FOR_BODY.get(config.response_body_mode)


class Peer:
    """What is the same for every stream of one Envoy listener."""

    __slots__ = ("by_log", "destination", "modes")

    def __init__(self, accounting: str = "stream", destination: str = "header") -> None:
        self.by_log = accounting == "access-log"
        try:
            self.destination = Destination(destination)
        except ValueError:
            self.destination = Destination.HEADER
        self.modes: dict[bytes, Modes] = {}
        """By what follows the phase in a message: a few constants in a well-behaved Envoy's life."""

    def remember(self, request: ProcessingRequest, modes: Modes) -> None:
        """Know this message's modes by its bytes from now on, if they are all that follows the phase."""
        if request.attributes or len(request.metadata_context.filter_metadata) or len(self.modes) >= _MOST_KNOWN:
            return
        rest = ProcessingRequest()
        rest.CopyFrom(request)
        rest.ClearField(request.WhichOneof("request") or "observability_mode")
        remainder = rest.SerializeToString()
        if len(remainder) <= _LONGEST_KNOWN:
            self.modes[remainder] = modes


_UNKNOWN_MODES = Modes(ProcessingRequest())


class Exchange:
    """See the head of this file. `max_body_bytes` bounds what is collected of a body that comes in pieces."""

    __slots__ = (
        "_answered",
        "_body",
        "_body_bytes",
        "_decision",
        "_headers",
        "_held_back",
        "_max_body_bytes",
        "_modes",
        "_new_request_id",
        "_over",
        "_peer",
        "_request_done",
        "_request_id",
        "_scheduler",
        "finished",
        "idle",
    )

    def __init__(
        self, scheduler: Scheduler, peer: Peer, new_request_id: Callable[[], bytes], max_body_bytes: int
    ) -> None:
        self._scheduler = scheduler
        self._peer = peer
        self._new_request_id = new_request_id
        self._max_body_bytes = max_body_bytes
        self._headers: dict[str, bytes] | None = None
        self._request_id = b""
        self._body: list[bytes] | None = None
        self._body_bytes = 0
        self._decision: Decision | None = None
        self._request_done = False
        self._modes = _UNKNOWN_MODES
        self._held_back = False
        self._answered = False
        self._over = False
        self.finished = False
        self.idle = False

    def receive(self, message: bytes) -> Reply:
        """Take one ProcessingRequest, serialised. Raises MessageError when it is none."""
        try:
            part = wire.phase_part(message)
            if part is not None and self._known(message[part[1] :]):
                phase = message[0]
                if phase == wire.REQUEST_BODY or phase == wire.RESPONSE_BODY:
                    body = wire.read_body(message, part)
                    if body is not None:
                        start, end, over = body
                        if phase == wire.REQUEST_BODY:
                            return self._on_request_body(message[start:end], over)
                        return self._on_response_body(message[start:end], over)
                elif phase == wire.REQUEST_HEADERS:
                    headers = wire.read_headers(message, part, wire.REQUEST_NAMES)
                    if headers is not None:
                        return self._on_request_headers(*headers)
                elif phase == wire.RESPONSE_HEADERS:
                    headers = wire.read_headers(message, part, wire.RESPONSE_NAMES)
                    if headers is not None:
                        return self._on_response_headers(*headers)
            return self._receive_any(message)
        except RequestError as error:
            return self._refuse(error)

    def _receive_any(self, message: bytes) -> Reply:
        """The same by the general parser, for whatever `wire` does not know at sight."""
        try:
            request = ProcessingRequest.FromString(message)
        except DecodeError as error:
            raise MessageError(f"not a ProcessingRequest: {error}") from None
        if self._headers is None:
            self._begin(request)
        self._peer.remember(request, self._modes)
        which = request.WhichOneof("request")
        if which == "request_headers":
            return self._on_request_headers(*_plain(request.request_headers, wire.REQUEST_NAMES))
        if which == "request_body":
            return self._on_request_body(request.request_body.body, request.request_body.end_of_stream)
        if which == "response_headers":
            return self._on_response_headers(*_plain(request.response_headers, wire.RESPONSE_NAMES))
        if which == "response_body":
            return self._on_response_body(request.response_body.body, request.response_body.end_of_stream)
        if which == "request_trailers":
            return self._on_request_trailers()
        if which == "response_trailers":
            return self._on_response_trailers()
        raise MessageError("a ProcessingRequest without a request")

    def half_close(self) -> Reply:
        """Envoy will send nothing more."""
        return None

    def close(self) -> None:
        """The stream is over, whatever the reason. Releases what this stream still holds."""
        self._release()

    # -- phases, in the order in which Envoy goes through them

    def _known(self, remainder: bytes) -> bool:
        """What follows the phase in a message is the same for all streams of an Envoy: one look-up instead of a
        parse. In a first message it says how this Envoy is set up."""
        modes = self._peer.modes.get(remainder)
        if modes is None:
            return False
        if self._headers is None:
            self._modes = modes
            self._headers = {}
            self._request_id = self._new_request_id()
        return True

    def _begin(self, request: ProcessingRequest) -> None:
        """The first message, read in full: what mode is this Envoy in, and what do its attributes say?"""
        self._modes = Modes(request)
        self._headers = {}
        self._request_id = self._new_request_id()
        if request.attributes and _ATTRIBUTES in request.attributes:
            fields = request.attributes[_ATTRIBUTES].fields
            if "request.path" in fields:
                self._headers[":path"] = fields["request.path"].string_value.encode()

    def _on_request_headers(self, found: dict[str, bytes], over: bool) -> Reply:
        seen = self._headers
        assert seen is not None
        seen.update(found)
        modes = self._modes
        if over:
            # No body, nothing to route: it passes as it is, but without a destination of the client's choosing.
            self._request_done = True
            self.idle = True
            self.finished = self._peer.by_log and not modes.duplex_response
            return replies.REQUEST_HEADERS
        if modes.duplex_request and not self._request_done:
            self._held_back = True
            return None
        return modes.ask_for_body or replies.REQUEST_HEADERS

    def _on_request_body(self, piece: bytes, over: bool) -> Reply:
        modes = self._modes
        if self._request_done:
            if modes.duplex_request:
                return replies.streamed_body(piece, request=True, end=over)
            return replies.REQUEST_BODY
        # What Envoy buffers it sends once. When trailers follow that is not marked as the end.
        end = over or modes.buffered
        if end and self._body is None:
            return self._route(piece, end=over)
        self._body_bytes += len(piece)
        if self._body_bytes > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        if self._body is None:
            self._body = []
        self._body.append(piece)
        if end:
            return self._route(b"".join(self._body), end=over)
        return None if modes.duplex_request else replies.REQUEST_BODY

    def _on_request_trailers(self) -> Reply:
        if self._request_done:
            return replies.REQUEST_TRAILERS
        body = self._body
        if body is None or not self._modes.duplex_request:
            # Either nothing to route by, or a body that was streamed to the pod already.
            self._request_done = True
            self._body = None
            self.idle = True
            return (replies.REQUEST_HEADERS, replies.REQUEST_TRAILERS) if self._held_back else replies.REQUEST_TRAILERS
        routed = self._route(b"".join(body), end=False)
        assert isinstance(routed, tuple)
        return (*routed, replies.REQUEST_TRAILERS)

    def _route(self, body: bytes, *, end: bool = True) -> Reply:
        """The whole body is here: decide."""
        self._request_done = True
        self._body = None
        if len(body) > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        headers = self._headers
        assert headers is not None
        path = strip_query(headers.get(":path", b"").decode("utf-8", "replace"))
        if not known_path(path):
            raise unknown_path()
        parsed = read_body(path, headers.get("content-type", b"").decode("latin-1"), body)
        strategy = headers.get("routing-strategy", b"").decode("utf-8", "replace").strip()
        request = RoutingRequest(
            model=parsed.model,
            prompt_tokens=parsed.approximate_tokens,
            max_tokens=parsed.max_tokens,
            read_text=parsed.routing_text,
        )
        by_log = self._peer.by_log
        scheduler = self._scheduler
        decision = self._decision = scheduler.decide(
            request,
            strategy or scheduler.default_strategy,
            destination=self._peer.destination,
            held=not by_log,
            duplex=self._held_back,
        )
        modes = self._modes
        self.idle = not modes.duplex_request
        self.finished = by_log and not modes.duplex_response
        reply = decision.replies.request_body(self._request_id, decision.tokens)
        if not modes.duplex_request:
            return reply
        pieces = replies.streamed_body(body, request=True, end=end)
        if self._held_back:
            return (reply, *pieces)
        # An Envoy that sends no headers: the mutation goes with the first piece (two messages after each other are
        # one with the fields of both).
        return (reply + pieces[0], *pieces[1:])

    def _on_response_headers(self, found: dict[str, bytes], over: bool) -> Reply:
        status = found.get(":status", b"")
        decision = self._decision
        if decision is None:
            # Also when Envoy answered by itself before the request's body was complete.
            self._request_done = True
            self._body = None
            self.finished = not self._modes.duplex_response
            return replies.unrouted_response_headers(self._request_id, status)
        if over:
            self._release()
            self.finished = True
        if len(status) != 3:
            # Envoy was told to forward no `:status`. What is not known must not be set.
            return replies.unrouted_response_headers(self._request_id, b"")
        if not self._answered:
            self._answered = True
            self._scheduler.outcome(decision.charge, ok=not status.startswith(b"5"))
        return decision.replies.response_headers(self._request_id, status)

    def _on_response_body(self, piece: bytes, over: bool) -> Reply:
        if over:
            self._release()
            self.finished = True
        if self._modes.duplex_response:
            return replies.streamed_body(piece, request=False, end=over)
        return replies.RESPONSE_BODY

    def _on_response_trailers(self) -> Reply:
        self._release()
        self.finished = True
        return replies.RESPONSE_TRAILERS

    # -- ends

    def _refuse(self, error: RequestError) -> bytes:
        self._request_done = True
        self._body = None
        self.idle = True
        self._scheduler.series.add(1.0, "refused", str(error.status), error.code or "none")
        return replies.immediate(error.status, error.headers, error.body())

    def _release(self) -> None:
        decision = self._decision
        if decision is not None and not self._over:
            self._over = True
            self._scheduler.release(decision)


def _plain(headers: HttpHeaders, names: wire.Names) -> tuple[dict[str, bytes], bool]:
    """What `wire.read_headers` gives, from a parsed message."""
    wanted = names.wanted
    found = {h.key: h.raw_value or h.value.encode() for h in headers.headers.headers if h.key in wanted}
    return found, headers.end_of_stream
