"""AIBrix's wire contract, case by case, for a peer that does not say how it is set up."""

import fleet
import orjson
import pytest
from exchanges import DONE, REQUEST_ID, USAGE_CHUNK, Contract, chunk, completion, response_with
from fleet import chat, make_record, request_body, request_headers, response_body, set_row, trailers

from router.limits import KEY_PREFIX
from state.catalog import CatalogDocument
from state.pods import Health

RESPONSE = {
    "x-went-into-req-headers": "true", "request-id": REQUEST_ID, "routing-strategy": "random", "target-pod": "pod-0",
    "target-pod-ip": "10.0.0.1:8000", ":status": "200",
}  # fmt: skip


def test_any_request_is_answered_at_its_headers() -> None:
    said = Contract().exchange().send(request_headers())
    assert said.kind == "request_headers"
    assert said.headers == {"x-went-into-req-headers": "true"}
    assert said.common.clear_route_cache
    assert said.common.status == 0


def test_a_routed_request() -> None:
    body = chat()
    said = Contract().routed(body=body).last
    assert said.kind == "request_body"
    assert said.headers == {
        "routing-strategy": "random", "target-pod": "10.0.0.1:8000", "X-Request-Id": REQUEST_ID,
        "content-length": str(len(body)),
    }  # fmt: skip
    assert not said.common.HasField("body_mutation")
    assert not said.common.clear_route_cache


@pytest.mark.parametrize("strategy", ["", "random"])
def test_a_trace_id_is_the_requests_id(strategy: str) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    stream = Contract(strategy=strategy).routed(traceparent=f"00-{trace}-00f067aa0ba902b7-01")
    if strategy:
        assert stream.last.headers["X-Request-Id"] == trace
    assert stream.send(response_with()).headers["request-id"] == trace
    assert stream.send(response_body(completion(), eos=True)).headers["request-id"] == trace


@pytest.mark.parametrize(
    "value", ["00-abc-def-01", "00-" + "x" * 32 + "-0-1", "4bf92f3577b34da6a3ce929d0e0e4736", "-\n" * 9]
)
def test_what_is_no_trace_id_is_not_repeated(value: str) -> None:
    assert Contract().routed(traceparent=value).last.headers["X-Request-Id"] == REQUEST_ID


def test_a_request_that_names_no_strategy_where_none_is_configured() -> None:
    contract = Contract(strategy="")
    body = chat()
    stream = contract.routed(body=body)
    assert stream.last.headers == {"model": "llama"}
    assert contract.in_flight == 0
    said = stream.send(response_with())
    assert said.headers == {"x-went-into-req-headers": "true", "request-id": REQUEST_ID, ":status": "200"}
    assert stream.send(response_body(completion(), eos=True)).headers == {"request-id": REQUEST_ID}
    assert stream.finished
    assert contract.counted("finished") == {("", "200"): 1.0}
    assert contract.routed(routing_strategy="least-request").last.headers["target-pod"] == "10.0.0.1:8000"


@pytest.mark.parametrize(
    ("path", "rewritten"),
    [("/v1/images/generations", "/generate"), ("/v1/video/generations", "/generatevideo"), ("/v1/embeddings", None)],
)
@pytest.mark.parametrize("strategy", ["", "random"])
def test_paths_for_the_engine_xdit(path: str, rewritten: str | None, strategy: str) -> None:
    contract = Contract(records=[make_record(0, labels={"model.aibrix.ai/engine": "xdit"})], strategy=strategy)
    said = contract.routed(path, b'{"model":"llama","prompt":"x","input":"x"}').last
    assert said.headers.get(":path") == rewritten
    assert ("target-pod" in said.headers) == bool(strategy)
    assert ("model" in said.headers) == (not strategy)


def test_upstream_200() -> None:
    contract = Contract()
    said = contract.routed().send(response_with())
    assert said.kind == "response_headers"
    assert said.headers == RESPONSE
    assert said.common.clear_route_cache
    assert contract.outcomes == (1, 0)


def test_chunks_of_a_stream_and_the_one_with_usage() -> None:
    contract = Contract()
    stream = contract.routed(body=chat(stream=True))
    stream.send(response_with(content_type="text/event-stream"))
    for _ in range(3):
        assert stream.send(response_body(chunk())).is_plain
    assert contract.in_flight == 1
    assert stream.send(response_body(USAGE_CHUNK)).headers == {"request-id": REQUEST_ID}
    assert stream.finished
    assert contract.in_flight == 0
    assert contract.counted("finished") == {("pod-0", "200"): 1.0}


