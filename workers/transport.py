"""Which transport serves the methods: one shape, two implementations."""

import ssl
from typing import Protocol

from workers.calls import Methods
from workers.config import Config


class Server(Protocol):
    """Serves gRPC methods on addresses."""

    async def listen(self, address: str, ssl_context: ssl.SSLContext | None = None) -> None:
        """Accept connections on "host:port" or "unix:/path". Raises OSError when the address cannot be had."""

    async def stop(self, grace_seconds: float) -> None:
        """Take no new streams, end those nobody waits for, give the others `grace_seconds`."""


def make_server(config: Config, methods: Methods) -> Server:
    """The transport that the configuration names. Imports only that one."""
    if config.transport == "grpcio":
        from workers.grpcio_transport import GrpcioServer

        return GrpcioServer(methods, max_message_bytes=config.max_message_bytes)
    from workers.h2.limits import Limits
    from workers.h2.server import H2Server

    return H2Server(methods, limits=Limits(max_message_bytes=config.max_message_bytes))
