"""The pod's answer as it passes by: which pod it was, what went wrong, what it used, and when it is over.

    response headers   say which pod answered, count the outcome for passive health, choose how the body shall come
    response body      an error is held back until it is whole, and leaves in one shape; usage is read; the rest passes

How much of the body is looked at depends on who needs it. Usage is read for users whose tokens are limited, for the
usage metrics, and for Envoys that do not say how they are set up: those get AIBrix's replies one by one. All others
get one constant reply a chunk, or are asked to send none.

An error that takes the place of the pod's own can leave in two ways. Before an Envoy has sent the response headers on,
an ImmediateResponse may replace everything; afterwards it resets the client's stream. An Envoy that sends bodies as
they come has sent the headers on when the body arrives, so there the body's bytes are exchanged, and content-type and
content-length were dealt with at the headers. Only an Envoy that does not tell its modes (they all do since 1.33) is
answered as AIBrix answers.

A buffered answer can be given headers with its body (`x-update-tpm`), but one larger than Envoy's buffer becomes a
500, so buffering is asked for only where the pod has announced a small body.

Cost of a message, with the exchange around it: 1.0 µs for a chunk that nobody needs, 1.6 µs for one whose usage is
read, 5.5 µs for response headers (`pytest tests/router/test_responses.py --benchmark-enable`).
"""

from collections.abc import Awaitable
from typing import Any, Final

import orjson

from protos.ext_proc_pb2 import ProcessingMode
from router import replies
from router.errors import INVALID_API_KEY, WRONG_KEY, Header, RequestError
from router.limits import Grant, Totals
from router.modes import Modes
from router.policy import Policy
from router.replies import TARGET_POD_IP, Reply
from router.retries import answered_after_retries
from router.scheduler import Decision, Scheduler
from router.upstream_errors import MAX_BYTES, Normalised, disguised, normalise, without_words
from router.usage import PARSED_WHOLE, SseUsage, Usage, read_end, read_reply
from state.ledger import Charge

SMALL_BODY_BYTES: Final = 32 << 10
"""What any Envoy buffers: the smallest limit met is Envoy Gateway's default."""
KEPT_OF_LARGE_REPLIES: Final = 16 << 10
"""Of a JSON reply too long to be parsed, the end is kept: that is where its usage stands."""

_BUFFERED: Final = ProcessingMode.BUFFERED
_STREAMED: Final = ProcessingMode.STREAMED
_JSON: Final = b"application/json"


class Served:
    """What the response side must know of a request whose model is served here."""

    __slots__ = ("choices", "continuous", "extra", "grant", "model", "stream", "tells_usage")

    def __init__(self, model: str, stream: bool, tells_usage: bool, grant: Grant | None) -> None:
        self.model = model
        self.stream = stream
        self.tells_usage = tells_usage
        """Whether replies on this path have usage at all."""
        self.grant = grant
        self.choices: Any = None
        """How many completions were asked for; None for one."""
        self.continuous = False
        """Every chunk of the stream was asked to tell the usage so far."""
        self.extra: tuple[Header, ...] = ()
        """Headers that only this response gets."""


