"""Envoy retried on another pod, and says where the answer came from: what the router makes of it by stream."""

import pytest
from exchanges import Contract, Stream, response_with
from fleet import chat, loads, request_body, request_headers

from state.ledger import Entry

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def routed(contract: Contract, destination: str = "override-host", **headers: str) -> tuple[Stream, list[str]]:
    """A routed stream, and the addresses in the order in which Envoy tries them."""
    stream = contract.exchange("stream", destination)
    stream.send(request_headers(**headers))
    said = stream.send(request_body(chat()))
    return stream, said.headers.get("x-gateway-destination-endpoint", said.headers.get("target-pod", "")).split(",")


def slot(address: str) -> int:
    """10.0.0.1:8000 is slot 0, and so on."""
    return int(address.partition(":")[0].rpartition(".")[2]) - 1


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("place", [1, 2])
def test_the_pod_that_answered_is_named_and_gets_the_credit(place: int, trace: bool) -> None:
    contract = Contract(3)
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"} if trace else {}
    stream, order = routed(contract, **headers)
    assert len(order) == 3
    said = stream.send(response_with("200", eos=True, target_pod_ip=order[place]))
    name = f"pod-{slot(order[place])}"
    assert (said.headers["target-pod"], said.headers["target-pod-ip"]) == (name, order[place])
    assert said.headers["routing-strategy"] == "random"
    if trace:
        assert said.headers["request-id"] == TRACE
    good, bad = loads(contract.tables, Entry.SUCCEEDED), loads(contract.tables, Entry.FAILED)
    assert [good[slot(address)] for address in order] == [int(number == place) for number in range(3)]
    assert [bad[slot(address)] for address in order] == [int(number < place) for number in range(3)]
    assert contract.in_flight == 0
    assert contract.counted("finished") == {(name, "200"): 1.0}
    assert contract.counted("retried") == {(name,): 1.0}


@pytest.mark.parametrize("answered", ["first", "10.9.9.9:1", "", "nonsense\xff"])
def test_an_answer_of_the_first_or_of_nobody_known_is_the_firsts(answered: str) -> None:
    contract = Contract(3)
    stream, order = routed(contract)
    said = stream.send(response_with("200", target_pod_ip=order[0] if answered == "first" else answered))
    assert said.headers["target-pod-ip"] == order[0]
    assert loads(contract.tables, Entry.SUCCEEDED)[slot(order[0])] == 1
    assert contract.counted("retried") == {}


def test_a_pod_cannot_say_so_where_envoy_does_not_retry() -> None:
    contract = Contract(3)
    stream, (target,) = routed(contract, "header")
    other = next(f"10.0.0.{number}:8000" for number in (1, 2, 3) if f"10.0.0.{number}:8000" != target)
    assert stream.send(response_with("200", target_pod_ip=other)).headers["target-pod-ip"] == target
    assert contract.outcomes == (1, 0)


def test_an_error_after_a_retry_is_the_last_pods() -> None:
    contract = Contract(2)
    stream, order = routed(contract)
    stream.send(response_with("503", eos=True, target_pod_ip=order[1]))
    assert loads(contract.tables, Entry.FAILED)[:2] == [1, 1]


def test_what_the_access_log_will_count_is_not_counted_twice() -> None:
    contract = Contract(3, usage_metrics=True)
    stream = contract.exchange("access-log", "override-host")
    stream.send(request_headers())
    order = stream.send(request_body(chat())).headers["x-gateway-destination-endpoint"].split(",")
    said = stream.send(response_with("200", target_pod_ip=order[1]))
    assert said.headers["target-pod-ip"] == order[1]
    assert contract.outcomes == (0, 0) and contract.counted("retried") == {}
