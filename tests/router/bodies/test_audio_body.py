import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.bodies import read_body
from router.bodies.audio import MAX_FALSE_BOUNDARIES
from router.bodies.base import Body
from router.errors import RequestError

TYPE = "multipart/form-data; boundary=XX"
PATHS = ["/v1/audio/transcriptions", "/v1/audio/translations"]


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--XX\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


FILE = part("file", b"RIFF\r\n--XY\r\n--XXX\x00\xff", '; filename="model"\r\nContent-Type: audio/wav')
END = b"--XX--\r\n"


def read(body: bytes, content_type: str = TYPE, path: str = PATHS[0]) -> Body:
    return read_body(path, content_type, body)


def refusal(body: bytes, content_type: str = TYPE) -> tuple[str, str | None, str]:
    with pytest.raises(RequestError) as caught:
        read(body, content_type)
    assert caught.value.status == 400
    ((header, value),) = caught.value.headers
    assert value == b"true"
    return caught.value.message, caught.value.param, header


@pytest.mark.parametrize("path", PATHS)
def test_a_form_is_read(path: str) -> None:
    body = read(FILE + part("model", b" whisper ") + part("stream", b"True") + END, path=path)
    assert (body.kind, body.model, body.stream, body.json, body.routing_text()) == ("audio", "whisper", True, None, b"")
    assert body.approximate_tokens == 512


@pytest.mark.parametrize(
    ("value", "stream"), [(b"1", True), (b"TRUE ", True), (b"yes", False), (b"", False), (b"0", False)]
)
def test_stream_is_true_or_one(value: bytes, stream: bool) -> None:
    assert read(part("model", b"m") + part("stream", value) + END).stream is stream


def test_the_last_of_a_repeated_field_counts() -> None:
    assert read(part("model", b"a") + part("model", b"b") + END).model == "b"


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="XX"',
        "Multipart/Form-Data;charset=utf-8;  boundary=XX",
        "multipart/mixed; Boundary=XX; a=b",
    ],
)
def test_content_types_are_read_as_they_may_be_written(content_type: str) -> None:
    assert read(part("model", b"m") + END, content_type).model == "m"


def test_a_preamble_and_bare_newlines_are_allowed() -> None:
    assert read(b"preamble\r\n" + part("model", b"m") + END + b"epilogue").model == "m"
    assert read((part("model", b"m") + END).replace(b"\r\n", b"\n")).model == "m"
    assert read(b"--XX  \r\ncontent-disposition:form-data;name=model\r\n\r\nm\r\n--XX--").model == "m"


@pytest.mark.parametrize("content_type", ["application/json", "", "text/plain; boundary=XX", "multipart"])
def test_what_is_no_form_is_refused(content_type: str) -> None:
    assert refusal(b"{}", content_type) == (
        "audio requests must use multipart/form-data content-type",
        None,
        "x-error-request-body-processing",
    )


MULTIPART = "x-error-multipart-parsing"


@pytest.mark.parametrize(
    ("body", "content_type", "message", "param"),
    [
        (FILE + END, "multipart/form-data", "missing boundary in content-type", None),
        (FILE + END, "multipart/form-data; charset=x", "missing boundary in content-type", None),
        (FILE + END, "multipart/form-data; boundary=", "invalid content-type header", None),
        (b"", TYPE, "failed to parse multipart form", None),
        (b"nothing here", TYPE, "failed to parse multipart form", None),
        (part("model", b"m") + END, "multipart/form-data; boundary=YY", "failed to parse multipart form", None),
        (part("model", b"m"), TYPE, "failed to read model field", "model"),
        (part("model", b"m")[:-2], TYPE, "failed to read model field", "model"),
        (part("model", b"m") + FILE[:-2], TYPE, "failed to parse multipart form", None),
        (part("model", b"m") + b"--XX\r\nContent-", TYPE, "failed to parse multipart form", None),
        (part("model", b"m") * 300 + END, TYPE, "failed to parse multipart form", None),
        (FILE + END, TYPE, "'model' is a required property", "model"),
        (part("model", b"  ") + END, TYPE, "'model' is a required property", "model"),
        (part("model", b"\xff") + END, TYPE, "failed to read model field", "model"),
        (part("model", b"m" * 5000) + END, TYPE, "'model' is a required property", "model"),
    ],
)
def test_forms_refused(body: bytes, content_type: str, message: str, param: str | None) -> None:
    assert refusal(body, content_type) == (message, param, MULTIPART)


def test_what_is_made_to_take_time_is_refused() -> None:
    almost = b"\r\n--XXX" * (MAX_FALSE_BOUNDARIES - 1)
    assert read(part("file", almost) + part("model", b"m") + END).model == "m"
    assert (
        refusal(part("file", almost + b"\r\n--XXX") + part("model", b"m") + END)[0] == "failed to parse multipart form"
    )
    assert refusal(b"", TYPE + "; x=y" * 300)[0] == "invalid content-type header"


def test_a_file_named_model_is_not_the_model() -> None:
    assert refusal(part("file", b"x", '; filename="x"; xname="model"') + END)[0] == "'model' is a required property"


@settings(deadline=None)
@given(st.binary(max_size=300).filter(lambda value: b"\r\n--XX" not in b"\r\n" + value))
def test_any_bytes_may_be_in_a_file(content: bytes) -> None:
    assert read(part("file", content) + part("model", b"m") + END).model == "m"


@settings(deadline=None)
@given(st.data())
def test_no_form_breaks_the_reader(data: st.DataObject) -> None:
    pieces = st.sampled_from(
        [b"--XX", b"--XX--", b"\r\n", b"\n", b"name", b'"', b";", b"model", b":", b"-", b" ", b"\xff"]
    )
    body = b"".join(data.draw(st.lists(pieces, max_size=40)))
    try:
        read(body)
    except RequestError as error:
        assert error.status == 400
