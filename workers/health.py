"""grpc.health.v1: Check and Watch, for Envoy's health checks and Kubernetes' grpc probes."""

from google.protobuf.message import DecodeError

from protos.health_pb2 import HealthCheckRequest, HealthCheckResponse
from workers.calls import CallError, Metadata, Method, Methods, Push, Reply, Status

EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
SERVICES = frozenset({"", "gateway-plugin", EXT_PROC_SERVICE, "grpc.health.v1.Health", "liveness", "readiness"})
"""Names that are asked for: the server as a whole, AIBrix's name, the service's own, and those of GIE's probes."""

_SERVING = HealthCheckResponse(status=HealthCheckResponse.SERVING).SerializeToString()
_NOT_SERVING = HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING).SerializeToString()
_UNKNOWN = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN).SerializeToString()


def _service(message: bytes) -> str:
    try:
        return HealthCheckRequest.FromString(message).service
    except DecodeError:
        raise CallError(Status.INVALID_ARGUMENT, "not a HealthCheckRequest") from None


class HealthService:
    """Serving until `stop` is called."""

    def __init__(self) -> None:
        self._status = _SERVING
        self._watches: set[Watch] = set()

    def methods(self) -> Methods:
        """Check and Watch."""
        return {
            "/grpc.health.v1.Health/Check": Method(lambda metadata: Check(self, metadata)),
            "/grpc.health.v1.Health/Watch": Method(lambda metadata: Watch(self, metadata), pushes=True),
        }

    @property
    def status(self) -> bytes:
        """The serialised answer for a known service."""
        return self._status

    def stop(self) -> None:
        """Say NOT_SERVING from now on, to those who watch at once."""
        self._status = _NOT_SERVING
        for watch in list(self._watches):
            watch.tell(_NOT_SERVING)

    def join(self, watch: "Watch") -> None:
        """Tell `watch` of changes."""
        self._watches.add(watch)

    def leave(self, watch: "Watch") -> None:
        """No longer."""
        self._watches.discard(watch)


class Check:
    """One unary call."""

    __slots__ = ("_health", "finished", "idle")

    def __init__(self, health: HealthService, metadata: Metadata) -> None:
        self._health = health
        self.finished = False
        self.idle = False

    def receive(self, message: bytes) -> Reply:
        """The answer, or NOT_FOUND for a service nobody knows."""
        service = _service(message)
        if service not in SERVICES:
            raise CallError(Status.NOT_FOUND, f"unknown service {service[:100]!r}")
        self.finished = True
        return self._health.status

    def half_close(self) -> Reply:
        """Nothing to add."""
        return None

    def close(self) -> None:
        """Nothing is held."""


class Watch:
    """One server stream: the status now, and again whenever it changes."""

    __slots__ = ("__weakref__", "_health", "_known", "_push", "finished", "idle")

    def __init__(self, health: HealthService, metadata: Metadata) -> None:
        self._health = health
        self._push: Push | None = None
        self._known = False
        self.finished = False
        self.idle = True

    def start(self, push: Push) -> None:
        """Where to send changes."""
        self._push = push

    def receive(self, message: bytes) -> Reply:
        """The status now."""
        if _service(message) not in SERVICES:
            return _UNKNOWN
        self._known = True
        self._health.join(self)
        return self._health.status

    def tell(self, status: bytes) -> None:
        """The status changed."""
        if self._known and self._push is not None:
            self._push(status)

    def half_close(self) -> Reply:
        """A watch goes on after its one request."""
        return None

    def close(self) -> None:
        """Tell nobody anymore."""
        self._health.leave(self)
