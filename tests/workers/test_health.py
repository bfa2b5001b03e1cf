"""grpc.health.v1, as probes and Envoy use it."""

import pytest

from protos.health_pb2 import HealthCheckRequest, HealthCheckResponse
from workers.calls import CallError, Status
from workers.health import EXT_PROC_SERVICE, Check, HealthService, Watch

SERVING, NOT_SERVING, UNKNOWN = (
    HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING, HealthCheckResponse.SERVICE_UNKNOWN,
)  # fmt: skip


def ask(service: str) -> bytes:
    return HealthCheckRequest(service=service).SerializeToString()


def status(reply: object) -> int:
    assert isinstance(reply, bytes)
    return HealthCheckResponse.FromString(reply).status


@pytest.mark.parametrize("service", ["", "gateway-plugin", EXT_PROC_SERVICE, "liveness", "readiness"])
def test_check_says_serving_until_it_stops(service: str) -> None:
    health = HealthService()
    check = Check(health, {})
    assert status(check.receive(ask(service))) == SERVING
    assert check.finished
    health.stop()
    assert status(Check(health, {}).receive(ask(service))) == NOT_SERVING


def test_check_of_an_unknown_service_is_not_found() -> None:
    with pytest.raises(CallError) as raised:
        Check(HealthService(), {}).receive(ask("x" * 1000))
    assert raised.value.code == Status.NOT_FOUND
    assert len(raised.value.message) < 200


@pytest.mark.parametrize("call", [Check, Watch])
def test_what_is_no_request_is_invalid(call: type[Check | Watch]) -> None:
    with pytest.raises(CallError) as raised:
        call(HealthService(), {}).receive(b"\xff\xff")
    assert raised.value.code == Status.INVALID_ARGUMENT


def test_watch_tells_now_and_when_it_changes() -> None:
    health = HealthService()
    pushed: list[bytes] = []
    watch = Watch(health, {})
    watch.start(pushed.append)
    assert status(watch.receive(ask(""))) == SERVING
    assert watch.half_close() is None
    assert watch.idle
    assert not watch.finished
    health.stop()
    assert [status(message) for message in pushed] == [NOT_SERVING]
    watch.close()


def test_watch_of_an_unknown_service_says_so_and_hears_nothing_more() -> None:
    health = HealthService()
    pushed: list[bytes] = []
    watch = Watch(health, {})
    watch.start(pushed.append)
    assert status(watch.receive(ask("nobody"))) == UNKNOWN
    health.stop()
    assert pushed == []


def test_a_closed_watch_is_forgotten() -> None:
    health = HealthService()
    pushed: list[bytes] = []
    watch = Watch(health, {})
    watch.start(pushed.append)
    watch.receive(ask(""))
    watch.close()
    watch.close()
    health.stop()
    assert pushed == []


def test_methods() -> None:
    methods = HealthService().methods()
    assert {path: method.pushes for path, method in methods.items()} == {
        "/grpc.health.v1.Health/Check": False, "/grpc.health.v1.Health/Watch": True,
    }  # fmt: skip
    assert isinstance(methods["/grpc.health.v1.Health/Check"].open({}), Check)
