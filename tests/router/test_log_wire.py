"""Reading log entries where they lie gives what a protobuf parser gives, or leaves it to one."""

from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.access_log_pb2 import HTTPAccessLogEntry, StreamAccessLogsMessage
from router import log_wire
from router.replies import ENVOY_LB, NAMESPACE

REAL = Path(__file__).parents[1] / "fixtures" / "envoy-1.40" / "access-log.bin"
"""What Envoy 1.40 sent after three requests, without the identifier that its first message of a stream begins with."""

Read = tuple[bytes, bytes, int, bool] | None
TEXTS = st.text(st.characters(codec="utf-8"), max_size=130)
# Fields that nobody reads: number and wire type 0 (varint), 1 (8 bytes), 2 (length and bytes) or 5 (4 bytes).
OTHERS = st.tuples(
    st.sampled_from([18, 19, 20, 24, 26, 29, 40]), st.sampled_from([0, 1, 2, 5]), st.binary(min_size=8, max_size=200)
)


def field(number: int, wire_type: int, payload: bytes) -> bytes:
    value = {0: varint(payload[0] << 9), 1: payload[:8], 2: varint(len(payload)) + payload, 5: payload[:4]}
    return varint(number << 3 | wire_type) + value[wire_type]


def varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def where_it_lies(message: bytes) -> Read:
    found = log_wire.read(message, 0, len(message))
    return None if found is None else (found.ticket, found.pod, found.code, found.had_pod)


def parsed(message: bytes) -> Read:
    entry = HTTPAccessLogEntry.FromString(message)
    common = entry.common_properties
    fields = common.metadata.filter_metadata[NAMESPACE].fields
    return (
        fields["ticket"].string_value.encode(),
        fields["pod"].string_value.encode(),
        entry.response.response_code.value,
        bool(common.upstream_remote_address.socket_address.address),
    )


def entry(
    fields: dict[str, str], code: int = 200, address: str = "10.0.0.1", others: dict[str, str] | None = None
) -> HTTPAccessLogEntry:
    made = HTTPAccessLogEntry()
    common = made.common_properties
    if address:
        common.upstream_remote_address.socket_address.address = address
        common.upstream_remote_address.socket_address.port_value = 8000
    if code:
        made.response.response_code.value = code
    for name, value in fields.items():
        common.metadata.filter_metadata[NAMESPACE].fields[name].string_value = value
    for name, value in (others or {}).items():
        common.metadata.filter_metadata["another"].fields[name].string_value = value
    common.duration.nanos = 1_234_567
    return made


def test_entries_of_a_real_envoy() -> None:
    message = REAL.read_bytes()
    places = log_wire.entries(message)
    assert places is not None
    assert [where_it_lies(message[start:end]) for start, end in places] == [
        parsed(message[start:end]) for start, end in places
    ]
    first = StreamAccessLogsMessage.FromString(message).http_logs.log_entry[0].SerializeToString()
    ticket, pod, code, had_pod = where_it_lies(first) or (b"", b"", 0, False)
    assert (ticket.count(b"."), pod[:11], code, had_pod) == (3, b"llama-3-8b-", 200, True)


def test_an_identifier_before_them_is_passed_over() -> None:
    message = b"\x0a\x03abc" + REAL.read_bytes()
    places = log_wire.entries(message)
    assert places is not None
    assert len(places) == 3
    assert log_wire.entries(b"") == []


@given(
    st.dictionaries(st.sampled_from(["ticket", "pod", "target", "request-id", "strategy", "x"]), TEXTS, max_size=6),
    st.integers(0, 1000),
    st.sampled_from(["", "10.0.0.1", "fd00::1"]),
    st.dictionaries(st.sampled_from(["ticket", "pod"]), TEXTS, max_size=2),
    st.lists(OTHERS, max_size=5),
)
def test_an_entry_is_what_a_parser_finds(
    fields: dict[str, str],
    code: int,
    address: str,
    others: dict[str, str],
    unknown: list[tuple[int, int, bytes]],
) -> None:
    made = entry(fields, code, address, others)
    more = b"".join(field(*each) for each in unknown)
    common = made.common_properties.SerializeToString()
    made.ClearField("common_properties")
    message = b"\x0a" + varint(len(common + more)) + common + more + made.SerializeToString() + more
    found = where_it_lies(message)
    if found is not None:
        assert found == parsed(message)
    else:
        assert any(len((name + value).encode()) > 110 for name, value in fields.items()) or 0 < code < 128


@given(st.data(), st.integers(0, 2))
def test_whatever_comes_is_read_rightly_or_left_to_the_parser(data: st.DataObject, number: int) -> None:
    message = bytearray(REAL.read_bytes())
    places = log_wire.entries(bytes(message))
    assert places is not None
    start, end = places[number]
    broken = message[start:end]
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change":
            broken[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del broken[at : at + data.draw(st.integers(1, 40))]
            broken += b"\0"
        else:
            broken[at:at] = data.draw(st.binary(max_size=5))
    found = where_it_lies(bytes(broken))
    if found is not None:
        try:
            expected = parsed(bytes(broken))
        except DecodeError:
            return  # of a part that is not read
        assert found == expected


@given(st.binary(max_size=300))
def test_any_bytes_are_taken(message: bytes) -> None:
    log_wire.entries(message)
    log_wire.read(message, 0, len(message))


def test_what_a_client_writes_is_no_ticket() -> None:
    feigned = entry({"ticket": "evil.0.1.5"}).common_properties.metadata.SerializeToString()
    made = entry({"ticket": "here.0.1.7", "request-id": feigned.decode("latin-1")}).SerializeToString()
    common = field(26, 2, feigned) + field(21, 2, b"\x8a\x01" + varint(len(feigned)) + feigned)
    message = made + field(3, 2, field(5, 2, feigned))
    assert (where_it_lies(message) or ())[0] == b"here.0.1.7"
    made_with = entry({"ticket": "here.0.1.7"})
    whole = made_with.common_properties.SerializeToString() + common
    assert (where_it_lies(b"\x0a" + varint(len(whole)) + whole) or ())[0] == b"here.0.1.7"


@pytest.mark.parametrize("what", ["flags", "retry", "twice", "pipe", "number"])
def test_what_is_not_as_usual_is_left_to_the_parser(what: str) -> None:
    made = entry({"ticket": "a.0.1.5"})
    common = made.common_properties
    if what == "flags":
        common.response_flags.upstream_connection_failure = True
    elif what == "retry":
        common.metadata.filter_metadata[ENVOY_LB].fields["endpoint"].string_value = "10.0.0.1:8000"
    elif what == "number":
        common.metadata.filter_metadata[NAMESPACE].fields["pod"].number_value = 5
    message = made.SerializeToString()
    if what == "twice":
        message += message
    elif what == "pipe":
        message = message.replace(b"\x0a\x0d\x12\x08", b"\x12\x0d\x12\x08")
    assert where_it_lies(message) is None
