"""Messages, responses, embeddings, rerank, classify, images and video."""

import json

import orjson
import pytest
from json_body import read_json as read

from router.bodies import upstream_path
from router.bodies.base import COUNTED_BYTES, parse
from router.errors import RequestError

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
RERANK = "/v1/rerank"
CLASSIFY = "/v1/classify"
BAD = "error processing request body"
MARK = (("x-error-request-body-processing", b"true"),)


def refusal(path: str, document: object) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as caught:
        read(path, document)
    assert caught.value.status == 400
    assert caught.value.headers == MARK
    return caught.value.message, caught.value.param


# Anthropic


def test_a_message_tells_its_system_its_tools_and_its_blocks() -> None:
    document = {
        "model": "claude",
        "max_tokens": 9,
        "stream": True,
        "system": [{"type": "text", "text": "SYS", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "TOOL", "input_schema": {}}],
        "messages": [
            {"role": "user", "content": "HELLO"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "TOOL", "input": {"a": "ARG"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "RESULT"}]},
        ],
    }
    body = read(MESSAGES, document)
    assert (body.kind, body.model, body.max_tokens, body.stream, body.include_usage) == (
        "messages",
        "claude",
        9,
        True,
        True,
    )
    text = body.routing_text()
    places = [text.index(word) for word in (b"SYS", b"TOOL", b"HELLO", b"ARG", b"RESULT")]
    assert places == sorted(places)
    shorter = {**document, "messages": document["messages"][:1]}  # type: ignore[index]
    assert text.startswith(read(MESSAGES, shorter).routing_text())


def test_a_system_prompt_may_be_a_string_and_counts_the_same() -> None:
    turns = [{"role": "user", "content": "x"}]
    plain = read(MESSAGES, {"system": "S", "messages": turns}).routing_text()
    blocks = read(MESSAGES, {"system": [{"type": "text", "text": "S"}], "messages": turns}).routing_text()
    assert plain == blocks != read(MESSAGES, {"messages": turns}).routing_text()


def test_an_image_inside_a_tool_result_is_a_medium() -> None:
    image = {"type": "image", "source": {"type": "base64", "data": "A" * 100_000}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}, image]}
    body = read(MESSAGES, {"messages": [{"role": "user", "content": [result]}]})
    assert 512 <= body.approximate_tokens < 600
    assert len(body.routing_text()) < 200
    assert 512 <= body.approximate_tokens < 600


def test_tool_results_nested_in_each_other_end() -> None:
    inner: object = "x"
    for _ in range(200):
        inner = [{"type": "tool_result", "tool_use_id": "t", "content": inner}]
    raw = json.dumps({"messages": [{"role": "user", "content": inner}], "padding": "x" * 10_000}).encode()
    assert read(MESSAGES, raw).approximate_tokens > 0
    assert read(MESSAGES, raw).routing_text()


@pytest.mark.parametrize("system", [7, {"a": 1}, [None, 3]])
def test_an_odd_system_prompt_is_the_engines_to_refuse(system: object) -> None:
    assert read(MESSAGES, {"system": system, "messages": [{}]}).routing_text()


def test_messages_are_checked_like_a_chat() -> None:
    assert refusal(MESSAGES, {"messages": []}) == ("no messages in the request body", "messages")
    assert refusal(MESSAGES, {"messages": "x"}) == (BAD, None)


# Responses


def test_a_response_is_read() -> None:
    body = read(RESPONSES, {"model": "m", "input": "hi", "stream": True, "max_output_tokens": 4})
    assert (body.kind, body.model, body.stream, body.max_tokens, body.include_usage) == (
        "responses",
        "m",
        True,
        4,
        True,
    )
    assert body.routing_text() == b"\x1euser\x1fhi"
    assert read(RESPONSES, {"model": "m", "input": ""}).model == "m"