def test_usage_of_a_user_is_told_and_counted() -> None:
    contract = Contract(users={"ann": (10, 100)})
    body = chat(stream=True, stream_options={"include_usage": True})
    for total in (12, 24):
        stream = contract.routed(body=body, user="ann")
        stream.send(response_with())
        stream.send(response_body(chunk()))
        assert stream.send(response_body(USAGE_CHUNK)).headers == {
            "x-update-rpm": str(total // 12), "x-update-tpm": str(total), "request-id": REQUEST_ID,
        }  # fmt: skip


def test_without_records_the_totals_of_a_user_are_zero() -> None:
    stream = Contract().routed(user="ann")
    stream.send(response_with())
    said = stream.send(response_body(completion(), eos=True))
    assert said.headers == {"x-update-rpm": "0", "x-update-tpm": "0", "request-id": REQUEST_ID}


def test_a_json_reply_in_pieces() -> None:
    contract = Contract()
    stream = contract.routed()
    stream.send(response_with())
    body = completion()
    assert stream.send(response_body(body[:20])).is_plain
    assert stream.send(response_body(body[20:])).is_plain
    assert not stream.finished
    assert stream.send(response_body(b"", eos=True)).headers == {"request-id": REQUEST_ID}
    assert stream.finished
    assert contract.in_flight == 0


@pytest.mark.parametrize("status", [400, 403, 404, 422, 429, 502, 503])
@pytest.mark.parametrize("eos", [True, False])
def test_upstream_errors(status: int, eos: bool) -> None:
    contract = Contract()
    stream = contract.routed()
    assert stream.send(response_with(str(status))).kind == "response_headers"
    body = b'{"object":"error","message":"no","type":"T","param":null,"code":7}'
    said = stream.send(response_body(body, eos=eos))
    assert (said.kind, said.status) == ("immediate_response", status)
    assert said.error == {"message": "no", "type": "T", "param": None, "code": 7}
    assert said.headers == {
        **RESPONSE, ":status": str(status), "x-error-response-unknown": "true", "Content-Type": "application/json",
    }  # fmt: skip
    assert contract.in_flight == 0
    assert contract.outcomes == ((1, 0) if status < 500 else (0, 1))
    assert contract.counted("finished") == {("pod-0", str(status)): 1.0}
    assert not stream.finished  # the peer ends it


def test_an_upstream_error_that_is_no_json() -> None:
    stream = Contract().routed()
    stream.send(response_with("503"))
    said = stream.send(response_body(b"down for today", eos=True))
    assert said.status == 503
    assert said.error == {
        "message": "down for today", "type": "overloaded_error", "code": "service_unavailable", "param": None,
    }  # fmt: skip
    assert "x-error-response-unknown" not in said.headers


def test_an_error_whose_body_came_and_was_empty_says_nothing() -> None:
    stream = Contract().routed()
    stream.send(response_with("404"))
    said = stream.send(response_body(b"", eos=True))
    assert (said.kind, said.status) == ("immediate_response", 404)
    assert said.error == {"message": "", "type": "invalid_request_error", "code": None, "param": None}


@pytest.mark.parametrize("status", ["404", "400"])
def test_an_error_without_a_body_passes(status: str) -> None:
    stream = Contract().routed()
    assert stream.send(response_with(status, eos=True)).kind == "response_headers"
    assert stream.finished


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [(401, "Incorrect API key provided", "invalid_api_key"), (500, "Internal server error", None)],
)
@pytest.mark.parametrize("at_headers", [True, False])
def test_upstream_401_and_500_without_a_body(status: int, message: str, code: str | None, at_headers: bool) -> None:
    stream = Contract().routed()
    said = stream.send(response_with(str(status), eos=at_headers))
    if not at_headers:
        said = stream.send(response_body(b"", eos=True))
    assert (said.kind, said.status) == ("immediate_response", status)
    assert (said.error["message"], said.error["code"], said.error["param"]) == (message, code, None)
    assert said.headers.items() >= {**RESPONSE, ":status": str(status)}.items()


