import orjson
import pytest
from json_body import read_json

from router.bodies import read_request, strip_query
from router.bodies.base import Body
from router.errors import RequestError

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "hello"}


def read(document: object, path: str = CHAT) -> Body:
    return read_json(path, document)


def refusal(document: object, path: str = CHAT) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(document, path)
    return caught.value


def text(*messages: object, **fields: object) -> bytes:
    return read({"model": "m", "messages": list(messages), **fields}).routing_text()


def test_a_plain_chat_request_is_read() -> None:
    body = read({"model": "m", "messages": [HELLO], "stream": True, "max_tokens": 7})
    assert (body.kind, body.model, body.stream, body.max_tokens, body.include_usage) == ("chat", "m", True, 7, False)
    assert b"hello" in body.routing_text()


def test_max_completion_tokens_counts_where_max_tokens_is_absent() -> None:
    assert read({"messages": [HELLO], "max_completion_tokens": 5}).max_tokens == 5
    assert read({"messages": [HELLO], "max_tokens": 3, "max_completion_tokens": 5}).max_tokens == 3


@pytest.mark.parametrize("value", [None, "9", -1, 1.5, True, [], 1e30])
def test_a_strange_output_bound_is_none(value: object) -> None:
    assert read({"messages": [HELLO], "max_tokens": value}).max_tokens == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'"x"',
        b'{"a":1,}',
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b'{"a":NaN}',
        b'{"model":"\xff","messages":[{}]}',
        b'{"a":"\x01","messages":[{}]}',
        b'{"a":"\\x","messages":[{}]}',
        b'{"a":1e400,"messages":[{}]}',
        b'{"a":"\x00","messages":[{}]}',
        b'{"model":7,"messages":[{}]}',
        b'{"stream":"true","messages":[{}]}',
        b'{"stream":1,"messages":[{}]}',
        b'{"messages":{}}',
        b'{"messages":"hi"}',
        b'{"messages":["hi"]}',
        b'{"messages":[7]}',
        b'{"messages":[{}],"stream_options":true}',
        b'{"messages":[{}],"stream_options":{"include_usage":"yes"}}',
        b'{"messages":[{"content":' + b"[" * 5000 + b"]" * 5000 + b"}]}",
        b"[" * 1_000_000,
    ],
)
def test_what_is_not_a_chat_document_is_refused(raw: bytes) -> None:
    error = refusal(raw)
    assert (error.status, error.message) == (400, "error processing request body")
    assert error.headers == (("x-error-request-body-processing", b"true"),)


@pytest.mark.parametrize("raw", [b"null", b"{}", b'{"messages":null}', b'{"messages":[]}'])
def test_a_chat_without_messages_is_refused(raw: bytes) -> None:
    error = refusal(raw)
    assert orjson.loads(error.body()) == {
        "error": {
            "message": "no messages in the request body",
            "type": "invalid_request_error",
            "code": None,
            "param": "messages",
        }
    }


@pytest.mark.parametrize("message", [None, {}, {"content": 7}, {"content": {"a": 1}}, {"role": 5, "content": [None]}])
def test_odd_messages_are_the_engines_to_refuse(message: object) -> None:
    assert read({"messages": [message]}).routing_text() is not None


def test_no_model_is_an_empty_name() -> None:
    assert read({"messages": [HELLO]}).model == ""
    assert read({"model": None, "messages": [HELLO]}).model == ""


def test_of_repeated_keys_the_last_counts_and_spelling_matters() -> None:
    assert read(b'{"model":"a","model":"b","messages":[{}]}').model == "b"
    assert read(b'{"model":"a","Model":"b","messages":[{}]}').model == "a"


def test_options_may_be_null() -> None:
    body = read({"model": "m", "messages": [HELLO], "stream": None, "stream_options": None})
    assert not body.stream
    assert read({"messages": [HELLO], "stream_options": {"include_usage": True}}).include_usage
    assert not read({"messages": [HELLO], "stream_options": {"include_usage": None}}).include_usage


