import orjson
import pytest

from router.upstream_errors import MAX_BYTES, disguised, normalise

MARK = (("x-error-response-unknown", b"true"),)


def error(**fields: object) -> dict[str, object]:
    return {"error": {"message": None, "type": None, "code": None, "param": None, **fields}}


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (
            {"error": {"message": "m", "type": "t", "code": 400, "param": "p", "x": 1}},
            error(message="m", type="t", code=400, param="p"),
        ),
        ({"object": "error", "message": "m", "type": "t", "code": 404}, error(message="m", type="t", code=404)),
        ({"error": {}}, error(message="unknown response")),
        ({"error": {"message": {"a": 1}, "type": 7}}, error(message='{"a":1}', type="7")),
        (
            {"error": {"message": True, "code": ["x"], "param": {"y": 2}}},
            error(message="true", code=["x"], param={"y": 2}),
        ),
        ({"message": None}, error(message="unknown response")),
        ({"error": "boom", "message": "m"}, error(message="m")),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
            error(message="m", type="overloaded_error"),
        ),
    ],
)
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_engines_errors_come_out_in_one_shape(body: object, wanted: object, status: int) -> None:
    got = normalise(status, orjson.dumps(body))
    assert got is not None
    assert (got.status, orjson.loads(got.body), got.headers) == (status, wanted, MARK)


@pytest.mark.parametrize(
    "text", ["no healthy upstream", '{"detail":"Not Found"}', '{"error":"boom"}', "[1]", "null", "{", "<h1>"]
)
def test_other_bodies_become_the_message(text: str) -> None:
    got = normalise(404, text.encode())
    assert got is not None
    assert orjson.loads(got.body) == error(message=text, type="invalid_request_error")
    assert got.headers == ()


def test_unavailable_has_its_code() -> None:
    got = normalise(503, b"busy")
    assert got is not None
    assert orjson.loads(got.body) == error(message="busy", type="overloaded_error", code="service_unavailable")


@pytest.mark.parametrize("body", [b"", b"\x1f\x8b\xff\xfe", b"x" * (MAX_BYTES + 1)])
def test_what_cannot_be_read_is_left_alone(body: bytes) -> None:
    assert normalise(500, body) is None


def test_an_error_nested_too_deep_is_still_an_error() -> None:
    deep = b"[" * 500 + b"]" * 500
    for raw in (b'{"error":{"message":"m","code":' + deep + b"}}", b'{"error":{"message":' + deep + b"}}"):
        got = normalise(400, raw)
        assert got is not None
        assert orjson.loads(got.body)["error"]["message"]


@pytest.mark.parametrize(
    ("code", "status"),
    [(400, 400), ("429", 429), (503.0, 503), (None, 500), ("invalid_api_key", 500), (0, 500), (700, 500), ("²²²", 500)],
)
def test_a_two_hundred_that_is_an_error_gets_its_own_code(code: object, status: int) -> None:
    for document in ({"model": "", "error": {"message": "m", "code": code}}, {"message": "m", "code": code}):
        got = disguised(document)
        assert got is not None
        assert (got.status, orjson.loads(got.body)["error"]["code"], got.headers) == (status, code, MARK)


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        {"data": []},
        {"model": "m", "message": "x"},
        {"error": "x"},
        {"error": None, "data": []},
        {"code": 200, "message": "ok"},
    ],
)
def test_other_replies_are_left_alone(document: dict[str, object] | None) -> None:
    assert disguised(document) is None
