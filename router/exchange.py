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

from protos.ext_proc_pb2 import HttpBody, HttpHeaders, HttpTrailers, ProcessingMode, ProcessingRequest
from router import replies
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
_WANTED = frozenset({":path", ":method", "content-type", "routing-strategy", "user", "traceparent"})


class MessageError(Exception):
    """The peer sent something that is no ext_proc message."""


class Peer:
    """What is the same for every stream of one Envoy listener."""

    __slots__ = ("by_log", "destination")

    def __init__(self, accounting: str = "stream", destination: str = "header") -> None:
        self.by_log = accounting == "access-log"
        try:
            self.destination = Destination(destination)
        except ValueError:
            self.destination = Destination.HEADER


class Exchange:
    """See the head of this file. `max_body_bytes` bounds what is collected of a body that comes in pieces."""

    __slots__ = (
        "_answered",
        "_ask_for_body",
        "_body",
        "_body_bytes",
        "_buffered",
        "_decision",
        "_duplex_request",
        "_duplex_response",
        "_headers",
        "_held_back",
        "_max_body_bytes",
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
        self._duplex_request = False
        self._duplex_response = False
        self._held_back = False
        self._buffered = False
        self._ask_for_body: bytes | None = None
        self._answered = False
        self._over = False
        self.finished = False
        self.idle = False

    def receive(self, message: bytes) -> Reply:
        """Take one ProcessingRequest, serialised. Raises MessageError when it is none."""
        try:
            request = ProcessingRequest.FromString(message)
        except DecodeError as error:
            raise MessageError(f"not a ProcessingRequest: {error}") from None
        if self._headers is None:
            self._begin(request)
        which = request.WhichOneof("request")
        if which is None:
            raise MessageError("a ProcessingRequest without a request")
        handler = _HANDLERS[which]
        try:
            return handler(self, getattr(request, which))
        except RequestError as error:
            return self._refuse(error)

    def half_close(self) -> Reply:
        """Envoy will send nothing more."""
        return None

    def close(self) -> None:
        """The stream is over, whatever the reason. Releases what this stream still holds."""
        self._release()

    # -- phases, in the order in which Envoy goes through them

    def _begin(self, request: ProcessingRequest) -> None:
        """The first message: what mode is this Envoy in, and what do its attributes say?"""
        config = request.protocol_config
        request_mode = config.request_body_mode
        self._duplex_request = request_mode == _FULL_DUPLEX
        self._buffered = request_mode in _BUFFERED
        if request_mode == ProcessingMode.NONE and request.HasField("protocol_config"):
            self._buffered = True
            self._ask_for_body = replies.REQUEST_HEADERS_ASK_FOR_BODY.get(config.response_body_mode)
        self._duplex_response = config.response_body_mode == _FULL_DUPLEX
        self._headers = {}
        self._request_id = self._new_request_id()
        if request.attributes and _ATTRIBUTES in request.attributes:
            fields = request.attributes[_ATTRIBUTES].fields
            if "request.path" in fields:
                self._headers[":path"] = fields["request.path"].string_value.encode()

    def _on_request_headers(self, headers: HttpHeaders) -> Reply:
        seen = self._headers
        assert seen is not None
        for header in headers.headers.headers:
            key = header.key
            if key in _WANTED:
                seen[key] = header.raw_value or header.value.encode()
        if headers.end_of_stream:
            # No body, nothing to route: it passes as it is, but without a destination of the client's choosing.
            self._request_done = True
            self.idle = True
            self.finished = self._peer.by_log and not self._duplex_response
            return replies.REQUEST_HEADERS
        if self._duplex_request and not self._request_done:
            self._held_back = True
            return None
        return self._ask_for_body or replies.REQUEST_HEADERS

    def _on_request_body(self, body: HttpBody) -> Reply:
        if self._request_done:
            if self._duplex_request:
                return replies.streamed_body(body.body, request=True, end=body.end_of_stream)
            return replies.REQUEST_BODY
        piece = body.body
        # What Envoy buffers it sends once. When trailers follow that is not marked as the end.
        end = body.end_of_stream or self._buffered
        if end and self._body is None:
            return self._route(piece, end=body.end_of_stream)
        self._body_bytes += len(piece)
        if self._body_bytes > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        if self._body is None:
            self._body = []
        self._body.append(piece)
        if end:
            return self._route(b"".join(self._body), end=body.end_of_stream)
        return None if self._duplex_request else replies.REQUEST_BODY

    def _on_request_trailers(self, trailers: HttpTrailers) -> Reply:
        if self._request_done:
            return replies.REQUEST_TRAILERS
        body = self._body
        if body is None or not self._duplex_request:
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
        self.idle = not self._duplex_request
        self.finished = by_log and not self._duplex_response
        reply = decision.replies.request_body(self._request_id, decision.tokens)
        if not self._duplex_request:
            return reply
        pieces = replies.streamed_body(body, request=True, end=end)
        if self._held_back:
            return (reply, *pieces)
        # An Envoy that sends no headers: the mutation goes with the first piece (two messages after each other are
        # one with the fields of both).
        return (reply + pieces[0], *pieces[1:])

    def _on_response_headers(self, headers: HttpHeaders) -> Reply:
        status = b""
        for header in headers.headers.headers:
            if header.key == ":status":
                status = header.raw_value or header.value.encode()
                break
        decision = self._decision
        if decision is None:
            # Also when Envoy answered by itself before the request's body was complete.
            self._request_done = True
            self._body = None
            self.finished = not self._duplex_response
            return replies.unrouted_response_headers(self._request_id, status)
        if headers.end_of_stream:
            self._release()
            self.finished = True
        if len(status) != 3:
            # Envoy was told to forward no `:status`. What is not known must not be set.
            return replies.unrouted_response_headers(self._request_id, b"")
        if not self._answered:
            self._answered = True
            self._scheduler.outcome(decision.charge, ok=not status.startswith(b"5"))
        return decision.replies.response_headers(self._request_id, status)

    def _on_response_body(self, body: HttpBody) -> Reply:
        if body.end_of_stream:
            self._release()
            self.finished = True
        if self._duplex_response:
            return replies.streamed_body(body.body, request=False, end=body.end_of_stream)
        return replies.RESPONSE_BODY

    def _on_response_trailers(self, trailers: HttpTrailers) -> Reply:
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


_HANDLERS: dict[str, Callable[..., Reply]] = {
    "request_headers": Exchange._on_request_headers,
    "request_body": Exchange._on_request_body,
    "request_trailers": Exchange._on_request_trailers,
    "response_headers": Exchange._on_response_headers,
    "response_body": Exchange._on_response_body,
    "response_trailers": Exchange._on_response_trailers,
}
