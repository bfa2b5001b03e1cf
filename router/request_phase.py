"""The request's phases of an exchange: who is it and may they; then, with the body, what do they want and where does
it go. `Exchange` (router/exchange.py) says when.

The order of the checks is AIBrix's, and clients can see it: token, user, limits; path, body, usage of streams, model,
profile and strategy, the model's requests per second, label filter, pod.
"""

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

from router import replies
from router.bodies import Body, read_request, strip_query, takes_body, upstream_path
from router.errors import (
    RequestError,
    body_has_passed,
    body_too_large,
    header_value,
    include_usage_not_set,
    no_body,
    unknown_path,
)
from router.fleet import Candidates
from router.limits import Grant
from router.modes import UNKNOWN_MODES, EnvoyPeer
from router.policy import NO_POLICY, Policy
from router.profiles import effective_strategy
from router.replies import PREFILL_TARGET_POD, PREFILL_TARGET_POD_IP, Destination, Reply
from router.request import RoutingRequest
from router.response import Response, Served
from router.rules import Rules
from router.scheduler import Decision, Scheduler
from router.strategies.pd import LEGS, Legs
from router.strategies.session_affinity import NEW_SESSION_ID, SESSION_ID

Awaited = TypeVar("Awaited")

EXPLAIN: Final = "x-pointsman-explain"
_RARE: Final = ("x-aibrix-session-key", "x-session-id", "external-filter", EXPLAIN)
"""Headers about where a request may go that few requests have."""
_TRACE_ID: Final = re.compile(rb"[0-9a-fA-F]{32}")
"""W3C trace context: where a client sends one, it is the request's id."""
_WITHOUT_USAGE: Final = frozenset({"media", "audio"})