def test_a_string_is_the_same_as_a_users_turn() -> None:
    item = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    as_items = read(RESPONSES, {"model": "m", "input": [item]}).routing_text()
    assert as_items == read(RESPONSES, {"model": "m", "input": "hi"}).routing_text()


def test_instructions_tools_and_items_follow_each_other() -> None:
    document = {
        "model": "m",
        "instructions": "SYS",
        "tools": [{"name": "TOOL"}],
        "input": [
            {"role": "user", "content": "HELLO"},
            {"type": "function_call", "name": "f", "arguments": "ARG", "call_id": "c"},
            {"type": "function_call_output", "call_id": "c", "output": "RESULT"},
            None,
            {},
        ],
    }
    text = read(RESPONSES, document).routing_text()
    places = [text.index(word) for word in (b"SYS", b"TOOL", b"HELLO", b"ARG", b"RESULT")]
    assert places == sorted(places)
    shorter = {**document, "input": document["input"][:2]}  # type: ignore[index]
    assert text.startswith(read(RESPONSES, shorter).routing_text())


@pytest.mark.parametrize(
    ("document", "message", "param"),
    [
        ({"input": "x"}, "'model' is a required property", "model"),
        (b"null", "'model' is a required property", "model"),
        ({"model": "", "input": 7}, "'model' is a required property", "model"),
        ({"model": "m"}, "'input' is a required property", "input"),
        ({"model": "m", "input": None}, "'input' is a required property", "input"),
        ({"model": "m", "input": []}, "'input' array cannot be empty", "input"),
        ({"model": "m", "input": 7}, "'input' must be a string or an array of input items", "input"),
        ({"model": "m", "input": {}}, "'input' must be a string or an array of input items", "input"),
        ({"model": "m", "input": ["x"]}, "'input' must be a string or an array of input items", "input"),
        ({"model": 7, "input": "x"}, BAD, None),
        ({"model": "m", "input": "x", "stream": "yes"}, BAD, None),
        (b"{", BAD, None),
    ],
)
def test_responses_refused(document: object, message: str, param: str | None) -> None:
    assert refusal(RESPONSES, document) == (message, param)


# Embeddings


@pytest.mark.parametrize(
    "given",
    [
        "x",
        ["x", "y"],
        [1, 2],
        [[1], [2, 3]],
        [1.5, 2],
        ["a", 1],
        ["a", None],
        [-1],
        [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}],
        [{"text": "x"}, {"image": "data:x"}, {"video": "data:x"}],
        "word " * 8000,
        ["word " * 5000] * 20,
        [[1] * 2048] * 146,
    ],
)
def test_inputs_taken(given: object) -> None:
    body = read(EMBEDDINGS, {"model": "m", "input": given, "stream": False})
    assert (body.kind, body.model, body.stream) == ("embeddings", "m", False)
    assert body.routing_text()
    assert body.approximate_tokens >= 0


def test_an_absent_input_is_taken() -> None:
    assert read(EMBEDDINGS, {"model": "m", "stream": None}).routing_text() == b""


