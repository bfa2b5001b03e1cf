"""Equal prefixes of text are equal leading hashes, and nothing else is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.prefix_hash import BLOCK_BYTES, LARGEST_BLOCK_BYTES, PrefixHasher, block_bytes_for

HASHER = PrefixHasher(seed=7)
SMALL = st.binary(max_size=400)


def common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@settings(max_examples=300, deadline=None)
@given(shared=SMALL, a=SMALL, b=SMALL, block=st.sampled_from([8, 16, 64]))
def test_equal_leading_blocks_are_exactly_equal_leading_hashes(shared: bytes, a: bytes, b: bytes, block: int) -> None:
    one, two = shared + a, shared + b
    equal_bytes = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
    first, second = HASHER.chain(one, "m", block).hashes, HASHER.chain(two, "m", block).hashes
    assert common(first, second) == equal_bytes // block
    assert len(first) == len(one) // block


@settings(max_examples=100, deadline=None)
@given(text=st.binary(min_size=64, max_size=400), position=st.integers(0, 399))
def test_a_changed_byte_changes_its_block_and_all_after_it(text: bytes, position: int) -> None:
    position %= len(text)
    changed = bytearray(text)
    changed[position] ^= 1
    before, after = HASHER.chain(text, "m", 16).hashes, HASHER.chain(bytes(changed), "m", 16).hashes
    block = position // 16
    assert before[:block] == after[:block]
    assert not set(before[block:]) & set(after[block:])


def test_models_adapters_and_fleets_never_share() -> None:
    text = b"x" * 4096
    chains = [
        PrefixHasher(seed).chain(text, model).hashes for seed in (1, 2) for model in ("llama", "llama-sql-adapter")
    ]
    assert len({h for chain in chains for h in chain}) == 4 * 16


def test_repeated_blocks_have_different_hashes() -> None:
    assert len(set(HASHER.chain(b"same" * 1024, "m").hashes)) == 16


def test_the_packed_form_is_the_numbers_little_endian() -> None:
    chain = HASHER.chain(b"abcd" * 512, "m")
    assert chain.packed == b"".join(h.to_bytes(8, "little") for h in chain.hashes)
    assert len(chain) == len(chain.hashes) == 8


def test_what_is_longer_than_the_bound_is_not_hashed() -> None:
    assert len(PrefixHasher(max_blocks=10).chain(b"y" * 1_000_000, "m")) == 10


@pytest.mark.parametrize("length", [0, 1, BLOCK_BYTES - 1])
def test_a_text_shorter_than_a_block_has_no_hashes(length: int) -> None:
    assert len(HASHER.chain(b"z" * length, "m")) == 0


@pytest.mark.parametrize(
    ("engine_block", "expected"),
    [(float("nan"), 256), (16, 256), (64, 256), (65, 512), (128, 512), (256, 1024), (100_000, LARGEST_BLOCK_BYTES)],
)
def test_block_size_follows_the_engine_in_powers_of_two(engine_block: float, expected: int) -> None:
    assert block_bytes_for(engine_block) == expected
