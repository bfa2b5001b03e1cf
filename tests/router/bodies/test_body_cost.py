"""What reading costs. Times nothing unless asked: `pytest tests/router/bodies/test_body_cost.py --benchmark-enable`."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from router.bodies import read_body
from router.bodies.base import Body
from router.usage import SseUsage

CHAT = "/v1/chat/completions"
DOCUMENT = {
    "model": "llama-3-8b",
    "messages": [{"role": "system", "content": "s" * 1000}]
    + [{"role": "user" if turn % 2 == 0 else "assistant", "content": "word " * 120} for turn in range(5)],
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 256,
}
RAW = orjson.dumps(DOCUMENT)
CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"m","choices":'
    b'[{"index":0,"delta":{"content":" the"},"logprobs":null,"finish_reason":null}]}\n\n'
)


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda: orjson.loads(RAW), id="orjson.loads alone"),
        pytest.param(lambda: read_body(CHAT, "application/json", RAW), id="read_body"),
        pytest.param(lambda: read_body(CHAT, "application/json", RAW).approximate_tokens, id="and tokens"),
        pytest.param(lambda: read_body(CHAT, "application/json", RAW).routing_text(), id="and text"),
    ],
)
def test_four_kilobytes_of_chat(benchmark: Any, work: Callable[[], Any]) -> None:
    assert benchmark(work)


def test_a_chunk_of_a_stream(benchmark: Any) -> None:
    usage = SseUsage()
    benchmark(usage.feed, CHUNK)
    assert usage.usage is None


def test_a_form_of_one_megabyte(benchmark: Any) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + bytes(range(256)) * 4096
        + b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n'
    )
    body: Body = benchmark(read_body, "/v1/audio/transcriptions", "multipart/form-data; boundary=b", form)
    assert body.model == "whisper"
