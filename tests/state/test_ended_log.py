"""Ends of others' requests: read once, as they were put down, each for its replica."""

from state.ended_log import RING_BYTES, EndedLog

REPLICA = "00c0ffee"


def logs(writers: int = 3) -> tuple[EndedLog, EndedLog, EndedLog]:
    """Those of two workers and a reader."""
    region = memoryview(bytearray(EndedLog.size(writers)))
    return EndedLog(region, writers, 0), EndedLog(region, writers, 1), EndedLog(region, writers)


def test_entries_are_read_once_each_for_its_replica() -> None:
    one, two, reader = logs()
    entries = [bytes([length]) * length for length in range(1, 18)]  # of any length, whole hashes or not
    for number, entry in enumerate(entries):
        one.append(f"{number:08x}", entry, 1.0)
    two.append("ffffffff", b"", 1.0)
    assert reader.read(100) == [(f"{n:08x}", entry) for n, entry in enumerate(entries)] + [("ffffffff", b"")]
    assert reader.read(100) == []


def test_what_is_no_replica_is_passed_over() -> None:
    one, _, reader = logs()
    for replica in ("", "c0ffee", "00C0FFEE", "-0c0ffee", "00c0ffee0"):
        one.append(replica, b"entry", 1.0)
    assert reader.read(100) == []


def test_an_entry_longer_than_a_segment_is_passed_over() -> None:
    one, _, reader = logs()
    longest = 8 * one._log.max_hashes - 4
    one.append(REPLICA, b"x" * (longest + 1), 1.0)
    one.append(REPLICA, b"x" * RING_BYTES, 1.0)
    one.append(REPLICA, b"y" * longest, 1.0)
    assert reader.read(100) == [(REPLICA, b"y" * longest)]


def test_a_reader_may_pass_over_what_is_there_already() -> None:
    one, _, reader = logs()
    one.append(REPLICA, b"before", 1.0)
    reader.skip()
    one.append(REPLICA, b"after", 1.0)
    assert reader.read(100) == [(REPLICA, b"after")]
