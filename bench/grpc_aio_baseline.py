"""The yardstick: an ext_proc server on grpc.aio and uvloop that routes nothing.

    python -m bench.grpc_aio_baseline 127.0.0.1:20600

What a Python ext_proc server costs when it is written the usual way. Like `h2_server` it parses each message, finds
the strategy header, reads the JSON body and answers always the same; unlike it, it lets grpcio do all the rest.
"""

import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import orjson
import uvloop

from protos.ext_proc_pb2 import HeaderValue, ProcessingRequest, ProcessingResponse

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"


async def process(
    requests: AsyncIterator[ProcessingRequest], _context: grpc.aio.ServicerContext
) -> AsyncIterator[ProcessingResponse]:
    """One reply of the matching type for each message."""
    async for request in requests:
        reply = ProcessingResponse()
        which = request.WhichOneof("request")
        if which == "request_headers":
            strategy = b""
            for header in request.request_headers.headers.headers:
                if header.key == "routing-strategy":
                    strategy = header.raw_value
            common = reply.request_headers.response
            common.clear_route_cache = True
            _set(common.header_mutation.set_headers.add().header, "x-went-into-req-headers", strategy or b"true")
        elif which == "request_body":
            orjson.loads(request.request_body.body)["model"]
            common = reply.request_body.response
            common.clear_route_cache = True
            _set(common.header_mutation.set_headers.add().header, "target-pod", b"10.0.0.1:8000")
        else:
            getattr(reply, which).SetInParent()
        yield reply


def _set(header: HeaderValue, key: str, value: bytes) -> None:
    header.key, header.raw_value = key, value


async def serve(address: str) -> None:
    """Until cancelled."""
    handler = grpc.stream_stream_rpc_method_handler(
        process,
        request_deserializer=ProcessingRequest.FromString,
        response_serializer=ProcessingResponse.SerializeToString,
    )
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": handler}),))
    server.add_insecure_port(address)
    await server.start()
    print("listening on", address, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
