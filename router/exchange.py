"""One ext_proc stream, that is one HTTP request, as a state machine without I/O: message bytes in, reply bytes out.

    request headers   who is it, may they? take away every header that names a destination    router/request_phase.py
    request body      parse, decide, charge; the reply carries the pod                         router/request_phase.py
    response          which pod it was, errors in one shape, what was used, the end            router/response.py

Envoy wants one reply of the matching type per message, in order. Which messages come depends on how Envoy is set up
(the first message says so, `router/modes.py`), and the exchange takes any: headers only, body only, response messages
without a request body (Envoy's own error replies), empty last chunks, full duplex, where nothing is said before the
whole body is there and the body is then given back.

How the end of the request is known depends on the Envoy too. *By stream*: the stream stays open until the response
is over and its end releases the charge. *By access log*: Envoy (ours says so in the gRPC metadata of the stream) will
report each finished request to the access log service, so the stream is ended right after the decision: an open
stream costs memory at both ends, and if this process died Envoy would cut the client's answer. Only for a user whose
tokens are limited the response is asked for, since the log does not tell what was used.

Whoever counts limits may have to be waited for (Redis): then `receive` gives an awaitable of the reply.
"""

from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Final

from google.protobuf.message import DecodeError

from protos import MessageError
from protos.ext_proc_pb2 import HttpHeaders, ProcessingRequest
from router import replies, wire
from router.errors import RequestError
from router.modes import ACCOUNTING_KEY, DESTINATION_KEY, EnvoyPeer, Modes
from router.policy import NO_POLICY, Policy
from router.replies import Reply
from router.request_ids import RequestIds
from router.request_phase import RequestPhase
from router.response import Response
from router.scheduler import Decision, Scheduler
from router.wire import REQUEST_BODY, REQUEST_HEADERS, RESPONSE_BODY, RESPONSE_HEADERS

_MAX_PEERS: Final = 256
_ATTRIBUTES: Final = "envoy.filters.http.ext_proc"


class Exchange(RequestPhase):
    """See the head of this file."""

    __slots__ = ()

    def receive(self, message: bytes) -> Reply | Awaitable[Reply]:
        """Take one ProcessingRequest, serialised. Raises MessageError when it is none."""
        try:
            part = wire.phase_part(message)
            if part is None:
                return self._receive_any(message)
            # What follows the phase in a message is the same for all streams of an Envoy: a look-up, not a parse.
            rest = message[part[1] :]
            if self._headers is not None:
                if rest not in self._peer.later:
                    return self._receive_any(message)
            else:
                modes = self._peer.modes.get(rest)
                if modes is None:
                    return self._receive_any(message)
                self._modes = modes  # the first message says how this Envoy is set up
                self._headers = {}
                self._request_id = self._new_request_id()
            phase = message[0]
            if phase == REQUEST_BODY:
                body = wire.read_body(message, part)
                if body is not None:
                    start, stop, end_of_stream = body
                    return self._on_request_body(message[start:stop], end_of_stream)
            elif phase == REQUEST_HEADERS:
                headers = wire.read_headers(message, part, self._modes.request_names)
                if headers is not None:
                    return self._on_request_headers(headers[0], headers[1])
            elif phase == RESPONSE_BODY:
                body = wire.read_body(message, part)
                if body is not None:
                    start, stop, end_of_stream = body
                    return self._on_response_body(message[start:stop], end_of_stream)
            elif phase == RESPONSE_HEADERS:
                headers = wire.read_headers(message, part, self._modes.response_names)
                if headers is not None:
                    return self._on_response_headers(headers[0], headers[1])
            return self._receive_any(message)
        except RequestError as error:
            return self._refuse(error)

    def _receive_any(self, message: bytes) -> Reply | Awaitable[Reply]:
        """The same by the general parser, for whatever `wire` does not know at sight."""
        try:
            request = ProcessingRequest.FromString(message)
        except DecodeError as error:
            raise MessageError(f"not a ProcessingRequest: {error}") from None
        first = self._headers is None
        if first:
            self._begin(request)
        self._peer.remember(request, self._modes, first=first)
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
        self._left()
        return None

    def close(self) -> None:
        """The stream is over, whatever the reason. Releases what this stream still holds."""
        self._closed = True
        if self._settled or self._served is None:
            return
        response = self._response
        if response is not None:
            response.cut()
        elif self._decision is not None and not self._policy.draining:
            self._count_prompt(self._decision)
        if response is not None and response.complete_if_cut:
            self._end(response.status)
        else:
            self._end(0 if self._policy.draining else 499)

    def late(self, message: bytes | None) -> None:
        """Envoy has reset the stream, or ended its half of one that was ended here with the decision: had it taken the
        reply, it would have reset that one."""
        if message is None:
            self._left()

    def _left(self) -> None:
        """Envoy is done with the stream. If it has shown no response to a decision, the client has left, and Envoy may
        not have taken the decision: no log entry will give the charge back. (Should one come: `state.abandoned`.)"""
        decision, modes = self._decision, self._modes
        # Where the response was not to be shown, that there was none says nothing.
        shown = self.finished or modes.duplex_response or (modes.buffered and self._peer.heeds_overrides)
        if shown and decision is not None and not decision.held and self._response is None and not self._settled:
            self._scheduler.abandon(decision, self._request_id)
            self._count_prompt(decision)
            self._decision = None
            self._settled = True

    def _count_prompt(self, decision: Decision) -> None:
        """What is known to have been used when there was no response."""
        gate, grant = self._policy.gate, self._grant
        if gate is not None and grant is not None and grant.limited:
            gate.add_tokens(grant.user, decision.tokens)

    # -- phases, in the order in which Envoy goes through them

    def _begin(self, request: ProcessingRequest) -> None:
        """The first message, read in full: what mode is this Envoy in, and what do its attributes say?"""
        self._modes = Modes(request)
        self._headers = {}
        self._request_id = self._new_request_id()
        if request.attributes and _ATTRIBUTES in request.attributes:
            fields = request.attributes[_ATTRIBUTES].fields
            if "request.path" in fields:
                self._headers[":path"] = fields["request.path"].string_value.encode()

    def _on_response_headers(self, found: dict[str, bytes], end_of_stream: bool) -> Reply:
        response = self._response
        if response is None:
            # Also when Envoy answered by itself before the request's body was complete.
            self._request_handled = True
            self._body = None
            if self._modes.buffered and not self._modes.duplex_response and self._needs_response:
                self._peer.has_shown()
            response = self._response = Response(
                self._scheduler,
                self._policy,
                self._modes,
                self._request_id,
                self._decision,
                self._served,
                refused=self._refused,
            )
        reply = response.headers(found, end_of_stream)
        self.idle = not response.holds_back
        self._settle_if_done(response)
        return reply

    def _on_response_body(self, piece: bytes, end_of_stream: bool) -> Reply | Awaitable[Reply]:
        response = self._response
        if response is None:
            self._request_handled = True  # too late to decide
            self._body = None
            if end_of_stream:
                self._end(0)
                self.finished = True
            if self._modes.duplex_response:
                return replies.streamed_body(piece, request=False, end_of_stream=end_of_stream)
            return replies.RESPONSE_BODY
        reply = response.body(piece, end_of_stream)
        self.idle = not response.holds_back
        if isinstance(reply, bytes | tuple) or reply is None:
            if response.done:
                self._settle_if_done(response)
            return reply
        return self._later(reply, partial(self._counted, response))

    def _counted(self, response: Response, reply: Reply) -> Reply:
        self._settle_if_done(response)
        return reply

    def _on_response_trailers(self) -> Reply:
        response = self._response
        self.finished = True
        if response is None:
            self._request_handled = True
            self._body = None
            self._end(0)
            return replies.RESPONSE_TRAILERS
        reply = response.trailers()
        self._settle_if_done(response)
        return reply

    # -- ends

    def _settle_if_done(self, response: Response) -> None:
        """Has the response come to its end?"""
        if response.done:
            self._end(response.status)
        if response.finished:
            self.finished = True

    def _end(self, status: int) -> None:
        """The request is over: give its charge back and count it, once. Status 0 is not known. Where Envoy's access
        log tells of it, that does both."""
        if self._settled:
            return
        self._settled = True
        decision = self._decision
        if decision is None:
            if self._served is not None and status:
                self._scheduler.series.add(1.0, "finished", "", str(status))
        elif decision.held:
            self._scheduler.release(decision)
            if status:
                self._scheduler.finished(decision.pod, status)


