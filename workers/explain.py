"""`pointsman explain`: asks a running router where it would send a request, and shows why.

The router is asked as Envoy would ask it, over ext_proc, with the header that wants the receipt alone: nothing is
charged, remembered or sent to a pod. Works where the configuration says `explain: true`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import orjson
from rich.console import Console
from rich.table import Table

from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from workers.address import parse_address
from workers.config import Config

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
TIMEOUT_SECONDS = 10.0


class ExplainError(Exception):
    """There is no receipt. The message is one line for a person."""


def ask(address: str, body: bytes, request_path: str | None, headers: Mapping[str, str]) -> dict[str, Any]:
    """The receipt. Raises ExplainError."""
    given = {
        ":path": request_path or _path_for(body),
        ":method": "POST",
        "content-type": "application/json",
        **headers,
        "x-pointsman-explain": "only",
    }
    first, second = ProcessingRequest(), ProcessingRequest()
    for name, value in given.items():
        first.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    second.request_body.body = body
    second.request_body.end_of_stream = True
    options = [("grpc.max_send_message_length", -1)]
    try:
        with grpc.insecure_channel(address, options=options) as channel:
            call = channel.stream_stream(
                METHOD,
                request_serializer=ProcessingRequest.SerializeToString,
                response_deserializer=ProcessingResponse.FromString,
            )
            for reply in call(iter((first, second)), timeout=TIMEOUT_SECONDS):
                if reply.HasField("immediate_response"):
                    return _receipt(reply)
                if reply.HasField("request_body"):
                    raise ExplainError("the router gives no receipts: set `explain: true` in its configuration")
    except grpc.RpcError as error:
        raise ExplainError(f"no answer from the router at {address}: {error.details()}") from None
    raise ExplainError(f"the router at {address} ended the stream without an answer")


def _receipt(reply: ProcessingResponse) -> dict[str, Any]:
    answer = reply.immediate_response
    document: dict[str, Any] = orjson.loads(answer.body)
    if answer.status.code != 200:
        raise ExplainError(f"the router refuses this request with {answer.status.code}: {document['error']['message']}")
    return document


def _path_for(body: bytes) -> str:
    """Chats have messages, completions a prompt, and so on."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ExplainError(f"the request is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise ExplainError("the request must be a JSON object, as a client would send it")
    for field, path in (
        ("messages", "/v1/chat/completions"),
        ("prompt", "/v1/completions"),
        ("documents", "/v1/rerank"),
        ("input", "/v1/embeddings"),
    ):
        if field in document:
            return path
    raise ExplainError("cannot tell what kind of request this is; say it with --path, such as /v1/classify")


def parse_headers(given: tuple[str, ...]) -> dict[str, str]:
    """NAME:VALUE of the command line. Raises ExplainError."""
    found = {}
    for each in given:
        name, colon, value = each.partition(":")
        if not colon or not name.strip():
            raise ExplainError(f"{each!r} is no header: write name:value")
        found[name.strip().lower()] = value.strip()
    return found


def router_address(config: Config) -> str:
    """Where a router of this configuration can be reached from here."""
    kind, place, port = parse_address(config.listen)
    if kind == "unix":
        return f"unix:{place}"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(place, f"[{place}]" if ":" in place else place)
    return f"{host}:{port}"


def show(receipt: Mapping[str, Any], console: Console | None = None) -> None:
    """The receipt as a table, the chosen pod first."""
    console = console or Console()
    rows = receipt["candidates"]
    prompt = receipt["prompt_tokens"]
    table = Table(title=f"{receipt['model']} by {receipt['strategy']}: {receipt['pod']}", title_justify="left")
    table.add_column("pod")
    table.add_column("score (lower is better)", justify="right")
    table.add_column("requests in flight", justify="right")
    table.add_column(f"cached of {prompt} tokens", justify="right")
    for cells in _cells(rows):
        table.add_row(*cells)
    console.print(table)
    if receipt["of"] > len(rows):
        console.print(f"and {receipt['of'] - len(rows)} more")


def _cells(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        score, matched = row.get("score"), row.get("matched_tokens")
        yield (
            row["pod"],
            "" if score is None else f"{score:g}",
            str(row["requests"]),
            "" if matched is None else str(matched),
        )
