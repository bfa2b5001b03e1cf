"""`pointsman explain`: asks a running router where it would send a request, and shows why.

The router is asked as Envoy would ask it, over ext_proc, with the header that wants the receipt alone: nothing is
charged, remembered or sent to a pod. Works where the configuration says `explain: true`.

A router with TLS is asked as Envoy would, too: its certificate is checked against `envoy.router_ca`, whatever name it
is for, and it is shown `envoy.client_certificate`. Where Envoy checks nothing, it must be the one of `tls.certificate`.
"""

import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
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


def ask(
    address: str, body: bytes, request_path: str | None, headers: Mapping[str, str], config: Config
) -> dict[str, Any]:
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
    try:
        with _channel(address, config) as channel:
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


def _channel(address: str, config: Config) -> grpc.Channel:
    options: list[tuple[str, Any]] = [("grpc.max_send_message_length", -1)]
    if config.tls is None:
        return grpc.insecure_channel(address, options=options)
    envoy = config.envoy
    root = (
        ("tls.certificate", config.tls.certificate) if envoy.router_ca is None else ("envoy.router_ca", envoy.router_ca)
    )
    pems = [
        _read(key, path)
        for key, path in (
            root,
            ("envoy.client_key", envoy.client_key),
            ("envoy.client_certificate", envoy.client_certificate),
        )
    ]
    options.append(("grpc.ssl_target_name_override", _certified_name(address, root[1], config)))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*pems), options=options)


def _read(key: str, path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError as error:
        raise ExplainError(f"{key}: {path} cannot be read: {error.strerror}") from None


def _certified_name(address: str, root: Path, config: Config) -> str:
    """A name that the router's certificate is for: gRPC insists on one, Envoy does not ask."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(root)
        if config.envoy.client_certificate is not None:
            context.load_cert_chain(config.envoy.client_certificate, config.envoy.client_key)
        with _connected(address) as plain, context.wrap_socket(plain) as secured:
            certificate: Any = secured.getpeercert()
    except OSError as error:
        raise ExplainError(f"no TLS with the router at {address}: {error}") from None
    names = [name for _, name in certificate.get("subjectAltName", ())]
    names += [name for part in certificate["subject"] for key, name in part if key == "commonName"]
    if not names:
        raise ExplainError(f"no TLS with the router at {address}: its certificate is for no name")
    return str(names[0]).replace("*", "any")


def _connected(address: str) -> socket.socket:
    kind, place, port = parse_address(address)
    if kind == "tcp":
        return socket.create_connection((place, port), TIMEOUT_SECONDS)
    plain = socket.socket(socket.AF_UNIX)
    plain.settimeout(TIMEOUT_SECONDS)
    plain.connect(place)
    return plain


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
        raise ExplainError(f"the request is not JSON: {error}") from None
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
            raise ExplainError(f"{each!r} is not a header: write name:value")
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
    if not console.is_terminal:
        console.width = 1000  # nobody looks at it as it is: nothing needs to be folded
    rows = receipt["candidates"]
    prompt = receipt["prompt_tokens"]
    table = Table()
    table.add_column("pod", overflow="fold")
    for heading in ("score (lower is better)", "requests in flight", f"cached of {prompt} tokens"):
        table.add_column(heading, justify="right", max_width=12)
    for cells in _cells(rows):
        table.add_row(*cells)
    title = f"{receipt['model']} by {receipt['strategy']}: {receipt['pod']}"
    console.print(title, style="italic", soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    for row in rows:
        if "terms" in row:
            sum_of = " + ".join(f"{name} {value:g}" for name, value in row["terms"].items())
            console.print(f"{row['pod']}: {row['score']:.3g} = {sum_of}", markup=False, highlight=False)
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
