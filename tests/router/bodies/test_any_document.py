"""Whatever a client sends, it is read or refused."""

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.bodies import FORMS, READERS, read_body
from router.errors import RequestError

WORDS = [
    *(
        "model",
        "messages",
        "stream",
        "stream_options",
        "include_usage",
        "role",
        "content",
        "type",
        "text",
        "system",
        "user",
    ),
    *("tools", "tool_calls", "tool_result", "tool_use_id", "image_url", "image", "input_text", "input", "instructions"),
    *("prompt", "prompt_embeds", "cache_salt", "query", "documents", "max_tokens", "name", "developer", "url", "data"),
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70_000)
    | st.floats(allow_nan=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={"role": VALUES, "content": VALUES, "tool_calls": VALUES, "name": VALUES}),
    max_size=3,
)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(WORDS, VALUES),
        "model": st.just("m") | VALUES,
        "stream": st.booleans() | VALUES,
        "messages": TURNS | VALUES,
        "input": TURNS | st.text() | VALUES,
        "query": st.text() | VALUES,
        "documents": st.lists(st.text()) | VALUES,
    },
)


@pytest.mark.parametrize("path", sorted(READERS))
@settings(max_examples=30, deadline=None)
@given(document=DOCUMENTS, padding=st.sampled_from(["", "x" * 9000]))
def test_every_document_is_read_or_refused(path: str, document: dict[str, object], padding: str) -> None:
    try:
        body = read_body(path, "application/json", orjson.dumps({**document, "padding": padding}))
    except RequestError as error:
        assert error.status == 400
        assert orjson.loads(error.body())["error"]["message"]
        return
    assert type(body.model) is str
    assert type(body.stream) is bool
    assert body.approximate_tokens >= 0
    assert type(body.routing_text()) is bytes
    assert body.approximate_tokens >= 0


@pytest.mark.parametrize("path", sorted([*READERS, *FORMS]))
@settings(max_examples=40, deadline=None)
@given(raw=st.binary(max_size=40), content_type=st.text(max_size=20))
def test_all_bytes_are_read_or_refused(path: str, raw: bytes, content_type: str) -> None:
    for kind in (content_type, f"multipart/form-data; boundary={content_type}"):
        try:
            read_body(path, kind, raw).routing_text()
        except RequestError as error:
            assert error.status == 400
