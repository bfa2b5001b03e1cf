"""One block of anonymous shared memory, divided into named regions.

The supervisor creates the segment before it starts anybody; children inherit its file descriptor and map it. It is
a memfd, so it has no name to leak: the kernel frees it when the last process that maps it is gone, also after
`kill -9` of all of them.

    0       8 bytes   magic
    8       8 bytes   length of the directory
    16      JSON      directory: name -> [offset, size]
    4096..  regions, each on a page of its own
"""

import mmap
import os
import weakref
from collections.abc import Mapping

import orjson

MAGIC = b"pointsm1"
PAGE = 4096
DIRECTORY_OFFSET = 16


class SegmentError(Exception):
    """The file descriptor does not hold a segment of this version."""


def _up_to_page(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Segment:
    """A mapped segment. `fd` stays open as long as the object, to be passed to children."""

    def __init__(
        self, fd: int, memory: mmap.mmap, directory: Mapping[str, tuple[int, int]], *, made_here: bool = False
    ) -> None:
        self.fd = fd
        self._memory = memory
        self._directory = directory
        if made_here:
            weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls, sizes: Mapping[str, int]) -> "Segment":
        """Make a zeroed segment with one region per entry of `sizes` (bytes)."""
        offset = _up_to_page(DIRECTORY_OFFSET + sum(len(name) + 64 for name in sizes))
        directory: dict[str, tuple[int, int]] = {}
        for name, size in sizes.items():
            directory[name] = (offset, size)
            offset += _up_to_page(size)
        fd = os.memfd_create("pointsman", os.MFD_CLOEXEC)
        os.ftruncate(fd, offset)
        memory = mmap.mmap(fd, offset)
        listing = orjson.dumps(directory)
        memory[DIRECTORY_OFFSET : DIRECTORY_OFFSET + len(listing)] = listing
        memory[8:16] = len(listing).to_bytes(8, "little")
        memory[0:8] = MAGIC
        return cls(fd, memory, directory, made_here=True)

    @classmethod
    def attach(cls, fd: int) -> "Segment":
        """Map the segment that the parent passed as `fd`. Raises SegmentError when it is none."""
        size = os.fstat(fd).st_size
        if size < PAGE:
            raise SegmentError(f"file descriptor {fd} holds no pointsman segment: only {size} bytes")
        memory = mmap.mmap(fd, size)
        if memory[0:8] != MAGIC:
            raise SegmentError(f"file descriptor {fd} holds no pointsman segment of this version")
        length = int.from_bytes(memory[8:16], "little")
        listing = orjson.loads(memory[DIRECTORY_OFFSET : DIRECTORY_OFFSET + length])
        return cls(fd, memory, {name: (place[0], place[1]) for name, place in listing.items()})

    def region(self, name: str) -> memoryview:
        """The writable bytes of one region. Raises KeyError for an unknown name."""
        offset, size = self._directory[name]
        return memoryview(self._memory)[offset : offset + size]

    def sizes(self) -> dict[str, int]:
        """Region sizes in bytes, by name."""
        return {name: size for name, (_, size) in self._directory.items()}
