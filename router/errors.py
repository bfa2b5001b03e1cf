"""Every refusal a client can meet, in OpenAI's error shape.

One constructor per case, so that status, code, param and `x-error-*` header of a case stand side by side. The names
and words are AIBrix's wire contract where it has the case. What a client sent reaches a message or a header only
through `shortened` and `header_value`: bounded, and without control characters in a header.
"""

from typing import Final

import orjson

Header = tuple[str, bytes]

X_ERROR_USER: Final = "x-error-user"
X_ERROR_RPM_EXCEEDED: Final = "x-error-rpm-exceeded"
X_ERROR_TPM_EXCEEDED: Final = "x-error-tpm-exceeded"
X_ERROR_MODEL_RPS_EXCEEDED: Final = "x-error-model-rps-exceeded"
X_ERROR_REQUEST_BODY_PROCESSING: Final = "x-error-request-body-processing"
X_ERROR_NO_INCLUDE_USAGE: Final = "x-error-no-stream-options-include-usage"
X_ERROR_MULTIPART_PARSING: Final = "x-error-multipart-parsing"
X_ERROR_NO_MODEL_BACKENDS: Final = "x-error-no-model-backends"
X_ERROR_ROUTING: Final = "x-error-routing"
X_ERROR_RESPONSE_UNKNOWN: Final = "x-error-response-unknown"
RETRY_AFTER: Final = "Retry-After"

INVALID_API_KEY: Final = "invalid_api_key"
MODEL_NOT_FOUND: Final = "model_not_found"
RATE_LIMIT_EXCEEDED: Final = "rate_limit_exceeded"
SERVICE_UNAVAILABLE: Final = "service_unavailable"

WRONG_KEY: Final = "Incorrect API key provided"
BAD_BODY: Final = "error processing request body"
TRUE: Final = b"true"

MAX_ECHO_LENGTH: Final = 256
"""Characters of a client's own text that a message or a header may repeat."""

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_CONTROLS: Final = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029], "?")


def error_type(status: int) -> str:
    """OpenAI's `error.type` for an HTTP status."""
    return _TYPES.get(status, "api_error")


def shortened(text: str) -> str:
    """At most `MAX_ECHO_LENGTH` characters of a client's text."""
    return text if len(text) <= MAX_ECHO_LENGTH else text[:MAX_ECHO_LENGTH] + "…"


def header_value(text: str) -> bytes:
    """A client's text as a header value: control characters become `?`, blanks at the ends go, the rest is UTF-8."""
    return shortened(text).translate(_CONTROLS).strip().encode("utf-8", "replace")