class RequestPhase:
    """The request half of `Exchange`: admission, the request's headers, body and trailers, rules, decision, refusals.
    It declares all state of a stream, that of the response half too, and is never used alone. `max_body_bytes` bounds
    what is collected of a body that comes in pieces.

    attribute           set                                             read
    _modes              first message: how this Envoy is set up         in every phase
    _headers            first message, request headers                  admission, the decision; None: no message yet
    _request_id         first message, or from `traceparent`            every reply that tells it, the response
    _grant              admission                                       the decision, limits, usage of the response
    _headers_deferred   request headers, in full duplex                 the decision: one reply for headers and body
    _body, _body_bytes  request body, piece by piece                    routing, when the body is complete
    _request_handled    routed, refused, or a response came first       request body and trailers: nothing to decide
    _decision           the decision; None again once abandoned         response, `late`, settling
    _served             the decision, if the response will be seen      response, `close`, settling
    _refused            refused, or only explained                      response: Envoy's own reply passes as it is
    _response           first message of the response                   all others of the response, `close`, `late`
    _closed             the stream has ended                            the decision: nobody is there any more
    _settled            charge given back and counted, or left to the   settling: once
                        access log
    finished            nothing more is to be said on this stream       the transport: ends it; `late`
    idle                no reply is due that the client would miss      the transport: may end it when it drains
    """

    __slots__ = (
        "_body",
        "_body_bytes",
        "_closed",
        "_decision",
        "_grant",
        "_headers",
        "_headers_deferred",
        "_max_body_bytes",
        "_modes",
        "_new_request_id",
        "_peer",
        "_policy",
        "_refused",
        "_request_handled",
        "_request_id",
        "_response",
        "_scheduler",
        "_served",
        "_settled",
        "finished",
        "idle",
    )

    def __init__(
        self,
        scheduler: Scheduler,
        peer: EnvoyPeer,
        new_request_id: Callable[[], bytes],
        max_body_bytes: int,
        policy: Policy = NO_POLICY,
    ) -> None:
        self._scheduler = scheduler
        self._peer = peer
        self._new_request_id = new_request_id
        self._max_body_bytes = max_body_bytes
        self._policy = policy
        self._headers: dict[str, bytes] | None = None
        self._request_id = b""
        self._grant: Grant | None = None
        self._body: list[bytes] | None = None
        self._body_bytes = 0
        self._decision: Decision | None = None
        self._served: Served | None = None
        self._request_handled = False
        self._refused = False
        self._modes = UNKNOWN_MODES
        self._headers_deferred = False
        self._closed = False
        self._response: Response | None = None
        self._settled = False
        self.finished = False
        self.idle = False

    # -- headers

    def _on_request_headers(self, found: dict[str, bytes], end_of_stream: bool) -> Reply | Awaitable[Reply]:
        seen = self._headers
        assert seen is not None
        seen.update(found)
        if "traceparent" in found:
            parts = found["traceparent"].split(b"-")
            if len(parts) == 4 and _TRACE_ID.fullmatch(parts[1]):
                self._request_id = parts[1]
        gate = self._policy.gate
        needed = (gate is not None and gate.needed) or "user" in found
        if needed and self._grant is None and not self._request_handled:
            return self._admit(partial(self._after_admission, end_of_stream))
        return self._after_admission(end_of_stream)

    def _admit(self, then: Callable[[], Reply | Awaitable[Reply]]) -> Reply | Awaitable[Reply]:
        """Ask who this is and whether they may, then go on."""
        gate, headers = self._policy.gate, self._headers
        assert headers is not None
        user = headers.get("user", b"")
        if gate is None:
            self._grant = Grant(user.decode("utf-8", "replace"))
            return then()
        answer = gate.admit(user, headers.get("authorization", b""))
        if not isinstance(answer, Grant):
            return self._later(answer, partial(self._admitted, then))
        self._grant = answer
        return then()

    def _admitted(self, then: Callable[[], Reply | Awaitable[Reply]], grant: Grant) -> Reply | Awaitable[Reply]:
        self._grant = grant
        return then()

    def _after_admission(self, end_of_stream: bool) -> Reply:
        modes = self._modes
        if end_of_stream:
            # Nothing to route: it passes as it is, but without a destination of the client's choosing.
            self._check_bodyless()
            self._request_handled = True
            self.idle = True
            self.finished = not self._peer.held and not modes.duplex_response
            return replies.REQUEST_HEADERS
        if modes.duplex_request and not self._request_handled:
            self._headers_deferred = True
            return None
        if self._needs_response and modes.buffered:
            return replies.REQUEST_HEADERS_WATCH
        return modes.ask_for_body or replies.REQUEST_HEADERS

    def _check_bodyless(self) -> None:
        """Raises RequestError for a request without a body on a path that takes one, and on any where Envoy would send
        what has no destination to a pod of its own choice."""
        assert self._headers is not None
        if "access-control-request-method" in self._headers:
            return  # a browser may ask whether it may ask
        if takes_body(self._headers.get(":path", b"")):
            raise no_body()
        if self._peer.destination is Destination.OVERRIDE_HOST:
            raise unknown_path()

    @property
    def _needs_response(self) -> bool:
        """Whether the response of a request that ends by access log must be seen all the same."""
        grant = self._grant
        return not self._peer.held and (self._policy.usage_metrics or (grant is not None and grant.limited))

    def _on_request_body(self, piece: bytes, end_of_stream: bool) -> Reply | Awaitable[Reply]:
        modes = self._modes
        if self._request_handled:
            if modes.duplex_request:
                return replies.streamed_body(piece, request=True, end_of_stream=end_of_stream)
            return replies.REQUEST_BODY
        # What Envoy buffers it sends once. When trailers follow that is not marked as the end.
        body_complete = end_of_stream or modes.buffered
        if body_complete and self._body is None:
            return self._route(piece, end_of_stream=end_of_stream)
        self._body_bytes += len(piece)
        if self._body_bytes > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        if self._body is None:
            self._body = []
        self._body.append(piece)
        if body_complete:
            return self._route(b"".join(self._body), end_of_stream=end_of_stream)
        return None if modes.duplex_request else replies.REQUEST_BODY

    def _on_request_trailers(self) -> Reply | Awaitable[Reply]:
        if self._request_handled:
            return replies.REQUEST_TRAILERS
        body = self._body
        if body is None or not self._modes.duplex_request:
            # Either nothing to route by, or a body that was streamed to the pod already.
            if body is None and self._peer.destination is Destination.OVERRIDE_HOST:
                self._check_bodyless()
            self._request_handled = True
            self._body = None
            self.idle = True
            if self._headers_deferred:
                return (replies.REQUEST_HEADERS, replies.REQUEST_TRAILERS)
            return replies.REQUEST_TRAILERS
        routed = self._route(b"".join(body), end_of_stream=False)
        return _with_trailers(routed) if isinstance(routed, bytes | tuple | None) else _trailers_later(routed)

    def _route(self, body: bytes, *, end_of_stream: bool = True) -> Reply | Awaitable[Reply]:
        """The whole body is here: read it."""
        self._request_handled = True
        self._body = None
        gate = self._policy.gate
        if self._grant is None and gate is not None and gate.needed:
            # An Envoy that sends no headers: nobody in particular, if that will do.
            return self._admit(partial(self._read, body, end_of_stream))
        return self._read(body, end_of_stream)

    def _read(self, body: bytes, end_of_stream: bool) -> Reply | Awaitable[Reply]:
        if len(body) > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        headers = self._headers
        assert headers is not None
        parsed = read_request(headers.get(":path", b""), headers.get("content-type", b""), body)
        grant = self._grant
        if grant is not None and grant.tells_usage and parsed.wants_no_usage:
            raise include_usage_not_set()
        scheduler = self._scheduler
        started = scheduler.clock()
        candidates, rules = scheduler.serving(parsed.model)
        strategy = ""
        if "routing-strategy" in headers:
            strategy = headers["routing-strategy"].decode("utf-8", "replace").strip()
        if rules is not None:
            return self._by_rules(rules, strategy, parsed, candidates, body, end_of_stream)
        return self._choose(
            strategy or scheduler.default_strategy, parsed, candidates, started, b"", body, end_of_stream
        )

    def _by_rules(
        self, rules: Rules, strategy: str, parsed: Body, candidates: Candidates, body: bytes, end_of_stream: bool
    ) -> Reply | Awaitable[Reply]:
        """Of a model that has rules: its profile, strategy and engine, and its requests per second."""
        headers = self._headers
        assert headers is not None
        scheduler = self._scheduler
        profile_name = ""
        per_second = 0
        if rules.profiles is None:
            strategy = strategy or scheduler.default_strategy
        else:
            requested = headers.get("config-profile", b"").decode("utf-8", "replace")
            resolved = rules.profiles.resolve(requested, parsed.counted_tokens, parsed.max_tokens)
            profile = resolved.profile
            strategy = effective_strategy(resolved.locked_strategy, strategy, profile, scheduler.default_strategy)
            profile_name = header_value(resolved.chosen_by_auto).decode()
            per_second = profile.requests_per_second if profile is not None else 0
        if strategy:
            scheduler.strategy(strategy)
        extra_mutations = b""
        new_path = None
        if rules.engine:
            path = headers.get(":path", b"").decode("utf-8", "replace")
            new_path = upstream_path(strip_query(path), rules.engine)
        if new_path is not None:
            extra_mutations = replies.request_body_more(((":path", new_path.encode()),), duplex=self._headers_deferred)
        gate = self._policy.gate
        choose = partial(
            self._choose, strategy, parsed, candidates, None, extra_mutations, body, end_of_stream, profile_name
        )
        if gate is None or per_second <= 0:
            return choose()
        answer = gate.admit_model(parsed.model, per_second)
        if isinstance(answer, Grant):
            return self._choose_or_give_back(choose, answer)
        return self._later(answer, partial(self._choose_or_give_back, choose))

    def _choose_or_give_back(
        self, choose: Callable[[], Reply | Awaitable[Reply]], model_grant: Grant
    ) -> Reply | Awaitable[Reply]:
        chosen = False
        try:
            reply = choose()
            chosen = self._decision is not None or not self._refused
            return reply
        finally:
            gate = self._policy.gate
            if not chosen and gate is not None:
                gate.give_back_model(model_grant)  # refused, or only explained

    def _choose(
        self,
        strategy: str,
        parsed: Body,
        candidates: Candidates,
        started: float | None,
        extra_mutations: bytes,
        body: bytes,
        end_of_stream: bool,
        profile_name: str = "",
    ) -> Reply | Awaitable[Reply]:
        """Decide, and say so."""
        if self._closed:
            return None  # while somebody was waited for
        headers = self._headers
        assert headers is not None
        modes, peer, scheduler = self._modes, self._peer, self._scheduler
        duplex = self._headers_deferred
        grant = self._grant
        request = RoutingRequest(parsed.model, parsed.approximate_tokens, parsed.max_tokens, None, parsed)
        if grant is not None:
            request.user = grant.user
        if not strategy:
            return self._leave_to_envoy(parsed, extra_mutations, body, end_of_stream, profile_name)
        explain = False
        if _any_of(_RARE, headers):
            scheduler.strategy(strategy)  # that it is none comes before that a filter leaves nobody
            candidates = self._by_headers(headers, request, candidates)
            explain = EXPLAIN in headers and self._policy.explain
            if explain and headers[EXPLAIN].strip().lower() == b"only":
                return self._explained(scheduler.explain(request, strategy, candidates).text())
        decision = self._decision = scheduler.decide(
            request,
            strategy,
            candidates,
            destination=peer.destination,
            held=peer.held,
            duplex=duplex,
            started=started,
            explain=explain,
            id_bytes=len(self._request_id),
        )
        self.idle = not (modes.duplex_request or modes.duplex_response)
        extra: tuple[tuple[str, str], ...] = ()
        if profile_name or explain or request.notes is not None:
            extra = _extra_headers(profile_name, request.notes, decision)
            if request.notes is not None and LEGS in request.notes:
                legs: Legs = request.notes[LEGS]
                return self._hand_over(decision, legs, parsed, extra, extra_mutations, body, end_of_stream)
        if not peer.held:
            needs_response = self._needs_response
            if extra:
                extra_mutations += replies.for_the_response(extra)
            self.finished = not modes.duplex_response and not needs_response
            if needs_response or modes.duplex_response:
                self._serve(parsed, ())
        else:
            self._serve(parsed, extra)
        reply = decision.replies.request_body(self._request_id, decision.tokens)
        if not modes.known and not self._body_bytes:
            # AIBrix sets it. An Envoy that says how it is set up does not need it: the body is not changed.
            reply += replies.content_length(len(body))
        if extra_mutations or decision.endpoints:
            reply += decision.endpoints + extra_mutations
        return self._with_body(reply, body, end_of_stream) if modes.duplex_request else reply

    def _hand_over(
        self,
        decision: Decision,
        legs: Legs,
        parsed: Body,
        extra: tuple[tuple[str, str], ...],
        extra_mutations: bytes,
        body: bytes,
        end_of_stream: bool,
    ) -> Awaitable[Reply]:
        """Another pod prefills first. Should the stream end meanwhile, that gives back both charges."""
        modes, headers = self._modes, self._headers
        assert headers is not None
        self.idle = False
        self._scheduler.hold_for(decision, legs)
        self._serve(parsed, ())
        if not modes.buffered and not modes.duplex_request:
            raise body_has_passed()
        passed = {"content-type": "application/json", "x-request-id": self._request_id.decode("latin-1")}
        for name in ("authorization", "traceparent"):
            value = headers.get(name, b"").decode("latin-1")
            if value and value.isascii() and value.isprintable():
                passed[name] = value
        path = strip_query(headers.get(":path", b"").decode("utf-8", "replace"))
        prefilled = self._scheduler.hand_over(decision, legs, parsed, body, path, passed)
        then = partial(self._handed_over, decision, legs, parsed, extra, extra_mutations, body, end_of_stream)
        return self._later(prefilled, then)

    def _handed_over(
        self,
        decision: Decision,
        legs: Legs,
        parsed: Body,
        extra: tuple[tuple[str, str], ...],
        extra_mutations: bytes,
        body: bytes,
        end_of_stream: bool,
        instead: bytes | None,
    ) -> Reply:
        """Send the request to the pod that decodes, with another body if there is one."""
        if self._closed:
            return None
        modes, held = self._modes, self._peer.held
        self._scheduler.prefilled(decision, held=held)
        self.idle = not (modes.duplex_request or modes.duplex_response)
        pod = legs.pod
        if pod is not None:
            extra = (*extra, (PREFILL_TARGET_POD, pod.name), (PREFILL_TARGET_POD_IP, pod.host_ip.strip("[]")))
        if held:
            self._serve(parsed, extra)
        else:
            extra_mutations += replies.for_the_response(extra)
            needs_response = self._needs_response
            self.finished = not modes.duplex_response and not needs_response
            if self.finished:
                self._served = None
        reply = decision.replies.request_body(self._request_id, decision.tokens)
        reply += decision.endpoints + extra_mutations
        if modes.duplex_request:
            if instead is not None:
                body = instead
                length = ("content-length", b"%d" % len(body))
                reply += replies.request_body_more((length,), duplex=self._headers_deferred)
        elif instead is not None:
            reply += replies.request_body_instead(instead) + replies.content_length(len(instead))
        elif not modes.known and not self._body_bytes:
            reply += replies.content_length(len(body))
        return self._with_body(reply, body, end_of_stream)

    def _by_headers(self, headers: dict[str, bytes], request: RoutingRequest, candidates: Candidates) -> Candidates:
        """What few requests say of where they want to go. Raises RequestError."""
        if "x-aibrix-session-key" in headers:
            request.session_key = headers["x-aibrix-session-key"].decode("utf-8", "surrogateescape")
        if "x-session-id" in headers:
            request.notes = {SESSION_ID: headers["x-session-id"].decode("latin-1")}
        if "external-filter" in headers:
            return self._scheduler.select(candidates, headers["external-filter"].decode("utf-8", "replace"))
        return candidates

    def _serve(self, parsed: Body, extra: tuple[tuple[str, str], ...]) -> None:
        """The response will be seen: note what must be known of the request then."""
        served = self._served = Served(parsed.model, parsed.stream, parsed.kind not in _WITHOUT_USAGE, self._grant)
        if extra:
            served.extra = tuple([(name, value.encode("latin-1", "replace")) for name, value in extra])
        if parsed.stream and parsed.json is not None:
            served.choices = parsed.json.get("n")
            options = parsed.json.get("stream_options")
            served.continuous = type(options) is dict and options.get("continuous_usage_stats") is True

    def _leave_to_envoy(
        self, parsed: Body, extra_mutations: bytes, body: bytes, end_of_stream: bool, profile_name: str
    ) -> Reply:
        """Nobody has named a strategy: Envoy finds the model's service by the `model` header."""
        duplex = self._headers_deferred
        self.idle = not (self._modes.duplex_request or self._modes.duplex_response)
        self.finished = not self._peer.held and not self._modes.duplex_response and not self._needs_response
        self._serve(parsed, (("x-aibrix-config-profile", profile_name),) if profile_name else ())
        reply = replies.request_body_more((("model", parsed.model.encode()),), duplex=duplex)
        if duplex:
            reply = replies.REQUEST_HEADERS + reply
        return self._with_body(reply + extra_mutations, body, end_of_stream)

    def _with_body(self, reply: bytes, body: bytes, end_of_stream: bool) -> Reply:
        if not self._modes.duplex_request:
            return reply
        pieces = replies.streamed_body(body, request=True, end_of_stream=end_of_stream)
        if self._headers_deferred:
            return (reply, *pieces)
        # An Envoy that sends no headers: the mutation goes with the first piece (two messages after each other are
        # one with the fields of both).
        return (reply + pieces[0], *pieces[1:])

    # -- ends

    async def _later(self, awaited: Awaitable[Awaited], then: Callable[[Awaited], Reply | Awaitable[Reply]]) -> Reply:
        """Wait, then go on. What is refused on the way is answered as anywhere else."""
        try:
            reply = then(await awaited)
            return reply if isinstance(reply, bytes | tuple) or reply is None else await reply
        except RequestError as error:
            return self._refuse(error)

    def _explained(self, text: str) -> bytes:
        """The receipt is all that was asked for."""
        self._refused = True
        self.idle = True
        return replies.immediate(200, (), text.encode(), "explained")

    def _refuse(self, error: RequestError) -> bytes:
        self._request_handled = True
        self._refused = True
        self._body = None
        self.idle = True
        decision = self._decision
        if decision is not None and decision.legs is not None and not self._settled:  # whose prompt nobody prefills
            self._scheduler.release(decision)
            self._decision = None
            self._served = None
        self._scheduler.series.add(1.0, "refused", str(error.status), error.code or "none")
        return replies.immediate(error.status, error.headers, error.body())


def _any_of(names: tuple[str, ...], headers: dict[str, bytes]) -> bool:
    for name in names:  # a loop compiles to less than `any`  # noqa: SIM110
        if name in headers:
            return True
    return False


def _extra_headers(
    profile_name: str, notes: dict[str, object] | None, decision: Decision
) -> tuple[tuple[str, str], ...]:
    """Headers for this response alone, in the order of `replies.RESPONSE_HEADERS`."""
    extra = []
    if notes is not None and NEW_SESSION_ID in notes:
        extra.append(("x-session-id", str(notes[NEW_SESSION_ID])))
    if profile_name:
        extra.append(("x-aibrix-config-profile", profile_name))
    if decision.receipt is not None:
        extra.append(("x-pointsman-decision", decision.receipt.text()))
    return tuple(extra)


def _with_trailers(routed: Reply) -> Reply:
    if routed is None:
        return None
    return (*((routed,) if isinstance(routed, bytes) else routed), replies.REQUEST_TRAILERS)


async def _trailers_later(routed: Awaitable[Reply]) -> Reply:
    return _with_trailers(await routed)