def test_unknown_paths_are_told_before_the_body_is_looked_at() -> None:
    for path in ("/v1/chat/completions/", "/V1/chat/completions", "/v1/chat", "/", "", "/v1/models"):
        with pytest.raises(RequestError):
            read_request(path.encode(), b"application/json", b"{")
        error = refusal(b"{", path)
        assert (error.status, error.message, error.type) == (501, "unknown request path", "api_error")
        assert error.headers == (("x-error-request-body-processing", b"true"),)


def test_a_query_does_not_make_a_path_unknown() -> None:
    assert strip_query("/v1/chat/completions?api-version=1?x") == CHAT
    assert strip_query(CHAT) == CHAT


def test_a_conversation_that_goes_on_begins_with_its_old_text() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [
        {"role": "system", "content": "be brief"},
        HELLO,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "42"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
    ]
    for fields in ({}, {"tools": tools}):
        for n in range(1, len(turns)):
            assert text(*turns[: n + 1], **fields).startswith(text(*turns[:n], **fields))


def test_everything_a_template_prints_is_in_the_text() -> None:
    base = text(HELLO)
    different = [
        text({"role": "assistant", "content": "hello"}),
        text(HELLO, tools=[{"name": "f"}]),
        text({**HELLO, "name": "bob"}),
        text({**HELLO, "tool_calls": [{"id": "1"}]}),
        text({**HELLO, "reasoning_content": "hm"}),
        text(HELLO, cache_salt="a"),
    ]
    assert len({base, *different}) == 7


def test_the_system_message_comes_before_the_tools_and_both_before_the_turns() -> None:
    got = text({"role": "system", "content": "SYS"}, HELLO, tools=[{"name": "TOOL"}])
    assert got.index(b"SYS") < got.index(b"TOOL") < got.index(b"hello")


def test_the_text_of_a_small_chat_to_the_letter() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}, 4, {"type": "refusal", "refusal": "d"}]
    got = text(
        {"role": "system", "content": "SYS"}, {"role": "user", "content": parts}, None, tools=[1], cache_salt="salt"
    )
    assert got == (
        b'salt\x1e\x1esystem\x1fSYS\x1etools\x1f[1]\x1euser\x1fa\nb\nc\n4\n{"type":"refusal","refusal":"d"}\x1e'
    )


def test_text_parts_equal_plain_text() -> None:
    assert text(HELLO) == text({"role": "user", "content": [{"type": "text", "text": "hello"}]})


def test_media_stand_as_a_short_hash_of_their_content() -> None:
    def image(data: str) -> bytes:
        return text({"role": "user", "content": [{"type": "image_url", "image_url": {"url": data}}]})

    assert image("A" * 100_000) == image("A" * 100_000)
    assert image("A" * 100_000) != image("A" * 99_999 + "B")
    assert len(image("A" * 100_000)) < 100


def test_tokens_are_estimated_without_building_the_text_and_without_inline_media() -> None:
    body = read({"messages": [{"role": "user", "content": "x" * 4000}]})
    assert 1000 <= body.approximate_tokens <= 1020
    assert body._text is None
    body.routing_text()
    assert 1000 <= body.approximate_tokens <= 1010
    image = {"type": "image_url", "image_url": {"url": "data:" + "A" * 1_000_000}}
    body = read({"messages": [{"role": "user", "content": [image, {"type": "text", "text": "x" * 4000}]}]})
    assert 1500 <= body.approximate_tokens <= 1600
    body.routing_text()
    assert 1500 <= body.approximate_tokens <= 1600


def test_a_value_nested_too_deep_to_print_does_no_harm() -> None:
    deep = b'{"messages":[{"role":"user","content":' + b"[" * 900 + b"]" * 900 + b"}]}"
    assert read(deep).routing_text()
