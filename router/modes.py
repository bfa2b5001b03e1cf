"""What an Envoy says of itself: how it is set up to send messages (`protocol_config` of a stream's first one), and in
the gRPC metadata of our own configuration, how requests end and where their destination is read.
"""

from typing import Final

from protos.ext_proc_pb2 import ProcessingMode, ProcessingRequest
from router import replies, wire
from router.replies import Destination

ACCOUNTING_KEY: Final = "x-pointsman-accounting"
DESTINATION_KEY: Final = "x-pointsman-destination"
"""gRPC metadata by which an Envoy says what it does. Set in Envoy's configuration, so no client can."""

_FULL_DUPLEX: Final = ProcessingMode.FULL_DUPLEX_STREAMED
_BUFFERED: Final = frozenset({ProcessingMode.BUFFERED, ProcessingMode.BUFFERED_PARTIAL})

_DESTINATIONS: Final = tuple(Destination)
_MAX_KNOWN: Final = 64
_MAX_KNOWN_LENGTH: Final = 256


class Modes:
    """How an Envoy is set up, as the `protocol_config` of a stream's first message says."""

    __slots__ = (
        "ask_for_body",
        "buffered",
        "duplex_request",
        "duplex_response",
        "known",
        "request_names",
        "response_body_comes",
        "response_flows",
        "response_mode",
        "response_names",
    )

    def __init__(self, request: ProcessingRequest) -> None:
        config = request.protocol_config
        mode = config.request_body_mode
        self.known: bool = request.HasField("protocol_config")
        """False for an Envoy before 1.33, and for what is none."""
        self.request_names = wire.REQUEST_NAMES if self.known else wire.ANY_REQUEST_NAMES
        self.response_names = wire.RESPONSE_NAMES if self.known else wire.ANY_RESPONSE_NAMES
        self.response_mode = config.response_body_mode
        self.duplex_request: bool = mode == _FULL_DUPLEX
        self.duplex_response: bool = self.response_mode == _FULL_DUPLEX
        self.response_body_comes: bool = not self.known or self.response_mode != ProcessingMode.NONE
        self.response_flows: bool = self.response_mode in (ProcessingMode.STREAMED, _FULL_DUPLEX)
        """Response headers have been sent on when the body comes."""
        self.buffered: bool = mode in _BUFFERED or not self.known
        """A body comes in one message, whether or not that says it is the last. AIBrix takes every body so."""
        self.ask_for_body: bytes | None = None
        if mode == ProcessingMode.NONE and self.known:
            self.buffered = True
            self.ask_for_body = replies.REQUEST_HEADERS_ASK_FOR_BODY.get(self.response_mode)


class EnvoyPeer:
    """What is the same for every stream of one Envoy listener."""

    __slots__ = ("_cell", "_heeding", "_seen", "destination", "held", "later", "modes")

    def __init__(
        self, accounting: str = "stream", destination: str = "header", heeding: memoryview | None = None
    ) -> None:
        self.held = accounting != "access-log"
        """Charges are held by the streams, whose ends release them, and not left to the access log."""
        try:
            self.destination = Destination(destination)
        except ValueError:
            self.destination = Destination.HEADER
        self._heeding = memoryview(bytearray(len(_DESTINATIONS))) if heeding is None else heeding
        self._cell = _DESTINATIONS.index(self.destination)
        self._seen = False
        self.modes: dict[bytes, Modes] = {}
        """By what follows the phase in a stream's first message: a few constants in a well-behaved Envoy's life."""
        self.later: set[bytes] = set()
        """What follows the phase in later messages, which say nothing of modes."""

    @property
    def heeds_overrides(self) -> bool:
        """Whether such an Envoy has shown some worker a response by our override: one not shown did not come."""
        return self._heeding[self._cell] != 0

    def has_shown(self) -> None:
        """It shows a response."""
        if not self._seen:
            self._seen = True
            if not self.held:
                self._heeding[self._cell] = 1

    def remember(self, request: ProcessingRequest, modes: Modes, *, first: bool) -> None:
        """Know this message's modes by its bytes from now on, if they are all that follows the phase."""
        known = len(self.modes) if first else len(self.later)
        if request.attributes or len(request.metadata_context.filter_metadata) or known >= _MAX_KNOWN:
            return
        rest = ProcessingRequest()
        rest.CopyFrom(request)
        rest.ClearField(request.WhichOneof("request") or "observability_mode")
        remainder = rest.SerializeToString()
        if len(remainder) > _MAX_KNOWN_LENGTH:
            return
        if first:
            self.modes[remainder] = modes
        else:
            self.later.add(remainder)


UNKNOWN_MODES: Final = Modes(ProcessingRequest())
