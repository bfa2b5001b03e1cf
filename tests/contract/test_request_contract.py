"""AIBrix's wire contract where a request is looked at: names and their case, the order of checks, strategies that only
AIBrix has, and what a Kubernetes API would say of pods and the endpoints file says here."""

from collections.abc import Mapping

import orjson
import pytest
from exchanges import REQUEST_ID, Contract, completion, response_with
from fleet import chat, header_mutation, make_record, request_body, response_body

from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from router.exchange import Exchange, MessageError
from state.catalog import PodRecord
from workers.calls import Status, status_of
from workers.ext_proc import process_method

LABELLED = [make_record(slot, labels={"zone": zone}) for slot, zone in enumerate(("a", "b"))]


def headers_named(*pairs: tuple[str, str]) -> bytes:
    message = ProcessingRequest()
    for key, value in ((":path", "/v1/chat/completions"), *pairs):
        message.request_headers.headers.headers.add(key=key, raw_value=value.encode())
    return message.SerializeToString()


def names_of(message: ProcessingResponse) -> list[str]:
    return [option.header.key for option in header_mutation(message).set_headers]


# -- headers


@pytest.mark.parametrize("name", ["routing-strategy", "Routing-Strategy", "ROUTING-STRATEGY"])
def test_header_names_count_in_any_case(name: str) -> None:
    stream = Contract(2).exchange()
    stream.send(headers_named((name, "least-request")))
    assert stream.send(request_body(chat())).headers["routing-strategy"] == "least-request"


def test_of_a_repeated_header_the_last_counts() -> None:
    stream = Contract(2).exchange()
    stream.send(headers_named(("routing-strategy", "nonsense"), ("Routing-Strategy", "least-request")))
    assert stream.send(request_body(chat())).headers["routing-strategy"] == "least-request"


def test_headers_are_spelt_as_aibrix_spells_them() -> None:
    asleep = make_record(0, labels={"modelclaim.aibrix.ai/llama": "sleeping"})
    assert names_of(Contract().routed().last.message) == [
        "routing-strategy", "target-pod", "X-Request-Id", "content-length",
    ]  # fmt: skip
    assert names_of(Contract(records=[asleep]).routed().last.message) == [
        "Content-Type", "x-error-no-model-backends", "Retry-After",
    ]  # fmt: skip


def test_nothing_is_appended_and_every_value_is_raw() -> None:
    stream = Contract().routed()
    stream.send(response_with())
    stream.send(response_body(completion(), eos=True))
    said = [one.message for one in (*stream.said, Contract().routed(path="/no").last)]
    assert len(said) == 5
    for message in said:
        for option in header_mutation(message).set_headers:
            assert not option.HasField("append") and not option.header.value
            assert option.header.raw_value


@pytest.mark.parametrize("eos", [True, False])
def test_the_body_comes_in_one_message_whatever_that_says_of_the_end(eos: bool) -> None:
    stream = Contract().exchange()
    stream.send(headers_named())
    assert stream.send(request_body(chat(), eos=eos)).headers["target-pod"] == "10.0.0.1:8000"
    broken = Contract().exchange()
    broken.send(headers_named())
    assert broken.send(request_body(b'{"model"', eos=eos)).status == 400


@pytest.mark.parametrize("message", [b"", ProcessingRequest(observability_mode=True).SerializeToString(), b"\xff"])
def test_a_message_without_a_request_ends_the_stream(message: bytes) -> None:
    contract = Contract()
    call = process_method(contract.scheduler, 1 << 20, contract.policy).open({})
    with pytest.raises(MessageError) as caught:
        call.receive(message)
    assert status_of(caught.value) == (Status.INTERNAL, str(caught.value))


def test_a_stream_that_its_peer_half_closes_ends_well() -> None:
    stream = Contract().routed()
    assert isinstance(stream.exchange, Exchange)
    assert stream.exchange.half_close() is None
    stream.exchange.close()
    assert stream.contract.counted("finished") == {("pod-0", "499"): 1.0}


# -- the order of checks


@pytest.mark.parametrize("selector", ["zone=nowhere", "zone=("])
def test_a_bad_strategy_hides_a_label_filter_that_leaves_nobody(selector: str) -> None:
    said = Contract(records=LABELLED).routed(routing_strategy="nonsense", external_filter=selector).last
    assert (said.status, said.error["message"]) == (400, "incorrect routing strategy nonsense")


def test_a_bad_strategy_costs_its_model_nothing_and_hides_that_it_is_over_its_limit() -> None:
    contract = Contract(settings={"llama": {"profiles": {"default": {"requestsPerSecond": 1}}}})
    assert contract.routed().last.kind == "request_body"
    assert contract.routed(routing_strategy="nonsense").last.status == 400
    assert contract.routed().last.status == 429


