"""The shared block: regions, attaching, and what is left of it when everybody was killed."""

import os
import signal
import time
from pathlib import Path

import pytest
from fleet import end_of, in_child, kill_all

from state.segment import PAGE, Segment, SegmentError


def test_regions_are_zeroed_apart_and_as_large_as_asked() -> None:
    segment = Segment.create({"a": 10, "b": PAGE + 1, "c": 8})
    assert segment.sizes() == {"a": 10, "b": PAGE + 1, "c": 8}
    for name, size in segment.sizes().items():
        region = segment.region(name)
        assert len(region) == size
        assert bytes(region) == bytes(size)
    segment.region("a")[:] = b"a" * 10
    segment.region("c")[:] = b"c" * 8
    assert bytes(segment.region("b")) == bytes(PAGE + 1)


def test_who_attaches_sees_and_writes_the_same_bytes() -> None:
    segment = Segment.create({"a": 16})
    other = Segment.attach(segment.fd)
    other.region("a")[:4] = b"ping"
    assert bytes(segment.region("a")[:4]) == b"ping"
    assert other.sizes() == segment.sizes()


def test_a_forked_process_shares_it() -> None:
    segment = Segment.create({"a": 16})

    def work() -> None:
        Segment.attach(segment.fd).region("a")[:2] = b"ok"

    assert end_of(in_child(work)) == 0
    assert bytes(segment.region("a")[:2]) == b"ok"


def test_an_unknown_region_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Segment.create({"a": 1}).region("b")


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"x" * (2 * PAGE)])
def test_what_is_no_segment_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(SegmentError):
            Segment.attach(fd)
    finally:
        os.close(fd)


def _shared_bytes() -> int:
    """What the kernel has in shared memory, all of the machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def _named() -> set[Path]:
    """Shared memory that has a name."""
    place = Path("/dev/shm")
    return {path for path in place.iterdir() if "pointsman" in path.name} if place.is_dir() else set()


def test_nothing_is_left_when_all_its_processes_were_killed() -> None:
    size = 96 << 20
    before = _named()
    free = _shared_bytes()
    read, write = os.pipe()

    def work() -> None:
        segment = Segment.create({"big": size})
        region = segment.region("big")
        for offset in range(0, size, PAGE):
            region[offset] = 1
        if os.fork() == 0:  # a second process that maps it
            Segment.attach(segment.fd)
        os.write(write, os.getpid().to_bytes(4, "little"))
        time.sleep(60)

    parent = in_child(work)
    pids = set()
    while len(pids) < 2:
        pids.add(int.from_bytes(os.read(read, 4), "little"))
    os.close(read)
    os.close(write)
    assert _shared_bytes() - free > size // 2
    (child,) = pids - {parent}
    os.kill(child, signal.SIGKILL)
    kill_all([parent])
    deadline = time.monotonic() + 10
    while _shared_bytes() - free > size // 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _shared_bytes() - free < size // 2
    assert _named() <= before