class RequestError(Exception):
    """A request that is answered here instead of by a pod."""

    __slots__ = ("code", "headers", "message", "param", "status")

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: tuple[Header, ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers

    @property
    def type(self) -> str:
        """`error.type`, which follows from the status."""
        return error_type(self.status)

    def body(self) -> bytes:
        """The OpenAI error document."""
        return error_body(self.message, self.type, self.code, self.param)


def error_body(message: str, kind: str | None, code: object = None, param: object = None) -> bytes:
    """`{"error": {message, type, code, param}}`. Code and param may be any JSON value of an upstream's error."""
    document = {"error": {"message": message, "type": kind, "code": code, "param": param}}
    try:
        return orjson.dumps(document)
    except TypeError:  # lone surrogates in a text that did not come from a JSON parser, or a value nested too deep
        clean = message.encode("utf-8", "replace").decode()
        return orjson.dumps({"error": {"message": clean, "type": error_type(500), "code": None, "param": None}})


def bad_body(message: str = BAD_BODY, param: str | None = None) -> RequestError:
    """A body that cannot be read as what its path takes."""
    return RequestError(400, message, param=param, headers=((X_ERROR_REQUEST_BODY_PROCESSING, TRUE),))


def no_body() -> RequestError:
    """A request that ends with its headers, to a path that takes a body."""
    return bad_body("this path takes a POST request with a body, and there is none")


def missing(field: str) -> RequestError:
    """A property without which the request means nothing."""
    return bad_body(f"'{field}' is a required property", field)


def unknown_path() -> RequestError:
    """A path that is none of the API's."""
    return RequestError(501, "unknown request path", headers=((X_ERROR_REQUEST_BODY_PROCESSING, TRUE),))


def bad_multipart(message: str, param: str | None = None) -> RequestError:
    """A form that cannot be read."""
    return RequestError(400, message, param=param, headers=((X_ERROR_MULTIPART_PARSING, TRUE),))


def body_too_large(limit: int) -> RequestError:
    """A body past the configured bound, in bytes."""
    return RequestError(
        413, f"request body is larger than {limit} bytes", headers=((X_ERROR_REQUEST_BODY_PROCESSING, TRUE),)
    )


def include_usage_not_set() -> RequestError:
    """A stream of a user with a token limit that would not say what it used."""
    message = "include usage for stream options not set"
    return RequestError(400, message, param="stream_options", headers=((X_ERROR_NO_INCLUDE_USAGE, message.encode()),))


def unknown_model(model: str) -> RequestError:
    """Nobody serves this model. 400 as in AIBrix, not OpenAI's 404."""
    return RequestError(
        400,
        f"model {shortened(model)} does not exist",
        code=MODEL_NOT_FOUND,
        param="model",
        headers=((X_ERROR_NO_MODEL_BACKENDS, header_value(model)),),
    )


def no_pods(model: str) -> RequestError:
    """The model is known and none of its pods can take a request."""
    return RequestError(
        503,
        f"error on getting pods for model {shortened(model)}",
        code=SERVICE_UNAVAILABLE,
        headers=((X_ERROR_NO_MODEL_BACKENDS, TRUE),),
    )


def model_asleep(model: str, state: str, retry_after_seconds: int = 10) -> RequestError:
    """The model's claim is not active. A failed one will not come back by waiting."""
    headers: tuple[Header, ...] = ((X_ERROR_NO_MODEL_BACKENDS, header_value(model)),)
    message = f"model {shortened(model)} is {shortened(state)}"
    if state != "failed":
        headers = (*headers, (RETRY_AFTER, b"%d" % retry_after_seconds))
        message += "; retry shortly"
    return RequestError(503, message, code=SERVICE_UNAVAILABLE, param="model", headers=headers)


def bad_strategy(value: str) -> RequestError:
    """A `routing-strategy` that names no strategy."""
    return RequestError(400, f"incorrect routing strategy {shortened(value)}", headers=((X_ERROR_ROUTING, TRUE),))


def not_selected() -> RequestError:
    """No pod could be chosen: a bad label filter, or nobody left after filtering."""
    return RequestError(
        503, "error on selecting target pod", code=SERVICE_UNAVAILABLE, headers=((X_ERROR_ROUTING, TRUE),)
    )


def body_has_passed() -> RequestError:
    """A body that has to be changed, of an Envoy that sends it on piece by piece."""
    return RequestError(
        503,
        "pd changes request bodies: Envoy must send them BUFFERED or FULL_DUPLEX_STREAMED",
        code=SERVICE_UNAVAILABLE,
        headers=((X_ERROR_ROUTING, TRUE),),
    )


def no_prefill(engine: str) -> RequestError:
    """Pods of an engine that we cannot ask to hand over."""
    return RequestError(
        503,
        f"pd does not know the hand-over of engine {shortened(engine)}",
        code=SERVICE_UNAVAILABLE,
        headers=((X_ERROR_ROUTING, TRUE),),
    )


def repeated_key(key: str) -> RequestError:
    """A member that two may have written."""
    message = f'duplicate top-level key "{key}" in SGLang request body'
    return RequestError(400, message, headers=((X_ERROR_ROUTING, TRUE),))


def wrong_api_key() -> RequestError:
    """The bearer token is missing or unknown."""
    return RequestError(401, WRONG_KEY, code=INVALID_API_KEY, param="api_key")


def unknown_user(user: str) -> RequestError:
    """A `user` without a record."""
    return RequestError(401, f"unknown user {shortened(user)}", param="user", headers=((X_ERROR_USER, TRUE),))


def _over_limit(message: str, header: str, retry_after_seconds: int) -> RequestError:
    headers: tuple[Header, ...] = ((header, TRUE), (RETRY_AFTER, b"%d" % max(1, retry_after_seconds)))
    return RequestError(429, message, code=RATE_LIMIT_EXCEEDED, headers=headers)


def over_rpm(user: str, limit: int, retry_after_seconds: int) -> RequestError:
    """The user's requests of this minute are spent."""
    return _over_limit(f"user: {shortened(user)} has exceeded RPM: {limit}", X_ERROR_RPM_EXCEEDED, retry_after_seconds)


def over_tpm(user: str, limit: int, retry_after_seconds: int) -> RequestError:
    """The user's tokens of this minute are spent."""
    return _over_limit(f"user: {shortened(user)} has exceeded TPM: {limit}", X_ERROR_TPM_EXCEEDED, retry_after_seconds)


def over_model_rps(model: str, limit: int, retry_after_seconds: int = 1) -> RequestError:
    """The model's requests of this second are spent."""
    message = f"model: {shortened(model)} has exceeded RPS: {limit}"
    return _over_limit(message, X_ERROR_MODEL_RPS_EXCEEDED, retry_after_seconds)