class Response:
    """See the head of this file. `served` is None for what was not routed: a GET, or an answer of Envoy's own."""

    __slots__ = (
        "_answered",
        "_body_in_one_message",
        "_decision",
        "_error_body",
        "_events",
        "_expects_body",
        "_json_body",
        "_json_truncated",
        "_length",
        "_modes",
        "_pass_through",
        "_policy",
        "_request_id",
        "_scheduler",
        "_served",
        "_sse",
        "_status",
        "done",
        "finished",
        "status",
    )

    def __init__(
        self,
        scheduler: Scheduler,
        policy: Policy,
        modes: Modes,
        request_id: bytes,
        decision: Decision | None,
        served: Served | None,
        *,
        refused: bool,
    ) -> None:
        self._scheduler = scheduler
        self._policy = policy
        self._modes = modes
        self._request_id = request_id
        self._decision = decision
        self._answered: Charge | None = None
        """In the name of the pod that answered, where that is not the one first chosen."""
        self._served = served
        self._pass_through = refused
        self._status = b""
        self._error_body: bytearray | None = None
        self._sse: SseUsage | None = None
        self._events = 0
        """Of the stream that has ended."""
        self._json_body: bytearray | None = None
        self._json_truncated = False
        self._length = -1
        self._expects_body = modes.response_body_comes
        self._body_in_one_message = modes.known and modes.response_mode == _BUFFERED
        """The body comes in one message, which is not marked as the end when trailers follow."""
        self.status = 0
        """What the client gets, as far as that is known; 0 before the headers."""
        self.done = False
        """The request is done with: its charge can be given back."""
        self.finished = False
        """Nothing more needs to be said on this stream."""

    @property
    def complete_if_cut(self) -> bool:
        """Whether the stream may end now without anything missing: no message is due that would tell the end."""
        return self.status > 0 and not self._expects_body

    @property
    def holds_back(self) -> bool:
        """Whether the client would miss something if the stream ended now."""
        return bool(self._error_body) or (self._modes.duplex_response and not self.done)

    # -- headers

    def headers(self, found: dict[str, bytes], end_of_stream: bool) -> Reply:
        """The reply to the response headers."""
        if self.status:
            return replies.response_headers(())  # a second time: nothing is said twice
        status = self._status = found.get(":status", b"")
        if status and not (len(status) == 3 and status.isdigit() and b"100" <= status < b"600"):
            self.status = 500
            self._status = b""
            return self._immediate(_internal_error())
        code = self.status = int(status) if status else 200
        decision = self._decision
        if decision is not None and decision.tried and TARGET_POD_IP in found:
            self._look_who_answered(decision, found[TARGET_POD_IP])
        if decision is not None and decision.held and status:
            self._scheduler.outcome(self._answered or decision.charge, ok=code < 500)
        reply = self._reply_to_headers(decision, status)
        served = self._served
        if served is not None and served.extra:
            reply += replies.response_headers(served.extra)
        if end_of_stream:
            if code in _REPLACED and not self._pass_through:
                return self._immediate(_REPLACED[code]())
            self._end()
            return reply
        if not self._pass_through and found.get("content-encoding", b"identity") != b"identity":
            self._pass_through = True
            if code < 400 and served is not None and served.tells_usage and self._usage_is_wanted(served):
                self._count(None)
        length = found.get("content-length", b"")
        self._length = int(length) if length.isdigit() and len(length) < 16 else -1
        if not self._pass_through:
            if code >= 400:
                return reply + self._prepare_error(found.get("content-type", b""))
            if served is not None and served.tells_usage and self._usage_is_wanted(served):
                return reply + self._prepare_usage(served, found.get("content-type"))
        return reply + self._prepare_nothing()

    def _look_who_answered(self, decision: Decision, address: bytes) -> None:
        """Envoy may have retried on another pod than the one chosen first."""
        scheduler, tried = self._scheduler, decision.tried
        told = address.decode("latin-1")
        # A charge that was left to the access log is told there what became of it.
        pod = answered_after_retries(scheduler, decision.charge, tried, told, count=decision.held)
        if pod is not None:
            decision.replies = scheduler.response_of(decision, pod, len(self._request_id))
            decision.pod = pod
            self._answered = Charge(pod.slot, pod.generation, 0)

    def _reply_to_headers(self, decision: Decision | None, status: bytes) -> bytes:
        if decision is None:
            return replies.unrouted_response_headers(self._request_id, status)
        if status:
            return decision.replies.response_headers(self._request_id, status)
        return replies.response_headers(
            decision.replies.response_pairs(self._request_id, status), clear_route_cache=True
        )

    def _prepare_error(self, content_type: bytes) -> bytes:
        modes = self._modes
        if not modes.known:
            self._error_body = bytearray()
            return b""
        small = self._length <= SMALL_BODY_BYTES
        if not modes.response_body_comes:
            if not small:
                return b""
            self._error_body = bytearray()
            self._body_in_one_message = True
            return replies.RESPONSE_BODY_MODE[_BUFFERED]
        self._error_body = bytearray()
        if not modes.response_flows:
            return b""
        set_type: tuple[Header, ...] = ()
        if not content_type.startswith(_JSON):
            set_type = (("content-type", _JSON),)
        extra_mutations = replies.response_headers(set_type, remove=("content-length",))
        if small and self._length >= 0 and not modes.duplex_response:
            extra_mutations += replies.RESPONSE_BODY_MODE[_BUFFERED]
        return extra_mutations

    def _usage_is_wanted(self, served: Served) -> bool:
        grant = served.grant
        return not self._modes.known or self._policy.usage_metrics or (grant is not None and grant.limited)

    def _prepare_usage(self, served: Served, content_type: bytes | None) -> bytes:
        modes = self._modes
        sse = served.stream if content_type is None else content_type.startswith(b"text/event-stream")
        if sse:
            self._sse = SseUsage()
        else:
            self._json_body = bytearray()
        if not modes.known or modes.duplex_response:
            return b""
        if not sse and 0 <= self._length <= SMALL_BODY_BYTES:
            return replies.RESPONSE_BODY_MODE[_BUFFERED] if modes.response_mode != _BUFFERED else b""
        return b"" if modes.response_body_comes else replies.RESPONSE_BODY_MODE[_STREAMED]

    def _prepare_nothing(self) -> bytes:
        modes = self._modes
        if self._served is None and modes.known and not modes.duplex_response:
            self._end()  # nobody waits for the end of what was not routed
        elif modes.known and modes.response_mode == _STREAMED:
            self._expects_body = False
            return replies.RESPONSE_BODY_MODE[ProcessingMode.NONE]
        return b""

    # -- body

    def body(self, piece: bytes, end_of_stream: bool) -> Reply | Awaitable[Reply]:
        """The reply to a piece of the response's body."""
        self._expects_body = True
        if not self.done:
            if self._error_body is not None:
                return self._error_piece(self._error_body, piece, end_of_stream)
            if self._sse is not None:
                return self._sse_piece(self._sse, piece, end_of_stream)
            if self._json_body is not None:
                return self._json_piece(self._json_body, piece, end_of_stream)
        if end_of_stream:
            self._end()
        return self._pass(piece, end_of_stream)

    def trailers(self) -> Reply:
        """The reply to the response's trailers. They stand for the end of a body whose last piece did not say so."""
        error_body = self._error_body
        self._error_body = None
        self._end()
        if error_body is not None and self._modes.duplex_response:
            normalised = self._normalised(bytes(error_body))
            body = bytes(error_body) if normalised is None else normalised.body
            return (*replies.streamed_body(body, request=False, end_of_stream=False), replies.RESPONSE_TRAILERS)
        if self._sse is not None:
            self._sse.finish()
            self._count(self._sse.usage)
        elif self._json_body is not None:
            collected = bytes(self._json_body)
            self._count(read_end(collected) if self._json_truncated else read_reply(collected)[0])
        return replies.RESPONSE_TRAILERS

    def _error_piece(self, error_body: bytearray, piece: bytes, end_of_stream: bool) -> Reply:
        """Hold an error back until it is whole."""
        first = not error_body
        error_body += piece
        duplex = self._modes.duplex_response
        whole = (
            end_of_stream or self._body_in_one_message or len(error_body) == self._length or _is_json_object(error_body)
        )
        if not whole and len(error_body) <= MAX_BYTES and self._modes.response_mode != ProcessingMode.BUFFERED_PARTIAL:
            return None if duplex else replies.RESPONSE_BODY_HELD_BACK
        self._error_body = None
        body = bytes(error_body)
        normalised = self._normalised(body) if whole else None
        if normalised is not None and not self._modes.known:
            return self._immediate(normalised)
        if end_of_stream:
            self._end()
        if normalised is None:
            if duplex:
                return replies.streamed_body(body, request=False, end_of_stream=end_of_stream)
            return replies.RESPONSE_BODY if first else replies.response_body(body=body)
        if duplex:
            return replies.streamed_body(normalised.body, request=False, end_of_stream=end_of_stream)
        length = ("content-length", b"%d" % len(normalised.body))
        return replies.response_body((("content-type", _JSON), length, *normalised.headers), body=normalised.body)

    def _normalised(self, body: bytes) -> Normalised | None:
        if not body and self.status in _REPLACED:
            return _REPLACED[self.status]()
        if not body and not self._modes.known:
            return without_words(self.status)
        return normalise(self.status, body)

    def _sse_piece(self, sse: SseUsage, piece: bytes, end_of_stream: bool) -> Reply | Awaitable[Reply]:
        sse.feed(piece)
        if end_of_stream:
            sse.finish()
        elif self._modes.duplex_response or not self._usage_is_complete(sse):
            return self._pass(piece, end_of_stream)
        self._sse, self._events = None, sse.events
        return self._used(sse.usage, piece, end_of_stream, wait=not self._modes.known)

    def _usage_is_complete(self, sse: SseUsage) -> bool:
        """Whether what the stream has told is all. AIBrix takes the first usage for the last; that is right as long as
        nobody asked for more, and engines do not tell more by themselves."""
        if sse.done or not sse.said:
            return sse.done
        served = self._served
        assert served is not None
        if sse.complete and served.choices in (None, 1):
            return True
        return not self._modes.known and not served.continuous

    def _json_piece(self, collected: bytearray, piece: bytes, end_of_stream: bool) -> Reply | Awaitable[Reply]:
        collected += piece
        if len(collected) > PARSED_WHOLE:
            self._json_truncated = True
        if self._json_truncated:
            del collected[:-KEPT_OF_LARGE_REPLIES]
        if not end_of_stream:
            return self._pass(piece, end_of_stream)
        self._json_body = None
        if self._json_truncated:
            return self._used(read_end(bytes(collected)), piece, end_of_stream, wait=False)
        usage, document = read_reply(bytes(collected))
        modes = self._modes
        if not modes.known or modes.response_mode == _BUFFERED:
            error = disguised(document)
            if error is not None:
                self._end()
                return self._immediate(error)
        return self._used(usage, piece, end_of_stream, wait=True)

    def _used(self, usage: Usage | None, piece: bytes, end_of_stream: bool, *, wait: bool) -> Reply | Awaitable[Reply]:
        """The usage is known, or that there is none: the end for us, though more of the body may come."""
        counted = self._count(usage)
        if isinstance(counted, Totals) or counted is None:
            self._end()
            return self._used_reply(usage, counted, piece, end_of_stream)
        if not wait:
            self._end()
            return self._used_reply(usage, None, piece, end_of_stream)
        return self._used_later(usage, counted, piece, end_of_stream)

    async def _used_later(
        self, usage: Usage | None, counted: Awaitable[Totals | None], piece: bytes, end_of_stream: bool
    ) -> Reply:
        totals = await counted
        self._end()
        return self._used_reply(usage, totals, piece, end_of_stream)

    def _used_reply(self, usage: Usage | None, totals: Totals | None, piece: bytes, end_of_stream: bool) -> Reply:
        if usage is None or self._modes.duplex_response:
            return self._pass(piece, end_of_stream)
        pairs: tuple[Header, ...] = (("request-id", self._request_id),)
        if totals is not None:
            pairs = (("x-update-rpm", b"%d" % totals.requests), ("x-update-tpm", b"%d" % totals.tokens), *pairs)
        return replies.response_body(pairs)

    def cut(self) -> None:
        """The stream is over before the response: the client has left, say. What was used till then is counted."""
        if not self.done and (self._sse is not None or self._json_body is not None):
            self._count(self._sse.usage if self._sse is not None else None)

    def _estimated(self) -> Usage:
        """What an answer used that does not say so: the prompt as it was charged to the pod, and the events so far."""
        prompt = self._decision.tokens if self._decision is not None else 0
        output = self._sse.events if self._sse is not None else self._events
        return Usage(prompt, output, prompt + output)

    def _count(self, usage: Usage | None) -> Totals | Awaitable[Totals | None] | None:
        """Count what was used, where None is said by our own estimate, if it is a limited user's."""
        served = self._served
        if served is None:
            return None
        if usage is None:
            if served.grant is None or not served.grant.limited:
                return None
            usage = self._estimated()
        elif self._policy.usage_metrics:
            series = self._scheduler.series
            series.add(usage.prompt_tokens, "used_tokens", served.model, "prompt")
            series.add(usage.completion_tokens, "used_tokens", served.model, "completion")
            if usage.cached_tokens > 0:
                series.add(usage.cached_tokens, "used_tokens", served.model, "cached")
        gate, grant = self._policy.gate, served.grant
        if grant is not None and grant.user and self._decision is not None:
            self._scheduler.used(self._decision, grant.user, usage.prompt_tokens, usage.completion_tokens)
        if gate is None or grant is None or not grant.user:
            return None
        return gate.add_tokens(grant.user, usage.total_tokens)

    # -- ends

    def _end(self) -> None:
        self.done = True
        self.finished = True

    def _pass(self, piece: bytes, end_of_stream: bool) -> Reply:
        if self._modes.duplex_response:
            return replies.streamed_body(piece, request=False, end_of_stream=end_of_stream)
        return replies.RESPONSE_BODY

    def _immediate(self, error: Normalised) -> bytes:
        """An ImmediateResponse, with the headers that the response would have had. The peer ends the stream."""
        self.done = True
        decision, served = self._decision, self._served
        pairs = (
            replies.response_pairs(self._request_id, self._status)
            if decision is None
            else decision.replies.response_pairs(self._request_id, self._status)
        )
        extra = served.extra if served is not None else ()
        self.status = error.status
        return replies.immediate(error.status, (*pairs, *extra, *error.headers), error.body)


def _as_reply(error: RequestError) -> Normalised:
    return Normalised(error.status, error.body(), error.headers)


def _internal_error() -> Normalised:
    return _as_reply(RequestError(500, "Internal server error"))


def _wrong_key() -> Normalised:
    return _as_reply(RequestError(401, WRONG_KEY, code=INVALID_API_KEY))


_REPLACED: Final = {401: _wrong_key, 500: _internal_error}
"""What stands for errors without a body, as in AIBrix."""


def _is_json_object(body: bytearray) -> bool:
    """Whether this is whole already: nothing can follow a JSON object but blanks."""
    if not body.startswith(b"{") or not body.rstrip().endswith(b"}"):
        return False
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
