from itertools import pairwise

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.usage import PARSED_WHOLE, SseUsage, Usage, read_reply


def event(document: object, newline: bytes = b"\n", name: str = "") -> bytes:
    head = f"event: {name}".encode() + newline if name else b""
    return head + b"data: " + orjson.dumps(document) + newline + newline


def token(text: str, **fields: object) -> bytes:
    return event({"id": "c", "object": "chat.completion.chunk", "choices": [{"delta": {"content": text}}], **fields})


USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
DONE = b"data: [DONE]\n\n"
OPENAI = token("héllo 🙂") + token('say "usage": {"total_tokens": 99}') + event({"choices": [], "usage": USAGE}) + DONE
CONTINUOUS = b"".join(
    token("x", usage={"prompt_tokens": 11, "completion_tokens": n, "total_tokens": 11 + n}) for n in range(1, 8)
)
ANTHROPIC = (
    event(
        {"type": "message_start", "message": {"usage": {"input_tokens": 11, "output_tokens": 1}}}, name="message_start"
    )
    + event({"type": "content_block_delta", "delta": {"text": '"usage"'}}, name="content_block_delta")
    + b"event: ping\ndata: {}\n\n"
    + event({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 7}}, name="message_delta")
    + event({"type": "message_stop"}, name="message_stop")
)
RESPONSES = event({"type": "response.created", "response": {"usage": None}}) + event(
    {"type": "response.completed", "response": {"usage": {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}}}
)
MULTILINE = b': keep-alive\r\n\r\nid: 1\r\ndata: {"choices": [],\r\ndata: "usage": {"prompt_tokens": 11,\r\n' + (
    b'data: "completion_tokens": 7, "total_tokens": 18}}\r\n\r\ndata: [DONE]\r\n\r\n'
)
WHOLE = Usage(11, 7, 18, -1)
STREAMS = {
    "openai": OPENAI,
    "crlf": OPENAI.replace(b"\n", b"\r\n"),
    "cr": OPENAI.replace(b"\n", b"\r"),
    "blanks": OPENAI.replace(b"data: {", b"  data:   {"),
    "no blank before data": OPENAI.replace(b"data: ", b"data:"),
    "continuous": CONTINUOUS + DONE,
    "one line each": OPENAI.replace(b"\n\n", b"\n"),
    "anthropic": ANTHROPIC,
    "responses": RESPONSES,
    "several data lines": MULTILINE,
    "null usage": token("x", usage=None) * 3 + event({"usage": USAGE}) + DONE,
    "comments": b':\n\n: usage "usage"\n\n' + OPENAI,
}


@pytest.mark.parametrize("name", STREAMS)
def test_cut_in_two_anywhere_it_reads_the_same(name: str) -> None:
    stream = STREAMS[name]
    for at in range(len(stream) + 1):
        reader = SseUsage()
        reader.feed(stream[:at])
        reader.feed(stream[at:])
        if name != "one line each":
            assert reader.usage == WHOLE and not reader._tail, "known before the end, and nothing kept"
        assert reader.finish() == WHOLE, stream[:at]
        assert reader.done and not reader.malformed and not reader.overflowed


@pytest.mark.parametrize("name", STREAMS)
def test_fed_byte_by_byte_it_reads_the_same(name: str) -> None:
    reader = SseUsage()
    for byte in STREAMS[name]:
        reader.feed(bytes([byte]))
    if name != "one line each":
        assert reader.usage == WHOLE and not reader._tail
    assert reader.finish() == WHOLE


@settings(deadline=None)
@given(st.sampled_from(sorted(STREAMS)), st.lists(st.integers(0, 1000), max_size=12))
def test_cut_anywhere_it_reads_the_same(name: str, cuts: list[int]) -> None:
    stream = STREAMS[name]
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    reader = SseUsage()
    for start, end in pairwise(places):
        reader.feed(stream[start:end])
    assert reader.finish() == WHOLE


def test_the_usage_is_known_as_soon_as_its_event_has_passed() -> None:
    reader = SseUsage()
    reader.feed(OPENAI.removesuffix(DONE))
    assert reader.usage == WHOLE
    assert not reader.done
    reader.feed(DONE)
    assert reader.done


def test_continuous_usage_is_not_the_end() -> None:
    reader = SseUsage()
    reader.feed(CONTINUOUS[:300])
    assert reader.usage is not None and reader.usage.completion_tokens < 7
    assert not reader.done


def test_a_stream_that_ends_without_its_last_newlines_counts() -> None:
    reader = SseUsage()
    reader.feed(b"data: " + orjson.dumps({"usage": USAGE}))
    assert reader.usage is None
    assert reader.finish() == WHOLE


def test_nothing_after_the_end_counts() -> None:
    reader = SseUsage()
    reader.feed(OPENAI + event({"usage": {"total_tokens": 5}}))
    assert reader.finish() == WHOLE