def test_a_status_that_is_no_number() -> None:
    said = Contract().routed().send(response_with("abc"))
    assert (said.status, said.error["message"]) == (500, "Internal server error")


def test_no_status_is_a_good_one() -> None:
    said = Contract().routed().send(response_with(None))
    assert said.headers == {name: value for name, value in RESPONSE.items() if name != ":status"}


@pytest.mark.parametrize("header", ["", "Bearer wrong", "Bearer\tsecret", "secret", "Basic secret"])
@pytest.mark.parametrize("eos", [False, True])
def test_a_bad_token(header: str, eos: bool) -> None:
    said = Contract(token="secret").exchange().send(request_headers(authorization=header, eos=eos))
    assert (said.kind, said.status) == ("immediate_response", 401)
    assert said.error == {
        "message": "Incorrect API key provided", "type": "authentication_error", "code": "invalid_api_key",
        "param": "api_key",
    }  # fmt: skip


@pytest.mark.parametrize("header", ["Bearer secret", "bearer  secret ", "BEARER secret"])
def test_a_good_token(header: str) -> None:
    assert Contract(token=" secret ").exchange().send(request_headers(authorization=header)).kind == "request_headers"


def test_the_token_is_checked_before_the_user() -> None:
    said = Contract(token="secret", users={}).exchange().send(request_headers(user="nobody"))
    assert said.status == 401
    assert "x-error-user" not in said.headers


def test_an_unknown_user() -> None:
    said = Contract(users={}).exchange().send(request_headers(user="nobody"))
    assert (said.status, said.headers["x-error-user"]) == (401, "true")


def test_an_empty_user_is_nobody() -> None:
    assert Contract(users={}).exchange().send(request_headers(user="")).kind == "request_headers"


def test_requests_a_minute() -> None:
    contract = Contract(users={"ann": (2, 0)})
    for _ in range(2):
        assert contract.exchange().send(request_headers(user="ann")).kind == "request_headers"
    said = contract.exchange().send(request_headers(user="ann"))
    assert (said.status, said.error["code"], said.error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert said.error["message"] == "user: ann has exceeded RPM: 2"
    assert said.headers["x-error-rpm-exceeded"] == "true"
    assert 1 <= int(said.headers["Retry-After"]) <= 60


def test_tokens_a_minute() -> None:
    contract = Contract(users={"ann": (10, 12)})
    stream = contract.routed(user="ann")
    stream.send(response_with())
    stream.send(response_body(completion(), eos=True))
    said = contract.exchange().send(request_headers(user="ann"))
    assert (said.status, said.headers["x-error-tpm-exceeded"]) == (429, "true")
    assert said.error["message"] == "user: ann has exceeded TPM: 12"


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/chat/completions/", "/V1/chat/completions", "/v1/chat"])
def test_an_unknown_path(path: str) -> None:
    said = Contract().routed(path, b"no json").last
    assert (said.status, said.error["message"], said.error["type"]) == (501, "unknown request path", "api_error")
    assert said.headers["x-error-request-body-processing"] == "true"


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b'{"model":1,"messages":[{}]}', b'{"messages":"x"}', b"\xef\xbb\xbf{}"]
)
def test_a_bad_body(body: bytes) -> None:
    said = Contract().routed(body=body).last
    assert (said.status, said.error["message"]) == (400, "error processing request body")
    assert said.headers["x-error-request-body-processing"] == "true"


@pytest.mark.parametrize(("model", "shown"), [("gpt-9", "gpt-9"), ("", "")])
def test_an_unknown_model(model: str, shown: str) -> None:
    said = Contract().routed(body=chat(model), routing_strategy="nonsense").last
    assert said.status == 400
    assert said.error == {
        "message": f"model {shown} does not exist", "type": "invalid_request_error", "code": "model_not_found",
        "param": "model",
    }  # fmt: skip
    assert said.headers["x-error-no-model-backends"] == shown


def test_empty_messages_hide_an_unknown_model() -> None:
    said = Contract().routed(body=b'{"model":"gpt-9","messages":[]}').last
    assert (said.error["message"], said.error["param"]) == ("no messages in the request body", "messages")


