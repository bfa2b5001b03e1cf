import orjson
import pytest

from router import errors
from router.errors import RequestError

LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param", "headers", "message"),
    [
        (
            errors.bad_body(),
            *(400, "invalid_request_error", None, None, {"x-error-request-body-processing": b"true"}),
            "error processing request body",
        ),
        (
            errors.missing("query"),
            *(400, "invalid_request_error", None, "query", {"x-error-request-body-processing": b"true"}),
            "'query' is a required property",
        ),
        (
            errors.unknown_path(),
            *(501, "api_error", None, None, {"x-error-request-body-processing": b"true"}),
            "unknown request path",
        ),
        (
            errors.body_too_large(20),
            *(413, "api_error", None, None, {"x-error-request-body-processing": b"true"}),
            "request body is larger than 20 bytes",
        ),
        (
            errors.bad_multipart("m"),
            *(400, "invalid_request_error", None, None, {"x-error-multipart-parsing": b"true"}),
            "m",
        ),
        (
            errors.include_usage_not_set(),
            *(400, "invalid_request_error", None, "stream_options"),
            {"x-error-no-stream-options-include-usage": b"include usage for stream options not set"},
            "include usage for stream options not set",
        ),
        (
            errors.unknown_model("m"),
            *(400, "invalid_request_error", "model_not_found", "model", {"x-error-no-model-backends": b"m"}),
            "model m does not exist",
        ),
        (
            errors.unknown_model(""),
            *(400, "invalid_request_error", "model_not_found", "model", {"x-error-no-model-backends": b""}),
            "model  does not exist",
        ),
        (
            errors.no_pods("m"),
            *(503, "overloaded_error", "service_unavailable", None, {"x-error-no-model-backends": b"true"}),
            "error on getting pods for model m",
        ),
        (
            errors.model_asleep("m", "sleeping"),
            *(503, "overloaded_error", "service_unavailable", "model"),
            {"x-error-no-model-backends": b"m", "Retry-After": b"10"},
            "model m is sleeping; retry shortly",
        ),
        (
            errors.model_asleep("m", "failed"),
            *(503, "overloaded_error", "service_unavailable", "model", {"x-error-no-model-backends": b"m"}),
            "model m is failed",
        ),
        (
            errors.bad_strategy("best"),
            *(400, "invalid_request_error", None, None, {"x-error-routing": b"true"}),
            "incorrect routing strategy best",
        ),
        (
            errors.not_selected(),
            *(503, "overloaded_error", "service_unavailable", None, {"x-error-routing": b"true"}),
            "error on selecting target pod",
        ),
        (
            errors.wrong_api_key(),
            *(401, "authentication_error", "invalid_api_key", "api_key", {}),
            "Incorrect API key provided",
        ),
        (
            errors.unknown_user("u"),
            *(401, "authentication_error", None, "user", {"x-error-user": b"true"}),
            "unknown user u",
        ),
        (
            errors.over_rpm("u", 5, 7),
            *(429, "rate_limit_error", "rate_limit_exceeded", None),
            {"x-error-rpm-exceeded": b"true", "Retry-After": b"7"},
            "user: u has exceeded RPM: 5",
        ),
        (
            errors.over_tpm("u", 5, 0),
            *(429, "rate_limit_error", "rate_limit_exceeded", None),
            {"x-error-tpm-exceeded": b"true", "Retry-After": b"1"},
            "user: u has exceeded TPM: 5",
        ),
        (
            errors.over_model_rps("m", 5),
            *(429, "rate_limit_error", "rate_limit_exceeded", None),
            {"x-error-model-rps-exceeded": b"true", "Retry-After": b"1"},
            "model: m has exceeded RPS: 5",
        ),
    ],
    ids=lambda value: value.message if isinstance(value, RequestError) else "",
)
def test_the_errors_on_the_wire(
    error: RequestError,
    status: int,
    kind: str,
    code: str | None,
    param: str | None,
    headers: dict[str, bytes],
    message: str,
) -> None:
    assert error.status == status
    assert dict(error.headers) == headers
    assert orjson.loads(error.body()) == {"error": {"message": message, "type": kind, "code": code, "param": param}}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 413, 429, 500, 501, 502, 503, 504])
def test_the_type_follows_the_status(status: int) -> None:
    known = {400: "invalid_request_error", 404: "invalid_request_error", 401: "authentication_error"}
    known |= {429: "rate_limit_error", 503: "overloaded_error"}
    assert RequestError(status, "m").type == known.get(status, "api_error")


def test_what_a_client_sent_is_repeated_in_part_only() -> None:
    for error in (
        errors.unknown_model(LONG),
        errors.bad_strategy(LONG),
        errors.over_rpm(LONG, 1, 1),
        errors.no_pods(LONG),
    ):
        assert len(error.body()) < 1000
        assert sum(len(value) for _, value in error.headers) < 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("llama-3", b"llama-3"),
        ("a\r\nx-evil: 1", b"a??x-evil: 1"),
        (" a\x00\x7f\t ", b"a???"),
        ("模型", "模型".encode()),
        ("\x85\u2028", b"??"),
        ("\ud800", b"?"),
    ],
)
def test_no_control_character_reaches_a_header(text: str, value: bytes) -> None:
    assert errors.header_value(text) == value


def test_a_body_can_be_written_for_any_message() -> None:
    assert orjson.loads(RequestError(400, "\ud800 x").body())["error"]["message"] == "? x"
