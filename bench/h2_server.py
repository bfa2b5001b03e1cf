"""A gRPC server on our HTTP/2 transport that does an ext_proc server's least work and no routing.

    python -m bench.h2_server 127.0.0.1:20500

It parses each message, finds the strategy header, reads the JSON body, and answers with constants: what a stream costs
before the first line of routing. Its methods are the ext_proc stream, health (check and watch) and the access log.
"""

import asyncio
import sys

import orjson
import uvloop

from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from workers.calls import Metadata, Method, Push
from workers.h2.server import H2Server


def _headers_reply() -> bytes:
    reply = ProcessingResponse()
    common = reply.request_headers.response
    common.clear_route_cache = True
    header = common.header_mutation.set_headers.add().header
    header.key, header.raw_value = "x-went-into-req-headers", b"true"
    return reply.SerializeToString()


def _body_reply() -> bytes:
    reply = ProcessingResponse()
    common = reply.request_body.response
    common.clear_route_cache = True
    header = common.header_mutation.set_headers.add().header
    header.key, header.raw_value = "target-pod", b"10.0.0.1:8000"
    return reply.SerializeToString()


HEADERS_REPLY = _headers_reply()
BODY_REPLY = _body_reply()
RESPONSE_HEADERS_REPLY = ProcessingResponse(response_headers={}).SerializeToString()
RESPONSE_BODY_REPLY = ProcessingResponse(response_body={}).SerializeToString()
_parse = ProcessingRequest.FromString


class NoRouting:
    """An ext_proc stream that always says the same."""

    __slots__ = ("finished", "idle", "strategy")

    def __init__(self, metadata: Metadata) -> None:
        self.finished = False
        self.idle = False
        self.strategy = b""

    def receive(self, message: bytes) -> bytes | None:
        request = _parse(message)
        which = request.WhichOneof("request")
        if which == "request_headers":
            for header in request.request_headers.headers.headers:
                if header.key == "routing-strategy":
                    self.strategy = header.raw_value
            return HEADERS_REPLY
        if which == "request_body":
            orjson.loads(request.request_body.body)["model"]
            self.idle = True
            return BODY_REPLY
        if which == "response_body":
            return RESPONSE_BODY_REPLY
        return RESPONSE_HEADERS_REPLY

    def half_close(self) -> None:
        return None

    def close(self) -> None:
        return None


class Serving:
    """grpc.health.v1: always serving."""

    def __init__(self, metadata: Metadata) -> None:
        self.finished = False
        self.idle = True

    def start(self, push: Push) -> None:
        push(b"\x08\x01")

    def receive(self, message: bytes) -> bytes | None:
        return b"\x08\x01"

    def half_close(self) -> None:
        return None

    def close(self) -> None:
        return None


class Watching(Serving):
    def receive(self, message: bytes) -> None:
        return None


METHODS = {
    "/envoy.service.ext_proc.v3.ExternalProcessor/Process": Method(NoRouting),
    "/grpc.health.v1.Health/Check": Method(Serving),
    "/grpc.health.v1.Health/Watch": Method(Watching, pushes=True),
    "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs": Method(Watching),
}


async def serve(address: str) -> None:
    server = H2Server(METHODS)
    await server.listen(address)
    print("listening on", *server.addresses, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