def test_a_bad_body_hides_an_unknown_model_and_that_a_bad_strategy() -> None:
    contract = Contract()
    assert contract.routed(body=b'{"model":"gpt-9","messages":5}', routing_strategy="x").last.status == 400
    said = contract.routed(body=chat("gpt-9"), routing_strategy="nonsense", external_filter="(").last
    assert said.error["code"] == "model_not_found"


# -- strategies

SLO = ("slo", "slo-pack-load", "slo-least-load", "slo-least-load-pulling")


@pytest.mark.parametrize("asked", [*SLO, "slo:3", "least-request,slo", "slo-pack-load,random"])
def test_the_slo_family_takes_the_pod_with_the_fewest_requests_and_says_so(asked: str) -> None:
    contract = Contract(2)
    targets = []
    for _ in range(2):
        stream = contract.routed(routing_strategy=asked)
        assert stream.last.headers["routing-strategy"] == asked
        targets.append(stream.last.headers["target-pod"])
        assert stream.send(response_with()).headers["routing-strategy"] == "least-request"
    assert len(set(targets)) == 2


def test_by_access_log_too_the_slo_family_says_what_it_did() -> None:
    stream = Contract(2).exchange("access-log")
    stream.send(headers_named(("routing-strategy", "slo")))
    said = stream.send(request_body(chat()))
    assert said.headers["routing-strategy"] == "slo"
    assert said.message.dynamic_metadata["pointsman"]["strategy"] == "least-request"


@pytest.mark.parametrize("asked", ["pd", "pd,least-request", "pd:2"])
def test_pd_needs_pods_of_both_roles_in_a_roleset(asked: str) -> None:
    alone = [make_record(0, role="prefill", roleset="a"), make_record(1, role="decode", roleset="b")]
    for contract in (Contract(2), Contract(records=alone)):
        said = contract.routed(routing_strategy=asked).last
        assert (said.status, said.error["message"]) == (503, "error on selecting target pod")
        assert (said.error["code"], said.headers["x-error-routing"]) == ("service_unavailable", "true")
        assert contract.in_flight == 0


def test_whole_requests_go_to_decode_pods() -> None:
    records = [make_record(slot, role=role, roleset="rs") for slot, role in enumerate(("prefill", "decode", "decode"))]
    contract = Contract(records=records)
    assert {contract.routed().last.headers["target-pod"] for _ in range(30)} == {"10.0.0.2:8000", "10.0.0.3:8000"}


# -- labels that every pod of AIBrix has


def pods() -> list[PodRecord]:
    return [
        make_record(0),
        make_record(1, engine="sglang", labels={"model.aibrix.ai/port": "9000"}),
        make_record(2, role="decode", roleset="rs-0"),
    ]


@pytest.mark.parametrize(
    ("selector", "targets"),
    [
        ("model.aibrix.ai/name=llama", {1, 2, 3}),
        ("model.aibrix.ai/engine=sglang", {2}),
        ("model.aibrix.ai/engine!=sglang", {1, 3}),
        ("model.aibrix.ai/port=8000", {1, 3}),
        ("model.aibrix.ai/port=9000", {2}),
        ("role-name=decode,roleset-name in (rs-0,rs-1)", {3}),
        ("!role-name", {1, 2}),
    ],
)
def test_label_filters_know_aibrixs_own_labels(selector: str, targets: set[int]) -> None:
    contract = Contract(records=pods())
    seen = {contract.routed(external_filter=selector).last.headers["target-pod"] for _ in range(40)}
    assert seen == {f"10.0.0.{number}:8000" for number in targets}


# -- pods as an API would tell of them


def test_a_pod_that_drains_gets_nothing_and_its_model_stays_known() -> None:
    contract = Contract(records=[make_record(0, draining=True), make_record(1)])
    assert {contract.routed().last.headers["target-pod"] for _ in range(20)} == {"10.0.0.2:8000"}
    said = Contract(records=[make_record(0, draining=True)]).routed().last
    assert (said.status, said.error["message"]) == (503, "error on getting pods for model llama")


@pytest.mark.parametrize(
    "config",
    [
        {"lockedRoutingStrategy": "slo", "profiles": {"default": {}}},
        {"profiles": {"default": {"routingStrategy": "slo"}}},
    ],
)
def test_profiles_in_a_pods_annotation(config: Mapping[str, object]) -> None:
    record = make_record(0, labels={"model.aibrix.ai/config": orjson.dumps(config).decode()})
    stream = Contract(records=[record]).routed()
    assert stream.last.headers["routing-strategy"] == "slo"
    assert stream.last.headers["X-Request-Id"] == REQUEST_ID
