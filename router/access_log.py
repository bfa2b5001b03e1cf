"""What Envoy's access log says of finished requests: the end of every charge that was left to it.

The reply that routed a request put a ticket into Envoy's dynamic metadata, `replica.slot.generation.tokens`; the log
entry brings it back with the response code and the timings, to whichever worker Envoy's log stream is connected to.
Clients cannot write dynamic metadata, so a ticket is always a router's. Each entry releases its charge once. An entry
about a request that another replica routed says nothing about the loads that are kept here. It is put down for that
replica, to which the replicator brings it, where there is one; else it is passed over.

Where Envoy may retry on another pod it was given several addresses in order. The entry names the one that answered:
those before it have failed (`router/retries.py`).
"""

from typing import Final

from google.protobuf.message import DecodeError

from protos import MessageError
from protos.access_log_pb2 import HTTPAccessLogEntry, StreamAccessLogsMessage
from router import log_wire
from router.replies import ENDPOINT, ENVOY_LB, NAMESPACE
from router.retries import answered_after_retries
from router.scheduler import Scheduler
from state.ledger import Charge

MAX_ENDPOINTS: Final = 17
"""The longest list that a configuration can ask for."""


class AccessLog:
    """One log stream: many messages, no replies."""

    __slots__ = ("_own", "_scheduler", "finished", "idle")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._own = f"{scheduler.tables.replica}.".encode()
        self.finished = False
        self.idle = True

    def receive(self, message: bytes) -> None:
        """Take one batch of entries. Raises MessageError when it is none."""
        entries = log_wire.entries(message)
        try:
            if entries is None:
                for entry in StreamAccessLogsMessage.FromString(message).http_logs.log_entry:
                    self.take(entry)
                return
            for start, end in entries:
                ended = log_wire.read(message, start, end)
                if ended is None or not self._take(ended):
                    self.take(HTTPAccessLogEntry.FromString(message[start:end]))
        except DecodeError as error:
            raise MessageError(f"not a StreamAccessLogsMessage: {error}") from None

    def _take(self, ended: log_wire.Ended) -> bool:
        """A request has ended as most do, with an answer of the pod it was sent to. False: look closer."""
        scheduler = self._scheduler
        ticket = ended.ticket
        if not ended.had_pod or not ended.code or not ticket.startswith(self._own):
            return False
        charge = _charge(ticket[len(self._own) :])
        if charge is None or charge.slot >= scheduler.tables.capacity.pods:
            return False
        scheduler.tables.ledger.release(charge, held=False)
        scheduler.outcome(charge, ok=ended.code < 500)
        scheduler.series.add(1.0, "finished", ended.pod.decode("utf-8", "replace"), str(ended.code))
        return True

    def take(self, entry: HTTPAccessLogEntry) -> None:
        """A request has ended."""
        common = entry.common_properties
        metadata = common.metadata.filter_metadata
        if NAMESPACE not in metadata:
            return
        fields = metadata[NAMESPACE].fields
        scheduler = self._scheduler
        replica, _, ticket = fields["ticket"].string_value.partition(".") if "ticket" in fields else ("", "", "")
        if replica != scheduler.tables.replica:
            scheduler.series.add(1.0, "foreign")
            if scheduler.passes_on:
                passed_on = _only_ours(entry).SerializeToString()
                scheduler.tables.ended_log.append(replica, passed_on, scheduler.clock())
            return
        charge = _charge(ticket.encode())
        if charge is None or charge.slot >= scheduler.tables.capacity.pods:
            return
        abandoned = scheduler.tables.abandoned
        request_id = fields["request-id"].string_value.encode() if "request-id" in fields else b""
        if abandoned.lately(scheduler.clock()) and abandoned.has(request_id, charge, logged=False):
            return  # given back already
        scheduler.tables.ledger.release(charge, held=False)
        code = entry.response.response_code.value
        flags = common.response_flags
        client_left = code == 0 or flags.downstream_connection_termination or flags.downstream_remote_reset
        pod = fields["pod"].string_value if "pod" in fields else ""
        if client_left:
            abandoned.add(request_id, charge, scheduler.clock(), logged=True)  # its stream's reset may come after this
        answered = self._after_retries(entry, charge) if ENVOY_LB in metadata else None
        if answered is not None:
            charge, pod = answered
        if not client_left:
            scheduler.outcome(charge, ok=code < 500)
        scheduler.series.add(1.0, "finished", pod, "499" if client_left else str(code))

    def _after_retries(self, entry: HTTPAccessLogEntry, charge: Charge) -> tuple[Charge, str] | None:
        """The pod that answered, where that is not the one first chosen; those tried before it get a failure."""
        common = entry.common_properties
        upstream = common.upstream_remote_address.socket_address
        fields = common.metadata.filter_metadata[ENVOY_LB].fields
        if not upstream.address or ENDPOINT not in fields:
            return None
        host = f"[{upstream.address}]" if ":" in upstream.address else upstream.address
        address = f"{host}:{upstream.port_value}"
        tried = fields[ENDPOINT].string_value.split(",")[:MAX_ENDPOINTS]
        pod = answered_after_retries(self._scheduler, charge, tried, address)
        return None if pod is None else (Charge(pod.slot, pod.generation, 0), pod.name)

    def late(self, message: bytes | None) -> None:
        """A batch that was under way when the stream was ended here, as a worker does before it goes."""
        if message is not None:
            self.receive(message)

    def half_close(self) -> bytes | None:
        """Envoy is done: one empty StreamAccessLogsResponse."""
        return b""

    def close(self) -> None:
        """Nothing is held."""


def _only_ours(entry: HTTPAccessLogEntry) -> HTTPAccessLogEntry:
    """The entry without what is of no use to the replica that routed the request."""
    metadata = entry.common_properties.metadata.filter_metadata
    for namespace in [name for name in metadata if name not in (NAMESPACE, ENVOY_LB)]:
        del metadata[namespace]
    entry.DiscardUnknownFields()
    return entry


def _charge(ticket: bytes) -> Charge | None:
    parts = ticket.split(b".")
    if len(parts) != 3:
        return None
    for part in parts:
        if not part.isdigit() or len(part) > 18:
            return None
    return Charge(int(parts[0]), int(parts[1]), int(parts[2]))
