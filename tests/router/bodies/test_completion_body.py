from functools import partial

import pytest
from json_body import read_json

from router.errors import RequestError

read = partial(read_json, "/v1/completions")


def test_a_string_is_its_own_text() -> None:
    body = read({"model": "m", "prompt": "once upon a time", "max_tokens": 3, "stream": True})
    assert (body.kind, body.model, body.stream, body.max_tokens) == ("completion", "m", True, 3)
    assert body.routing_text() == b"once upon a time"


@pytest.mark.parametrize("raw", [b"null", b"{}", b'{"prompt":null}', b'{"prompt":""}'])
def test_no_prompt_is_empty_text(raw: bytes) -> None:
    assert read(raw).routing_text() == b""


def test_prompts_in_a_list_follow_each_other() -> None:
    assert read({"prompt": ["ab", "cd"]}).routing_text() == b"ab\x1ecd"


def test_token_ids_are_counted_exactly() -> None:
    body = read({"prompt": [1, 2, 70000]})
    assert body.approximate_tokens == 3
    assert body.routing_text() == b"\1\0\0\0\2\0\0\0p\x11\1\0"
    body = read({"prompt": [[1, 2], [3]]})
    assert body.approximate_tokens == 3
    assert read({"prompt": [1, 2, 3]}).routing_text().startswith(read({"prompt": [1, 2]}).routing_text())


def test_embeds_count_by_their_content() -> None:
    assert read({"prompt_embeds": "AAAA"}).routing_text() != read({"prompt_embeds": "AAAB"}).routing_text()


@pytest.mark.parametrize("prompt", [7, True, {}, 1.5])
def test_other_types_are_refused_as_the_original_does(prompt: object) -> None:
    with pytest.raises(RequestError, match=r"^error processing request body$"):
        read({"prompt": prompt})


@pytest.mark.parametrize("prompt", [[1, "a"], ["a", 1], [1.5], [[1, "a"]], [[1], "a"], [[1], 2], [-1], [2**32], [None]])
def test_mixed_lists_are_refused(prompt: object) -> None:
    with pytest.raises(RequestError, match="'prompt' must be"):
        read({"prompt": prompt})


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(RequestError, match="'prompt' array cannot be empty"):
        read({"prompt": []})


def test_wrong_types_are_refused() -> None:
    for document in ({"model": 1}, {"stream": "x"}, []):
        with pytest.raises(RequestError, match="error processing request body"):
            read(document)


def test_an_odd_stream_option_is_the_engines_to_refuse() -> None:
    assert not read({"stream_options": 7}).include_usage
    assert read({"stream_options": {"include_usage": True}}).include_usage