@pytest.mark.parametrize(
    "content",
    ["usage", '"usage"', '{"usage": {"total_tokens": 9}}', '\n\ndata: {"usage":{"total_tokens":9}}\n\n', "[DONE]"],
)
def test_what_a_model_writes_is_not_its_usage(content: str) -> None:
    reader = SseUsage()
    reader.feed(token(content))
    assert reader.finish() is None
    assert not reader.done and not reader.malformed


@pytest.mark.parametrize(
    ("usage", "wanted"),
    [
        ({"prompt_tokens": "11", "completion_tokens": 7.0, "total_tokens": "18"}, WHOLE),
        ({"prompt_tokens": 11, "completion_tokens": 7}, WHOLE),
        ({"input_tokens": 11, "output_tokens": 7}, WHOLE),
        ({**USAGE, "prompt_tokens_details": {"cached_tokens": 4}}, Usage(11, 7, 18, 4)),
        (
            {"input_tokens": 1, "cache_read_input_tokens": 8, "cache_creation_input_tokens": 2, "output_tokens": 7},
            Usage(11, 7, 18, 8),
        ),
        ({"prompt_tokens": 11, "total_tokens": 11}, Usage(11, 0, 11, -1)),
        ({"total_tokens": 1e30, "prompt_tokens": -5}, None),
        ({"total_tokens": True}, None),
        ({"total_tokens": "x", "prompt_tokens": None}, None),
        ({}, None),
        (None, None),
        ([], None),
        (7, None),
    ],
)
def test_the_forms_of_usage(usage: object, wanted: Usage | None) -> None:
    reader = SseUsage()
    reader.feed(event({"usage": usage}))
    assert reader.finish() == wanted
    assert read_reply(orjson.dumps({"model": "m", "usage": usage}))[0] == wanted


def test_counts_are_bounded() -> None:
    usage = read_reply(b'{"usage":{"total_tokens":18446744073709551615}}')[0]
    assert usage is not None and usage.total_tokens == 1 << 40


def test_broken_json_is_noted_and_passed_over() -> None:
    reader = SseUsage()
    reader.feed(b'data: {"type": [], "usage": 1}\n\n')
    assert not reader.malformed
    reader.feed(b'data: {"usage": {\n\n' + OPENAI)
    assert reader.finish() == WHOLE
    assert reader.malformed


def test_an_endless_line_takes_bounded_memory() -> None:
    reader = SseUsage(limit=1000)
    for _ in range(1000):
        reader.feed(b"data: " + b"x" * 100)
        assert len(reader._tail) <= 4200
    reader.feed(b"\n\n" + OPENAI)
    assert reader.overflowed
    assert reader.finish() == WHOLE


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n", b""])
@pytest.mark.parametrize("step", [1, 700, 100_000])
def test_of_a_long_last_event_the_usage_at_its_end_is_read(ending: bytes, step: int) -> None:
    response = {
        "output": "x" * 20_000,
        "tools": [{"usage": {}}],
        "usage": {**USAGE, "d": {"cached_tokens": 1}},
        "user": None,
    }
    stream = (
        RESPONSES[:80] + b"\n\ndata: " + orjson.dumps({"type": "response.completed", "response": response}) + ending
    )
    reader = SseUsage(limit=1000)
    for start in range(0, len(stream), step):
        reader.feed(stream[start : start + step])
    assert reader.finish() == WHOLE
    assert not reader.overflowed


def test_endless_events_take_bounded_memory_and_are_read_line_by_line() -> None:
    reader = SseUsage(limit=1000)
    for _ in range(100):
        reader.feed(b"data: {}\n" * 10)
        assert len(reader._tail) <= 1200
    assert not reader.overflowed
    reader.feed(OPENAI)
    assert reader.finish() == WHOLE


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [b"data:", b" ", b"\n", b"\r", b'"usage"', b":", b"{", b"}", b"[DONE]", b"1", b"\xff", b"message_stop"]
        ),
        max_size=60,
    ),
    st.integers(1, 7),
)
def test_no_stream_breaks_the_reader(pieces: list[bytes], step: int) -> None:
    stream = b"".join(pieces)
    reader = SseUsage(limit=40)
    for start in range(0, len(stream), step):
        reader.feed(stream[start : start + step])
        assert len(reader._tail) <= 4096
    reader.finish()


def test_a_reply_is_read_whole() -> None:
    usage, document = read_reply(orjson.dumps({"model": "m", "usage": USAGE}))
    assert usage == WHOLE
    assert document is not None and document["model"] == "m"


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"7", b"{", b"\x1f\x8b\x00", b"data: {}\n\n", b"[" * 100_000])
def test_replies_that_are_nothing(body: bytes) -> None:
    assert read_reply(body) == (None, None)


def test_of_a_large_reply_only_the_usage_is_read() -> None:
    reply = b'{"data":[' + b"0.125," * (PARSED_WHOLE // 6) + b'0],"usage":%b,"model":"m"}'
    assert read_reply(reply % orjson.dumps({**USAGE, "d": {"a": 1}})) == (WHOLE, None)
    for broken in (b'{"a":', b'"x"', b"{" * 10_000, b"{1}"):
        assert read_reply(reply % broken) == (None, None)
    assert read_reply(reply.replace(b"usage", b"usual")) == (None, None)