def test_token_ids_are_counted() -> None:
    assert read(EMBEDDINGS, {"input": [[1, 2], [3]]}).approximate_tokens == 3
    image = {"image": "A" * 100_000}
    assert 512 <= read(EMBEDDINGS, {"input": [image, {"text": "x" * 400}]}).approximate_tokens < 700


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "input cannot be an empty string"),
        ("", "input cannot be an empty string"),
        ([""], "input cannot be an empty string"),
        (["a", ""], "input at index 1 cannot be an empty string"),
        ([], "input array cannot be empty"),
        ([[]], "token array cannot be empty"),
        ([[1], []], "token array at index 1 cannot be empty"),
        ([1] * 2049, "token array exceeds max dimensions (2048), actual dimensions: 2049"),
        ([[1], [1] * 2049], "token array at index 1 exceeds max dimensions (2048), actual dimensions: 2049"),
        ([1] * 8193, "token array exceeds max tokens per model (8192), actual tokens: 8193"),
        ([[1] * 2048] * 147, "total tokens across all inputs exceeds maximum (300000), actual total: 301056"),
        ("word " * 8193, "input exceeds max tokens per model (8192), estimated tokens: 8194"),
        (["a", "word " * 9000], "input at index 1 exceeds max tokens per model (8192), estimated tokens: 9001"),
        (["word " * 8000] * 38, "total tokens across all inputs exceeds maximum (300000), estimated total: 304038"),
        ([{"text": "x"}, {}], "input at index 1 must set one of text, image, or video"),
        ([{"type": "text"}], "input at index 0 cannot be an empty string"),
        ([{"type": "image_url"}], "input at index 0 is missing image_url"),
        ([{"type": "video_url"}], "input at index 0 is missing video_url"),
        ([{"type": "image"}], "input at index 0 is missing image"),
        ([{"type": "video"}], "input at index 0 is missing video"),
        ([{"type": "audio"}], 'input at index 0 has unsupported content type "audio"'),
    ],
)
def test_inputs_refused(given: object, message: str) -> None:
    assert refusal(EMBEDDINGS, {"model": "m", "input": given}) == (message, "input")


@pytest.mark.parametrize("given", [7, True, {}, {"text": "x"}, [{}], [{"text": 7}], [{"text": "x"}, 7]])
def test_inputs_that_are_nothing(given: object) -> None:
    assert refusal(EMBEDDINGS, {"model": "m", "input": given}) == (BAD, None)


@pytest.mark.parametrize("stream", [True, "false", 0, {}])
def test_embeddings_do_not_stream(stream: object) -> None:
    assert refusal(EMBEDDINGS, {"model": "m", "input": "x", "stream": stream}) == (
        "stream not supported for embeddings",
        "stream",
    )
    assert refusal(EMBEDDINGS, {"input": "", "stream": True})[1] == "input"


def test_a_vast_input_is_estimated_without_counting_its_words() -> None:
    assert refusal(EMBEDDINGS, {"input": "x" * 1_000_000}) == (
        "input exceeds max tokens per model (8192), estimated tokens: 250000",
        "input",
    )


# Rerank and classify


def test_rerank_is_read() -> None:
    body = read(RERANK, {"model": "m", "query": "q", "documents": ["a", "b", None]})
    assert (body.kind, body.model) == ("rerank", "m")
    assert body.routing_text() == b"q a b "


@pytest.mark.parametrize(
    ("document", "message", "param"),
    [
        ({"query": "q", "documents": ["a"]}, "'model' is a required property", "model"),
        ({"model": "m", "documents": ["a"]}, "'query' is a required property", "query"),
        ({"model": "m", "query": "", "documents": ["a"]}, "'query' is a required property", "query"),
        ({"model": "m", "query": "q"}, "'documents' is a required property and cannot be empty", "documents"),
        (
            {"model": "m", "query": "q", "documents": []},
            "'documents' is a required property and cannot be empty",
            "documents",
        ),
        ({"model": "m", "query": "q", "documents": [{"text": "a"}]}, BAD, None),
        ({"model": "m", "query": "q", "documents": "a"}, BAD, None),
        ({"model": "m", "query": 1, "documents": ["a"]}, BAD, None),
        ({"model": 1, "query": "q", "documents": ["a"]}, BAD, None),
        (b"null", "'model' is a required property", "model"),
    ],
)
def test_rerank_refused(document: object, message: str, param: str | None) -> None:
    assert refusal(RERANK, document) == (message, param)


def test_classify_is_read() -> None:
    assert read(CLASSIFY, {"model": "m", "input": "a"}).routing_text() == b"a"
    assert read(CLASSIFY, {"model": "m", "input": ["a", "b"]}).routing_text() == b"a b"


