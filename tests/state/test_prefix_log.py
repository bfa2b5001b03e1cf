"""The rings: what is written is read once, in order, whole or not at all, also while eight processes write."""

import os
import struct
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
from xxhash import xxh3_64_intdigest

from state.prefix_log import REMOTE, SEGMENTS, LogReader, PrefixLog, Routed, pod_tag
from state.segment import Segment

RING = 64 << 10


def region(writers: int = 4, ring: int = RING) -> memoryview:
    return memoryview(bytearray(PrefixLog.size(writers, ring)))


def record(number: int, blocks: int = 3) -> Routed:
    return Routed(number % 7, pod_tag(number, 1), number / 8, 256, struct.pack("<Q", number) * blocks)


def test_a_record_is_read_as_it_was_written_once() -> None:
    memory = region()
    reader = LogReader(PrefixLog(memory, 4, RING))
    written = [record(1), record(2, blocks=0), Routed(1023, pod_tag(9, 4), 1e9, 2048, b"8bytes!!" * 40, REMOTE)]
    for writer, entry in enumerate(written):
        PrefixLog(memory, 4, RING, writer).append(*entry)
    assert reader.news()
    assert reader.read() == written
    assert not reader.news()
    assert reader.read() == []


def test_records_of_one_writer_keep_their_order_over_many_laps() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 2)
    reader = LogReader(PrefixLog(memory, 4, RING))
    for number in range(5000):
        log.append(*record(number, number % 50))
        if number % 90 == 0:
            reader.read()
    assert reader.lost_bytes == 0
    assert log.heads[2] > 5 * RING
    log.append(*record(5000))
    assert reader.read()[-1] == record(5000)


def test_who_starts_late_gets_what_the_ring_still_holds() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 0)
    for number in range(5000):
        log.append(*record(number, 10))
    got = LogReader(PrefixLog(memory, 4, RING)).read()
    first = struct.unpack_from("<Q", got[0].hashes)[0]
    assert got == [record(number, 10) for number in range(first, 5000)]
    assert sum(32 + len(entry.hashes) for entry in got) >= RING * (SEGMENTS - 3) / SEGMENTS


def test_who_falls_behind_by_more_than_a_ring_loses_the_oldest_only() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 0)
    reader = LogReader(PrefixLog(memory, 4, RING))
    log.append(*record(0))
    reader.read()
    for number in range(1, 3000):
        log.append(*record(number))
    got = reader.read()
    assert got[-1] == record(2999)
    assert got == [record(number) for number in range(2999 - len(got) + 1, 3000)]
    assert reader.lost_bytes > 0


def test_a_limit_leaves_the_rest_for_later() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 0)
    reader = LogReader(PrefixLog(memory, 4, RING))
    for number in range(600):
        log.append(*record(number))
    got = []
    rounds = 0
    while reader.news():
        got += reader.read(limit=50)
        rounds += 1
    assert got == [record(number) for number in range(600)]
    assert rounds > 4


def test_a_process_reads_what_its_predecessor_wrote_and_not_what_it_writes_itself() -> None:
    memory = region()
    PrefixLog(memory, 4, RING, 1).append(*record(1))
    log = PrefixLog(memory, 4, RING, 1)
    reader = LogReader(log, own=1)
    assert reader.read() == [record(1)]
    log.append(*record(2))
    assert not reader.news()
    assert reader.read() == []


def test_a_writer_that_died_inside_a_record_leaves_nothing_behind() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 0)
    log.append(*record(1))
    head = log.heads[0]
    log._reserved[0] = head + 500  # announced, partly written, never published
    log._rings[0][head : head + 300] = b"\xff" * 300
    reader = LogReader(PrefixLog(memory, 4, RING))
    assert reader.read() == [record(1)]
    PrefixLog(memory, 4, RING, 0).append(*record(2))
    assert reader.read() == [record(2)]


def test_damaged_bytes_are_waited_for_once_and_then_given_up() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 0)
    reader = LogReader(PrefixLog(memory, 4, RING))
    log.append(*record(1))
    place = log.heads[0]
    log.append(*record(2))
    log.append(*record(3))
    log._rings[0][place + 40] ^= 1
    assert reader.read() == [record(1)]
    assert reader.news()
    assert reader.read() == []
    assert reader.lost_bytes > 0
    log.append(*record(4))
    assert reader.read() == [record(4)]


def test_a_record_whose_bytes_come_late_is_read_at_the_second_look() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 0)
    reader = LogReader(PrefixLog(memory, 4, RING))
    log.append(*record(1))
    late = bytes(log._rings[0][8:40])
    log._rings[0][8:40] = bytes(32)
    assert reader.read() == []
    log._rings[0][8:40] = late
    assert reader.read() == [record(1)]


def test_the_bytes_of_an_earlier_lap_are_never_a_record() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 0)
    log.append(*record(1))
    reader = LogReader(PrefixLog(memory, 4, RING))
    log._heads[0] = log._reserved[0] = RING + log._heads[0]  # as if one lap later nothing had been written
    assert [entry for entry in reader.read() + reader.read() if entry == record(1)] == []


def test_a_chain_longer_than_a_segment_loses_its_tail() -> None:
    memory = region()
    log = PrefixLog(memory, 4, RING, 0)
    log.append(*Routed(1, 1, 0.0, 256, os.urandom(8 * 10_000)))
    (got,) = LogReader(PrefixLog(memory, 4, RING)).read()
    assert len(got.hashes) == 8 * log.max_hashes


def test_a_ring_too_small_for_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no record"):
        PrefixLog(region(1, 1024), 1, 1024)


WRITERS = 8
HAMMER_SECONDS = 2.0


def hammer(fd: int, writer: int, pipe: Connection) -> None:
    """Write records whose contents follow from (writer, number), read everybody's, and check each."""
    log = PrefixLog(Segment.attach(fd).region("log"), WRITERS, RING, writer)
    reader = LogReader(log, own=writer)
    last = [-1] * WRITERS
    wrong = read = number = 0
    end = time.monotonic() + HAMMER_SECONDS
    while time.monotonic() < end:
        for _ in range(20):
            log.append(*Routed(writer, number, float(number), 256, contents(writer, number)))
            number += 1
        for entry in reader.read():
            read += 1
            if entry.pod <= last[entry.slot] or entry.hashes != contents(entry.slot, entry.pod):
                wrong += 1
            last[entry.slot] = entry.pod
    pipe.send((wrong, read, number, reader.lost_bytes))


def contents(writer: int, number: int) -> bytes:
    seed: int = xxh3_64_intdigest(struct.pack("<QQ", writer, number))
    return seed.to_bytes(8, "little") * (seed % 60)


def test_eight_processes_never_read_what_was_not_written() -> None:
    """Small rings, so that readers are lapped all the time, two cores, so that writers stop inside records."""
    segment = Segment.create({"log": PrefixLog.size(WRITERS, RING)})
    context = get_context("fork")
    pipes, processes = [], []
    for writer in range(WRITERS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=hammer, args=(segment.fd, writer, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    assert sum(wrong for wrong, *_ in results) == 0
    assert all(read > 1000 for _, read, _, _ in results)
    assert sum(lost for *_, lost in results) > 0  # the hard case did occur