class Exchanges:
    """Opens the exchanges of one process."""

    __slots__ = ("_last", "_last_peer", "_max_body_bytes", "_new_request_id", "_peers", "_policy", "_scheduler")

    def __init__(self, scheduler: Scheduler, max_body_bytes: int, policy: Policy = NO_POLICY) -> None:
        self._scheduler = scheduler
        self._max_body_bytes = max_body_bytes
        self._policy = policy
        self._new_request_id = RequestIds().new
        self._peers: dict[tuple[str, str], EnvoyPeer] = {}
        self._last: Mapping[str, str] | None = None
        self._last_peer = EnvoyPeer()

    def open(self, metadata: Mapping[str, str]) -> Exchange:
        """The exchange of a stream with these request headers. The transport gives the same mapping for the same
        headers, so that most are looked at once."""
        if metadata is not self._last:
            self._last_peer = self._peer(metadata)
            self._last = metadata
        return Exchange(self._scheduler, self._last_peer, self._new_request_id, self._max_body_bytes, self._policy)

    def _peer(self, metadata: Mapping[str, str]) -> EnvoyPeer:
        accounting, destination = metadata.get(ACCOUNTING_KEY, "stream"), metadata.get(DESTINATION_KEY, "header")
        peer = self._peers.get((accounting, destination))
        if peer is None:
            peer = EnvoyPeer(accounting, destination, self._scheduler.tables.heeding)
            if len(self._peers) < _MAX_PEERS:
                self._peers[(accounting, destination)] = peer
        return peer


def _plain(headers: HttpHeaders, names: wire.Names) -> tuple[dict[str, bytes], bool]:
    """What `wire.read_headers` gives, from a parsed message."""
    wanted = names.wanted
    listed = headers.headers.headers
    found = {key: h.raw_value or h.value.encode() for h in listed if (key := h.key.lower()) in wanted}
    return found, headers.end_of_stream


__all__ = ["ACCOUNTING_KEY", "DESTINATION_KEY", "EnvoyPeer", "Exchange", "Exchanges", "MessageError"]