def test_nothing_but_headers() -> None:
    contract = Contract()
    stream = contract.exchange()
    assert stream.send(request_headers("/v1/files", eos=True)).headers == {"x-went-into-req-headers": "true"}
    said = stream.send(response_with())
    assert said.headers == {"x-went-into-req-headers": "true", "request-id": REQUEST_ID, ":status": "200"}
    assert said.common.clear_route_cache
    assert stream.send(response_body(b'{"data":[]}', eos=True)).is_plain
    assert stream.finished
    assert contract.counted("finished") == {}


def test_no_ready_pod() -> None:
    contract = Contract()
    set_row(contract.tables, 0, Health.FAILED)
    said = contract.routed(routing_strategy="nonsense").last
    assert (said.status, said.error["code"]) == (503, "service_unavailable")
    assert said.error["message"] == "error on getting pods for model llama"
    assert said.headers["x-error-no-model-backends"] == "true"


@pytest.mark.parametrize(
    "value", ["nonsense", "Random", "random,least-request", "least-request:x", "least-request,", "least-request:1:2"]
)
def test_a_bad_strategy(value: str) -> None:
    said = Contract(2).routed(routing_strategy=value).last
    assert (said.status, said.error["message"]) == (400, f"incorrect routing strategy {value}")
    assert said.headers["x-error-routing"] == "true"


@pytest.mark.parametrize("value", [" random ", "least-request:2,prefix-cache", "prefix-cache , least-request : +3"])
def test_the_strategy_is_told_as_it_was_asked_for(value: str) -> None:
    stream = Contract(2).routed(routing_strategy=value)
    assert stream.last.headers["routing-strategy"] == value.strip()
    assert stream.send(response_with()).headers["routing-strategy"] == value.strip()


def test_an_empty_strategy_counts_as_none() -> None:
    assert Contract().routed(routing_strategy=" ").last.headers["routing-strategy"] == "random"


def profiled(**config: object) -> Contract:
    return Contract(2, settings={"llama": config})


def test_the_order_of_strategies() -> None:
    profiles = {"default": {"routingStrategy": "least-request"}, "fast": {"routingStrategy": "power-of-two"}}

    def chosen(contract: Contract, **headers: str) -> str:
        return contract.routed(**headers).last.headers["routing-strategy"]

    locked = profiled(lockedRoutingStrategy="round-robin", profiles=profiles)
    assert chosen(locked, routing_strategy="nonsense") == "round-robin"
    free = profiled(profiles=profiles)
    assert chosen(free, routing_strategy="prefix-cache", config_profile="fast") == "prefix-cache"
    assert chosen(free, config_profile=" fast ") == "power-of-two"
    assert chosen(free, config_profile="unheard-of") == "least-request"
    assert chosen(profiled(profiles={"x": {}}), config_profile="x") == "random"
    assert chosen(profiled(lockedRoutingStrategy="round-robin"), routing_strategy="least-request") == "least-request"


def test_a_profile_found_by_its_hints_is_named_in_the_response() -> None:
    contract = profiled(
        profiles={
            "default": {"routingStrategy": "random"},
            "long": {"routingStrategy": "least-request", "routingConfig": {"promptTokensGte": 50}},
        }
    )
    stream = contract.routed(body=chat(text="word " * 200), config_profile="auto")
    assert stream.last.headers["routing-strategy"] == "least-request"
    assert stream.send(response_with()).headers["x-aibrix-config-profile"] == "long"
    short = contract.routed(config_profile="auto")
    assert short.send(response_with()).headers["x-aibrix-config-profile"] == "default"
    assert "x-aibrix-config-profile" not in contract.routed(config_profile="long").send(response_with()).headers


def test_an_adapter_has_the_profiles_of_its_base_model() -> None:
    record = make_record(0, models=("llama", "adapter"))
    contract = Contract(
        records=[record], settings={"llama": {"profiles": {"default": {"routingStrategy": "throughput"}}}}
    )
    assert contract.routed(body=chat("adapter")).last.headers["routing-strategy"] == "throughput"


def test_requests_of_a_model_per_second() -> None:
    contract = profiled(profiles={"default": {"requestsPerSecond": 2}})
    for _ in range(2):
        assert contract.routed().last.kind == "request_body"
    said = contract.routed().last
    assert (said.status, said.error["code"]) == (429, "rate_limit_exceeded")
    assert said.error["message"] == "model: llama has exceeded RPS: 2"
    assert said.headers["x-error-model-rps-exceeded"] == "true"
    assert contract.in_flight == 2


