"""What replicas tell each other: read as it was written, and refused where it cannot be."""

import contextlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from state.updates import (
    LOADS,
    USERS,
    PromptUpdate,
    UpdateError,
    pod_key,
    read_loads,
    read_routed,
    read_users,
    write_routed,
    write_users,
)
from state.user_tokens import CELLS, ROWS

U64 = st.integers(0, 2**64 - 1)
PROMPTS = st.builds(
    PromptUpdate,
    pod=U64,
    started=U64,
    age=st.floats(0, 1e6, width=32),
    block_bytes=st.sampled_from([1, 64, 4096]),
    hashes=st.binary(max_size=40).map(lambda text: text[: len(text) // 8 * 8]),
)


@given(st.lists(PROMPTS, max_size=6))
def test_prompts_are_read_as_they_were_written(prompts: list[PromptUpdate]) -> None:
    assert list(read_routed(b"".join(map(write_routed, prompts)))) == prompts


@given(st.binary(max_size=200))
def test_any_bytes_are_prompts_or_refused(update: bytes) -> None:
    try:
        read = list(read_routed(update))
    except UpdateError:
        return
    assert b"".join(map(write_routed, read)) == update


@pytest.mark.parametrize(
    "prompt",
    [
        PromptUpdate(1, 1, -1.0, 64, b""),
        PromptUpdate(1, 1, float("nan"), 64, b""),
        PromptUpdate(1, 1, float("inf"), 64, b""),
        PromptUpdate(1, 1, 0.0, 0, b""),
        PromptUpdate(1, 1, 0.0, 63, b""),
    ],
)
def test_prompts_that_cannot_be_are_refused(prompt: PromptUpdate) -> None:
    with pytest.raises(UpdateError):
        list(read_routed(write_routed(prompt)))


def test_a_prompt_that_is_cut_off_is_refused() -> None:
    update = write_routed(PromptUpdate(1, 1, 0.0, 64, bytes(16)))
    for length in range(1, len(update)):
        with pytest.raises(UpdateError):
            list(read_routed(update[:length]))


@given(st.binary(max_size=200))
def test_any_bytes_are_loads_or_refused(update: bytes) -> None:
    try:
        rows = read_loads(update)
    except UpdateError:
        return
    assert len(rows) * LOADS.itemsize == len(update)
    assert (rows["wait"] >= 0).all()


def test_a_wait_that_is_no_time_is_refused() -> None:
    rows = np.zeros(1, LOADS)
    for wait in (-1.0, np.nan, np.inf):
        rows["wait"] = wait
        with pytest.raises(UpdateError):
            read_loads(rows.tobytes())


def test_pods_are_told_apart_by_their_address() -> None:
    assert pod_key("10.0.0.1:8000") == pod_key("10.0.0.1:8000") != pod_key("10.0.0.1:8001")


USED = st.dictionaries(st.integers(0, ROWS * CELLS - 1), st.floats(1, 1e9, width=32), max_size=20)


@given(USED)
def test_what_users_used_is_read_as_it_was_written(used: dict[int, float]) -> None:
    totals = np.zeros(ROWS * CELLS)
    for cell, tokens in used.items():
        totals[cell] = tokens
    update = write_users(totals.reshape(ROWS, CELLS))
    assert len(update) == USERS.itemsize * len(used)
    assert (read_users(update).ravel() == totals).all()


@given(st.binary(max_size=60))
@example(b"\0\0\0\0\xa0\x7f")  # a signalling NaN
def test_any_bytes_are_what_users_used_or_refused(update: bytes) -> None:
    with contextlib.suppress(UpdateError):
        assert np.isfinite(read_users(update)).all()


@pytest.mark.parametrize(
    "rows",
    [[(0, -1.0)], [(0, float("nan"))], [(0, float("inf"))], [(ROWS * CELLS, 1.0)], [(7, 1.0), (7, 2.0)]],
)
def test_what_nobody_can_have_used_is_refused(rows: list[tuple[int, float]]) -> None:
    with pytest.raises(UpdateError):
        read_users(np.array(rows, USERS).tobytes())
    with pytest.raises(UpdateError):
        read_users(np.array(rows, USERS).tobytes()[:-1])
