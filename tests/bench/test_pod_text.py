"""Tokens, block hashes and answers of simulated pods."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import pod_text


@given(st.binary(max_size=200))
def test_as_many_tokens_as_counted(text: bytes) -> None:
    assert len(pod_text.tokens(text)) == pod_text.count_tokens(text) == (len(text) + 3) // 4


@given(st.binary(max_size=400), st.binary(max_size=100), st.integers(1, 8))
def test_texts_share_the_hashes_of_the_blocks_they_share(text: bytes, more: bytes, block_tokens: int) -> None:
    short, long = (pod_text.block_hashes(t, block_tokens, "m") for t in (text, text + more))
    assert len(short) == len(text) // (4 * block_tokens)
    assert long[: len(short)] == short
    assert not set(short) & set(pod_text.block_hashes(text, block_tokens, "other"))


def test_a_block_is_named_by_all_that_stands_before_it() -> None:
    a = pod_text.block_hashes(b"aaaabbbbcccc", 1, "m")
    b = pod_text.block_hashes(b"xxxxbbbbcccc", 1, "m")
    assert not set(a) & set(b)


def test_token_ids_are_tokens() -> None:
    assert pod_text.count_tokens(pod_text.from_token_ids([1, 2, 3])) == 3
    assert pod_text.tokens(pod_text.from_token_ids([1, 70000, 3])) == [1, 70000, 3]


def test_next_turn_begins_with_this_turn_and_its_answer() -> None:
    turn = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompt = pod_text.render_chat(turn)
    following = [*turn, {"role": "assistant", "content": "Because."}, {"role": "user", "content": "Really?"}]
    assert pod_text.render_chat(following).startswith(prompt + b"Because.")


def test_chat_content_may_be_parts_or_null() -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:xyz"}}]
    text = pod_text.render_chat([{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    assert b"look" in text and b"data:xyz" in text


@pytest.mark.parametrize("message", ["text", {"content": "no role"}, {"role": "user", "content": 5}])
def test_messages_of_another_shape_are_refused(message: object) -> None:
    with pytest.raises(ValueError, match="message"):
        pod_text.render_chat([message])


def test_answers_are_joined_from_pieces_and_wrap_around() -> None:
    offset = (1 << 14) - 3
    whole = pod_text.answer_text(offset, 0, 40_000)
    assert len(whole) == 160_000
    assert pod_text.answer_text(offset, 0, 2) + pod_text.answer_text(offset, 2, 40_000) == whole
    assert pod_text.count_tokens(whole.encode()) == 40_000
    assert set(whole) <= set("abcdefghijklmnopqrstuvwxyz ")


def test_lengths_have_the_mean_asked_for_and_depend_on_the_prompt_alone() -> None:
    answers, again = pod_text.Answers(200, seed=3), pod_text.Answers(200, seed=3)
    drawn = [answers.draw(b"%d" % i, 0) for i in range(4000)]
    assert drawn == [again.draw(b"%d" % i, 0) for i in range(4000)]
    assert 190 < sum(length for length, _ in drawn) / len(drawn) < 210
    assert answers.draw(b"1", 1) != answers.draw(b"1", 0)
    assert pod_text.Answers(200, seed=4).draw(b"1", 0) != answers.draw(b"1", 0)
