"""Equal prefixes of text are equal leading hashes, and nothing else is."""

import struct
from types import FunctionType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from router import prefix_hash
from router.prefix_hash import BLOCK_BYTES, LARGEST_BLOCK_BYTES, Chain, PrefixHasher, block_bytes_for

HASHER = PrefixHasher(seed=7)
SMALL = st.binary(max_size=400)


def hashes(chain: Chain) -> list[int]:
    return list(struct.unpack(f"<{len(chain)}Q", chain.packed))


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
    first, second = hashes(HASHER.chain(one, "m", block)), hashes(HASHER.chain(two, "m", block))
    assert common(first, second) == equal_bytes // block
    assert len(first) == len(one) // block


@settings(max_examples=100, deadline=None)
@given(text=st.binary(min_size=64, max_size=400), position=st.integers(0, 399))
def test_a_changed_byte_changes_its_block_and_all_after_it(text: bytes, position: int) -> None:
    position %= len(text)
    changed = bytearray(text)
    changed[position] ^= 1
    before, after = hashes(HASHER.chain(text, "m", 16)), hashes(HASHER.chain(bytes(changed), "m", 16))
    block = position // 16
    assert before[:block] == after[:block]
    assert not set(before[block:]) & set(after[block:])


def test_models_adapters_and_fleets_never_share() -> None:
    text = b"x" * 4096
    chains = [
        hashes(PrefixHasher(seed).chain(text, model)) for seed in (1, 2) for model in ("llama", "llama-sql-adapter")
    ]
    assert len({h for chain in chains for h in chain}) == 4 * 16


def test_repeated_blocks_have_different_hashes() -> None:
    assert len(set(hashes(HASHER.chain(b"same" * 1024, "m")))) == 16


def plain(text: bytes, model: str, seed: int, block: int) -> list[int]:
    """The definition."""
    h = xxh3_64_intdigest(model.encode(), seed ^ block)
    found = []
    for start in range(0, len(text) - block + 1, block):
        h = xxh3_64_intdigest(text[start : start + block], h)
        found.append(h)
    return found


WORDS = st.lists(st.sampled_from([b"to be or ", b"not to be", b"\x00" * 9]), max_size=90).map(b"".join)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.tuples(WORDS, st.sampled_from(["m", "n"])), min_size=1, max_size=8), keep=st.integers(0, 90))
def test_what_is_kept_changes_no_hash(texts: list[tuple[bytes, str]], keep: int) -> None:
    hasher = PrefixHasher(seed=3, keep_blocks=keep)
    for text, model in texts * 2:
        chain = hasher.chain(text, model, 9)
        assert hashes(chain) == plain(text, model, 3, 9)
        assert len(chain) == len(text) // 9
        assert hasher.kept_blocks <= max(keep, 32)  # one piece is always kept


def test_a_known_prefix_costs_one_hash_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counted(text: bytes, seed: int = 0) -> int:
        hashed.append(len(text))
        return xxh3_64_intdigest(text, seed)

    if not isinstance(vars(prefix_hash)["PrefixHasher"].chain, FunctionType):
        pytest.skip("compiled code does not look its functions up")
    monkeypatch.setattr(prefix_hash, "xxh3_64_intdigest", counted)
    hasher = PrefixHasher(seed=5)
    text = bytes(range(256)) * 200
    hasher.chain(text, "m")
    hashed.clear()
    assert len(hasher.chain(text + b"and so on" * 100, "m")) == 203
    sizes = [size // BLOCK_BYTES for size in hashed]
    assert sizes == [8, 8, 16, 32, 32, 32, 32, 32, *([1] * 11)]


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
