"""Header compression: our decoder against the `hpack` library's, and the cache of blocks."""

import hpack
import pytest
from hpack import huffman_table
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.calls import Method
from workers.h2.faults import ConnectionFault
from workers.h2.frames import COMPRESSION_ERROR
from workers.h2.hpack_decoder import HpackDecoder, decode_huffman
from workers.h2.requests import RequestReader

NAMES = st.sampled_from([":path", ":method", "te", "x-a", "x-b", "content-type", "user-agent"]) | st.text(
    "abcxyz-", min_size=1, max_size=12
)
VALUES = st.sampled_from(["POST", "/", "trailers", "application/grpc"]) | st.text(
    st.characters(min_codepoint=33, max_codepoint=126), max_size=200
)


@given(st.lists(st.tuples(st.lists(st.tuples(NAMES, VALUES), max_size=12), st.booleans()), max_size=20), st.data())
@settings(max_examples=60, deadline=None)
def test_it_decodes_what_the_library_encodes(
    blocks: list[tuple[list[tuple[str, str]], bool]], data: st.DataObject
) -> None:
    encoder = hpack.Encoder()
    decoder = HpackDecoder(1 << 20)
    for fields, huffman in blocks:
        if data.draw(st.booleans()):
            encoder.header_table_size = data.draw(st.integers(0, 4096))
        decoded = decoder.decode(encoder.encode(fields, huffman=huffman))
        assert decoded is not None
        assert [(field.name, field.value) for field in decoded] == fields


@given(st.lists(st.binary(max_size=60), max_size=6))
@settings(max_examples=300, deadline=None)
def test_it_agrees_with_the_library_on_any_bytes(blocks: list[bytes]) -> None:
    library = hpack.Decoder(max_header_list_size=1 << 20)
    decoder = HpackDecoder(1 << 20)
    for block in blocks:
        try:
            expected = [(bytes(n), bytes(v)) for n, v in library.decode(block, raw=True)]
        except hpack.HPACKError:
            with pytest.raises(ConnectionFault) as caught:
                decoder.decode(block)
            assert caught.value.code == COMPRESSION_ERROR
            return
        try:
            decoded = decoder.decode(block)
        except ConnectionFault as fault:
            # The library takes more than two table size updates; RFC 7541 4.2 knows of no need for a third.
            assert "size update" in fault.reason
            return
        assert decoded is not None
        assert [(f.name.encode("latin-1"), f.value.encode("latin-1")) for f in decoded] == expected


@given(st.binary(max_size=40))
def test_huffman_code_is_read_as_the_library_reads_it(raw: bytes) -> None:
    try:
        expected = huffman_table.decode_huffman(raw)
    except hpack.HPACKError:
        with pytest.raises(ConnectionFault):
            decode_huffman(raw)
    else:
        assert decode_huffman(raw) == expected


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # index 0
        b"\xbe",  # the dynamic table is empty
        b"\xff\xff\xff\xff\xff\xff\x01",  # an integer without end
        b"\x00\x05ab",  # cut short
        b"\x40",
        b"\x00\x81\xff\x00",  # Huffman padding longer than 7 bits
        b"\x82\x20",  # a size update after a field
        b"\x3f\xe2\x1f",  # 4097
    ],
)
def test_what_cannot_be_decoded_is_a_compression_error(block: bytes) -> None:
    with pytest.raises(ConnectionFault) as caught:
        HpackDecoder(1 << 20).decode(block)
    assert caught.value.code == COMPRESSION_ERROR


def test_a_list_over_the_limit_is_none_and_still_enters_the_table() -> None:
    encoder = hpack.Encoder()
    decoder = HpackDecoder(100)
    assert decoder.decode(encoder.encode([("x-a", "v" * 80)])) is None
    assert [(f.name, f.value) for f in decoder.decode(encoder.encode([("x-b", "w")])) or ()] == [("x-b", "w")]
    assert decoder.decode(b"\xbf") is None


def literal(name: str, value: str, *, enters: bool = False) -> bytes:
    first = b"\x40" if enters else b"\0"
    return first + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


REQUEST = b"".join(
    literal(name, value)
    for name, value in [(":method", "POST"), (":scheme", "http"), (":path", "/a"), ("content-type", "application/grpc")]
)
NEWEST = b"\xbe"


def reader() -> RequestReader:
    return RequestReader({"/a": Method(lambda metadata: NotImplemented)}, 1 << 14, 4)


def test_a_repeated_block_is_decoded_once() -> None:
    requests = reader()
    requests.read(REQUEST + literal("x", "1", enters=True))
    first = requests.read(REQUEST + NEWEST)
    assert first.metadata["x"] == "1"
    assert requests.read(REQUEST + NEWEST) is first


@pytest.mark.parametrize("change", ["read", "read_trailers", "skip"])
def test_a_repeated_block_means_something_else_after_the_table_changed(change: str) -> None:
    requests = reader()
    requests.read(REQUEST + literal("x", "1", enters=True))
    assert requests.read(REQUEST + NEWEST).metadata["x"] == "1"
    start = REQUEST if change == "read" else b""
    getattr(requests, change)(start + literal("x", "2", enters=True))
    assert requests.read(REQUEST + NEWEST).metadata["x"] == "2"


def test_a_table_that_was_emptied_is_noticed() -> None:
    requests = reader()
    requests.read(REQUEST + literal("x", "1", enters=True))
    requests.read(REQUEST + NEWEST)
    requests.read(b"\x20" + REQUEST)
    with pytest.raises(ConnectionFault):
        requests.read(REQUEST + NEWEST)


def test_the_cache_is_bounded() -> None:
    requests = reader()
    for i in range(100):
        requests.read(REQUEST + literal("x", str(i)))
    assert len(requests._cache) <= 4