def test_a_request_that_finds_no_pod_does_not_count_for_its_model() -> None:
    contract = profiled(profiles={"default": {"requestsPerSecond": 1}})
    for _ in range(3):
        assert contract.routed(external_filter="zone=nowhere").last.status == 503
    assert contract.routed(routing_strategy="nonsense").last.status == 400
    assert contract.routed().last.kind == "request_body"


LABELLED = [make_record(slot, labels={"zone": zone}) for slot, zone in enumerate(("a", "a", "b"))]


@pytest.mark.parametrize(("selector", "pods"), [("zone=b", {3}), ("zone in (a,c)", {1, 2}), ("!x", {1, 2, 3})])
def test_a_label_filter(selector: str, pods: set[int]) -> None:
    contract = Contract(records=LABELLED)
    seen = {contract.routed(external_filter=selector).last.headers["target-pod"] for _ in range(30)}
    assert seen == {f"10.0.0.{pod}:8000" for pod in pods}


@pytest.mark.parametrize("selector", ["zone=c", "zone=(", "=", "a" * 10_000])
def test_a_label_filter_that_leaves_nobody(selector: str) -> None:
    said = Contract(records=LABELLED).routed(external_filter=selector).last
    assert (said.status, said.error["message"]) == (503, "error on selecting target pod")
    assert said.error["code"] == "service_unavailable"
    assert said.headers["x-error-routing"] == "true"


def test_a_label_filter_without_a_strategy_is_ignored() -> None:
    assert Contract(records=LABELLED, strategy="").routed(external_filter="zone=(").last.headers == {"model": "llama"}


def test_streams_of_users_with_a_token_limit_must_tell_their_usage() -> None:
    contract = Contract(users={"ann": (0, 100), "bob": (50, 0)})
    said = contract.routed(body=chat(model="gpt-9", stream=True), user="ann").last
    message = "include usage for stream options not set"
    assert (said.status, said.error["message"], said.error["param"]) == (400, message, "stream_options")
    assert said.headers["x-error-no-stream-options-include-usage"] == message
    fine = chat(stream=True, stream_options={"include_usage": True})
    assert contract.routed(body=fine, user="ann").last.kind == "request_body"
    assert contract.routed(body=chat(), user="ann").last.kind == "request_body"
    assert contract.routed(body=chat(stream=True), user="bob").last.kind == "request_body"
    assert contract.routed(body=chat(stream=True)).last.kind == "request_body"
    prompt = b'{"model":"llama","prompt":"x","stream":true}'
    assert contract.routed("/v1/completions", prompt, user="ann").last.kind == "request_body"
    assert contract.routed("/v1/messages", chat(stream=True), user="ann").last.kind == "request_body"


@pytest.mark.parametrize(
    ("state", "advice"), [("sleeping", "10"), ("activating", "10"), ("failed", None), ("active", None)]
)
def test_models_that_sleep(state: str, advice: str | None) -> None:
    claim = orjson.dumps({"model": "llama", "port": 8000, "state": state}).decode()
    contract = Contract(records=[make_record(0, labels={"modelclaim.aibrix.ai/llama": claim})])
    said = contract.routed().last
    if state == "active":
        assert said.kind == "request_body"
        return
    assert (said.status, said.error["code"], said.error["param"]) == (503, "service_unavailable", "model")
    assert said.error["message"] == f"model llama is {state}" + ("" if advice is None else "; retry shortly")
    assert said.headers["x-error-no-model-backends"] == "llama"
    assert said.headers.get("Retry-After") == advice


def test_pods_on_which_a_model_sleeps_get_none_of_its_requests() -> None:
    labels = [{"modelclaim.aibrix.ai/llama": state} for state in ("sleeping", "active", "failed")]
    contract = Contract(records=[make_record(slot, labels=each) for slot, each in enumerate(labels)])
    assert {contract.routed().last.headers["target-pod"] for _ in range(20)} == {"10.0.0.2:8000"}


