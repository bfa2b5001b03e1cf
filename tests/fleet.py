"""A fleet for tests: real shared tables in this process, pods with rows as a scraper would write them, and the
messages that an Envoy would send."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from protos.ext_proc_pb2 import ProcessingMode, ProcessingRequest, ProcessingResponse
from state.catalog import CatalogDocument, PodRecord
from state.ledger import Entry
from state.pods import COLUMN, Health
from state.tables import FIRST_WORKER, Capacity, Tables

SMALL = Capacity(pods=16, writers=12, catalog_bytes=1 << 16, series=128, prefix_ring_bytes=1 << 16)
MODEL = "llama"

NONE = ProcessingMode.NONE
STREAMED = ProcessingMode.STREAMED
BUFFERED = ProcessingMode.BUFFERED
BUFFERED_PARTIAL = ProcessingMode.BUFFERED_PARTIAL
DUPLEX = ProcessingMode.FULL_DUPLEX_STREAMED


# -- tables


def make_tables(capacity: Capacity = SMALL, writer: int | None = FIRST_WORKER) -> Tables:
    """A segment of its own, every writer's row visible."""
    tables = Tables.create(capacity, writer)
    tables.ledger.admit(capacity.writers - 1)
    return tables


def make_record(slot: int, **changes: Any) -> PodRecord:
    """Pod `slot` of model MODEL."""
    values: dict[str, Any] = {
        "slot": slot,
        "generation": slot + 1,
        "name": f"pod-{slot}",
        "address": f"10.0.0.{slot + 1}:8000",
        "models": (MODEL,),
    }
    return PodRecord(**{**values, **changes})


def make_fleet(
    pods: int = 3, capacity: Capacity = SMALL, writer: int | None = FIRST_WORKER, records: Sequence[PodRecord] = ()
) -> Tables:
    """Tables with pods claimed, published and READY."""
    tables = make_tables(capacity, writer)
    chosen = list(records) or [make_record(slot) for slot in range(pods)]
    for record in chosen:
        tables.pods.claim(record.slot, record.generation)
        set_row(tables, record.slot)
    tables.catalog.publish(CatalogDocument(tuple(chosen)))
    return tables


def set_row(tables: Tables, slot: int, health: Health = Health.READY, **metrics: float) -> None:
    """What a poll says of a pod: `metrics` by their names in `state.pods.FIELDS`."""
    row = tables.pods.row(slot)
    row[COLUMN["health"]] = health
    row[COLUMN["sampled_at"]] = metrics.pop("sampled_at", 1000.0)
    requests, tokens = tables.ledger.load(slot)
    row[COLUMN["tracked_requests_at_sample"]] = requests
    row[COLUMN["tracked_tokens_at_sample"]] = tokens
    for name, value in metrics.items():
        row[COLUMN[name]] = value
    tables.pods.write(slot, row)


def loads(tables: Tables, entry: Entry = Entry.REQUESTS) -> list[int]:
    """The totals of all pods."""
    return [int(total) for total in tables.ledger.totals(entry, tables.capacity.pods)]


# -- messages


def chat(model: str = MODEL, text: str = "hello", **rest: Any) -> bytes:
    """A chat completion's body."""
    return orjson.dumps({"model": model, "messages": [{"role": "user", "content": text}], **rest})


def _message(modes: tuple[int, int] | None) -> ProcessingRequest:
    message = ProcessingRequest()
    if modes is not None:
        message.protocol_config.SetInParent()
        message.protocol_config.request_body_mode, message.protocol_config.response_body_mode = modes  # type: ignore[assignment]
    return message


def request_headers(
    path: str = "/v1/chat/completions", *, eos: bool = False, modes: tuple[int, int] | None = None, **headers: str
) -> bytes:
    """`headers` with underscores for dashes."""
    message = _message(modes)
    message.request_headers.end_of_stream = eos
    named = {":path": path, ":method": "POST", **{key.replace("_", "-"): value for key, value in headers.items()}}
    for key, value in named.items():
        message.request_headers.headers.headers.add(key=key, raw_value=value.encode())
    return message.SerializeToString()


def request_body(body: bytes = b"", *, eos: bool = True, modes: tuple[int, int] | None = None) -> bytes:
    """A piece of the request's body."""
    message = _message(modes)
    message.request_body.SetInParent()
    message.request_body.body = body
    message.request_body.end_of_stream = eos
    return message.SerializeToString()


def response_headers(status: str = "200", *, eos: bool = False) -> bytes:
    """The pod's response headers."""
    message = ProcessingRequest()
    message.response_headers.end_of_stream = eos
    message.response_headers.headers.headers.add(key=":status", raw_value=status.encode())
    return message.SerializeToString()


def response_body(body: bytes = b"", *, eos: bool = False) -> bytes:
    """A piece of the response's body."""
    message = ProcessingRequest()
    message.response_body.SetInParent()
    message.response_body.body = body
    message.response_body.end_of_stream = eos
    return message.SerializeToString()


def trailers(side: str) -> bytes:
    """`side` is "request" or "response"."""
    message = ProcessingRequest()
    getattr(message, f"{side}_trailers").SetInParent()
    return message.SerializeToString()


def read(reply: bytes | tuple[bytes, ...] | None) -> list[ProcessingResponse]:
    """The replies as messages."""
    if reply is None:
        return []
    return [ProcessingResponse.FromString(one) for one in ((reply,) if isinstance(reply, bytes) else reply)]


def kinds(reply: bytes | tuple[bytes, ...] | None) -> list[str]:
    """The types of the replies."""
    return [str(one.WhichOneof("response")) for one in read(reply)]


def header_mutation(reply: ProcessingResponse) -> Any:
    """The header mutation of a reply to headers or a body, or of an immediate one."""
    which = reply.WhichOneof("response")
    part = getattr(reply, str(which))
    if which == "immediate_response":
        return part.headers
    return part.header_mutation if which in ("request_trailers", "response_trailers") else part.response.header_mutation


def set_headers(reply: ProcessingResponse) -> dict[str, str]:
    """What the reply sets."""
    return {option.header.key: option.header.raw_value.decode() for option in header_mutation(reply).set_headers}


# -- processes


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and return its id; it ends with 0, or with 1 if `work` raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def end_of(pid: int) -> int:
    """Wait for a child: its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_all(pids: Sequence[int]) -> None:
    """kill -9, and wait."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
