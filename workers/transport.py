"""Which transport serves the methods: one shape, two implementations. And TLS, and what the transport counts."""

import ssl
from typing import Protocol

from state.series import Series
from workers.calls import Methods
from workers.config import Config, ConfigError, TlsConfig
from workers.h2.limits import COUNTED, TransportCounters, TransportLimits
from workers.h2.server import H2Server

_LEVELS = frozenset({"connections_open", "streams_open", "buffered_bytes"})


class Server(Protocol):
    """Serves gRPC methods on addresses."""

    async def listen(self, address: str, ssl_context: ssl.SSLContext | None = None) -> None:
        """Accept connections on "host:port" or "unix:/path". Raises OSError when the address cannot be had."""

    async def stop(self, grace_seconds: float) -> None:
        """Take no new streams, end those nobody waits for, give the others `grace_seconds`."""


def make_server(config: Config, methods: Methods, counters: TransportCounters) -> Server:
    """The transport that the configuration names. Imports grpcio only where it is asked for."""
    if config.transport == "grpcio":
        from workers.grpcio_transport import GrpcioServer

        return GrpcioServer(methods, max_message_bytes=config.max_message_bytes)
    limits = TransportLimits(
        max_message_bytes=config.max_message_bytes,
        max_buffered_bytes=max(config.max_buffered_bytes, config.max_message_bytes),
    )
    return H2Server(methods, limits=limits, counters=counters)


def tls_context(config: TlsConfig | None) -> ssl.SSLContext | None:
    """For serving TLS, with client certificates where `client_ca` is set. Raises ConfigError for unusable files."""
    if config is None:
        return None
    for name, path in (("certificate", config.certificate), ("key", config.key), ("client_ca", config.client_ca)):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"tls.{name}: {path} cannot be read: {error.strerror}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])

    def no_phrase() -> str:  # else OpenSSL would ask on the terminal
        raise ConfigError(
            f"tls.key: {config.key} needs a pass phrase; write one that needs none (openssl pkey makes it)"
        )

    try:
        context.load_cert_chain(config.certificate, config.key, no_phrase)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls: {config.certificate} and {config.key} cannot be used: {_why(error)}") from None
    if config.client_ca is not None:
        try:
            context.load_verify_locations(config.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls.client_ca: {config.client_ca} cannot be used: {_why(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _why(error: OSError) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error.strerror or error)


class Meter:
    """Copies a transport's counters into the shared tables."""

    def __init__(self, counters: TransportCounters, series: Series) -> None:
        self._counters = counters
        self._series = series
        self._copied: dict[str, int] = {}

    def copy(self) -> None:
        """What was counted since the last call, and the levels as they are."""
        counters = self._counters
        for name in COUNTED:
            value = getattr(counters, name)
            if name in _LEVELS:
                self._series.put(float(value), "transport_level", name)
            elif isinstance(value, int):
                self._add(name, value)
        for reason, count in counters.abuse_closes.items():
            self._add(f"abuse_{reason}", count)

    def _add(self, event: str, total: int) -> None:
        more = total - self._copied.get(event, 0)
        if more:
            self._copied[event] = total
            self._series.add(float(more), "transport", event)