@pytest.mark.parametrize(
    ("document", "message", "param"),
    [
        ({"input": "a"}, "'model' is a required property", "model"),
        ({"model": "m"}, "'input' is a required property", "input"),
        ({"model": "m", "input": None}, "'input' is a required property", "input"),
        ({"model": "m", "input": ""}, "'input' cannot be an empty string", "input"),
        ({"model": "m", "input": []}, "'input' array cannot be empty", "input"),
        ({"model": "m", "input": 7}, "'input' must be a string or array of strings", "input"),
        ({"model": "m", "input": [7]}, "'input' must be a string or array of strings", "input"),
        ({"model": [], "input": "a"}, BAD, None),
    ],
)
def test_classify_refused(document: object, message: str, param: str | None) -> None:
    assert refusal(CLASSIFY, document) == (message, param)


# Images and video


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/video/generations"])
def test_only_the_model_of_a_picture_matters(path: str) -> None:
    body = read(path, {"model": "flux", "stream": "odd"})
    assert (body.kind, body.model, body.stream, body.routing_text()) == ("media", "flux", False, b"")
    assert read(path, {}).model == ""
    assert refusal(path, {"model": 1}) == (BAD, None)
    assert refusal(path, b"{") == (BAD, None)


def test_xdit_takes_pictures_elsewhere() -> None:
    assert upstream_path("/v1/images/generations", "xdit") == "/generate"
    assert upstream_path("/v1/video/generations", "xdit") == "/generatevideo"
    assert upstream_path("/v1/images/generations", "vllm") is None
    assert upstream_path("/v1/chat/completions", "xdit") is None


# What a client can do to a parser


@pytest.mark.parametrize(
    "values",
    [
        b",".join([b"{}"] * 1_100_000),
        b",".join([b'""'] * 1_100_000),
        b"[" * 3 + b",".join([b"[1]"] * 600_000) + b"]" * 3,
    ],
)
def test_more_values_than_a_prompt_can_have_are_refused(values: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(b'{"model": "m", "messages": [' + values + b"]}")
    assert caught.value.status == 400 and "JSON values" in caught.value.message


@pytest.mark.parametrize("text", ["Hello, [you], {there}. ", "\\", '\\", [', "\u00e9,,,", 'a"\\,'])
def test_a_long_text_is_one_value_whatever_is_in_it(text: str) -> None:
    body = json.dumps({"model": "m", "prompt": [text * 600_000, "b"]}).encode()
    assert len(body) > COUNTED_BYTES
    assert parse(body)["prompt"] == [text * 600_000, "b"]


@pytest.mark.parametrize("cut", [b"\\ud83d", b"\\uDE00", b"\\ud83d\\ud83d", b"\\udc00\\ud800 x", b'\\\\\\ud800\\"'])
def test_escaped_lone_surrogates_are_read_as_replacement_characters(cut: bytes) -> None:
    raw = b'{"model":"m","messages":[{"role":"user","content":"a' + cut + b' \\ud83d\\ude00 \\\\ud800"}]}'
    wanted = json.loads(raw)["messages"][0]["content"]
    wanted = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in wanted)
    assert read("/v1/chat/completions", raw).routing_text() == b"\x1euser\x1f" + wanted.encode()


@pytest.mark.parametrize("name", ["a\u0000b", "a\r\nx-evil: 1", "m" * 100_000, "模型", "\u2028", " "])
def test_any_model_name_is_a_safe_header(name: str) -> None:
    from router.errors import unknown_model

    error = unknown_model(read("/v1/completions", {"model": name}).model)
    value = dict(error.headers)["x-error-no-model-backends"]
    assert not set(value) & {*range(0x20), 0x7F}
    assert len(value) <= 1024
    assert len(error.body()) < 2000
    assert orjson.loads(error.body())["error"]["code"] == "model_not_found"


def test_huge_bodies_of_brackets_and_numbers_end_quickly() -> None:
    for raw in (
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"model":' + b"9" * 1_000_000 + b"}",
        b'"' + b"\\ud800" * 700_000,
    ):
        assert refusal("/v1/completions", raw) == (BAD, None)
