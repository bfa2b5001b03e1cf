"""Traces: what is read, and that block names are equal exactly where texts are."""

import gzip
from pathlib import Path

import pytest

from bench.replay.traces import TraceError, TraceRequest, read_mooncake

LINES = (
    b'{"timestamp": 2000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 9]}\n'
    b'{"timestamp": 500, "input_length": 700, "output_length": 7, "hash_ids": [0, 2]}\n'
)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_mooncake_trace_is_read_in_order_of_time_from_zero(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(LINES) if zipped else LINES)
    first, second = read_mooncake(path)
    assert (first.at, first.prompt_tokens, first.output_tokens, list(first.ids)) == (0.0, 700, 7, [0, 2])
    assert (second.at, second.prompt_tokens, second.output_tokens, list(second.ids)) == (1.5, 1100, 5, [0, 1, 9])
    assert len(read_mooncake(path, limit=1)) == 1


@pytest.mark.parametrize("text", ["no json", "[]", '{"timestamp": 1}', '{"timestamp":1,"input_length":"x"}'])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(LINES.decode() + text + "\n")
    with pytest.raises(TraceError, match=r"trace\.jsonl:3: not a request"):
        read_mooncake(path)


def test_an_empty_file_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(TraceError, match="holds no request"):
        read_mooncake(tmp_path / "empty")
    with pytest.raises(TraceError, match="cannot be read"):
        read_mooncake(tmp_path / "missing")


def shared(a: TraceRequest, b: TraceRequest, block_tokens: int) -> int:
    """Leading blocks with the same names."""
    pairs = zip(
        a.block_names(block_tokens, a.prompt_tokens), b.block_names(block_tokens, b.prompt_tokens), strict=False
    )
    return next((i for i, (x, y) in enumerate(pairs) if x != y), -1)


@pytest.mark.parametrize(("block_tokens", "blocks"), [(16, 64), (48, 21), (64, 16), (512, 2), (1024, 1)])
def test_the_same_pieces_give_the_same_blocks_of_any_size(block_tokens: int, blocks: int) -> None:
    """Two pieces of 512 tokens are shared: 1024 tokens."""
    a = TraceRequest(0, 2048, 1, [5, 6, 7, 8])
    b = TraceRequest(0, 2048, 1, [5, 6, 9, 10])
    assert shared(a, b, block_tokens) == blocks
    names = a.block_names(block_tokens, a.prompt_tokens)
    assert len(names) == len(set(names)) == 2048 // block_tokens
    assert all(0 <= name < 1 << 64 for name in names)


def test_pieces_of_any_length() -> None:
    a = TraceRequest(0, 300, 50, [1, 2, 3], [100, 200, 50])
    b = TraceRequest(0, 220, 50, [1, 4], [100, 170])
    assert shared(a, b, 10) == 10
    assert shared(a, b, 64) == 1  # the second block holds tokens of the piece that differs
    assert len(a.block_names(64, 300)) == 4
    assert len(a.block_names(64, 350)) == 5  # names of the answer
    assert a.block_names(64, 63) == []


def test_only_whole_blocks_of_the_prompt_have_names() -> None:
    assert len(TraceRequest(0, 700, 1, [1, 2]).block_names(64, 700)) == 10