def test_a_session_stays_with_its_pod() -> None:
    contract = Contract(8)
    first = contract.routed(routing_strategy="session-affinity")
    home = first.last.headers["target-pod"]
    session = first.send(response_with()).headers["x-session-id"]
    for _ in range(20):
        stream = contract.routed(routing_strategy="session-affinity", x_session_id=session)
        assert stream.last.headers["target-pod"] == home
        assert stream.send(response_with()).headers["x-session-id"] == session
    keyed = {
        contract.routed(routing_strategy="session-affinity", x_aibrix_session_key="k").last.headers["target-pod"]
        for _ in range(20)
    }
    assert len(keyed) == 1
    assert "x-session-id" not in contract.routed().send(response_with()).headers


def test_no_strategy_is_left_out_where_one_pod_is_left() -> None:
    contract = Contract(1)
    stream = contract.routed(routing_strategy="session-affinity")
    assert len(stream.send(response_with()).headers["x-session-id"]) == 22


def test_an_adapter_is_a_model_of_the_pods_that_hold_it() -> None:
    records = [make_record(0), make_record(1, models=("llama", "adapter"))]
    contract = Contract(records=records)
    assert {contract.routed(body=chat("adapter")).last.headers["target-pod"] for _ in range(9)} == {"10.0.0.2:8000"}


def test_a_200_that_is_an_error_ends_the_stream() -> None:
    stream = Contract().routed()
    stream.send(response_with())
    said = stream.send(response_body(b'{"error":{"message":"no","code":"429"}}', eos=True))
    assert (said.kind, said.status) == ("immediate_response", 429)
    assert stream.finished


def test_multipart_audio() -> None:
    form = (
        b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nllama\r\n'
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n\x00\xff\r\n--b--\r\n'
    )
    path = "/v1/audio/transcriptions"
    contract = Contract()
    stream = contract.routed(path, form, content_type="multipart/form-data; boundary=b")
    assert stream.last.headers["target-pod"] == "10.0.0.1:8000"
    stream.send(response_with())
    assert stream.send(response_body(b"text", eos=True)).is_plain
    assert stream.finished
    for body, content_type, message in (
        (form, "application/json", "audio requests must use multipart/form-data content-type"),
        (form, "multipart/form-data", "missing boundary in content-type"),
        (b"", "multipart/form-data; boundary=b", "failed to parse multipart form"),
    ):
        assert contract.routed(path, body, content_type=content_type).last.error["message"] == message


def test_trailers_get_their_reply() -> None:
    stream = Contract().routed()
    assert stream.send(trailers("request")).kind == "request_trailers"
    stream.send(response_with())
    assert stream.send(trailers("response")).kind == "response_trailers"


@pytest.mark.parametrize("phase", range(5))
def test_a_client_that_leaves_is_counted_once(phase: int) -> None:
    contract = Contract()
    stream = contract.exchange()
    messages = [
        request_headers(), request_body(chat(stream=True)), response_with(), response_body(chunk()),
        response_body(USAGE_CHUNK + DONE),
    ]  # fmt: skip
    for message in messages[: phase + 1]:
        stream.send(message)
    stream.exchange.close()
    stream.exchange.close()
    expected = {} if phase == 0 else {("pod-0", "200" if phase == 4 else "499"): 1.0}
    assert contract.counted("finished") == expected
    assert contract.in_flight == 0


def test_a_refused_request_is_counted_once() -> None:
    contract = Contract()
    stream = contract.routed(body=chat("gpt-9"))
    stream.exchange.close()
    assert contract.counted("refused") == {("400", "model_not_found"): 1.0}
    assert contract.counted("finished") == {}


def test_api_keys_say_who_it_is() -> None:
    key = KEY_PREFIX + "x" * 40
    contract = Contract(users={"ann": (1, 0)}, keys={key: "ann"})
    bearer = f"Bearer {key}"
    assert contract.exchange().send(request_headers(authorization=bearer)).kind == "request_headers"
    assert contract.exchange().send(request_headers(authorization=bearer)).status == 429
    assert contract.exchange().send(request_headers(user="ann")).status == 401
    assert contract.exchange().send(request_headers(user="bob", authorization=bearer)).status == 401


def test_models_of_an_empty_fleet_are_unknown() -> None:
    tables = fleet.make_tables()
    tables.catalog.publish(CatalogDocument((), {"llama": {"profiles": {"default": {}}}}))
    contract = Contract()
    contract.scheduler.fleet._tables = tables
    assert contract.routed().last.error["code"] == "model_not_found"
