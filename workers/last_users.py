"""What a users file last held that could be used, for workers that start while it cannot be.

The supervisor makes it, its children inherit it; whoever reads the file writes it down here. It is a pair of anonymous
files, written in turn, so that one is whole whenever a writer dies.
"""

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from struct import Struct
from typing import Final

import structlog
import xxhash

log = structlog.get_logger()

_HEADER: Final = Struct("<QQ")  # a number that goes up with each text, and the digest of both


class LastUsers:
    """See the head of this file."""

    def __init__(self) -> None:
        self._files = [os.memfd_create("pointsman-users", os.MFD_CLOEXEC) for _ in range(2)]
        for file in self._files:
            weakref.finalize(self, os.close, file)

    def keep(self, text: str) -> None:
        """Remember the text of a users file that can be used."""
        data = text.encode()
        try:
            with self._locked():
                (newest, held), file = max((self._read(file), file) for file in self._files)
                if newest and held == data:
                    return
                other = self._files[0] if file == self._files[1] else self._files[1]
                os.ftruncate(other, 0)
                os.pwrite(other, _HEADER.pack(newest + 1, _digest(newest + 1, data)) + data, 0)
        except OSError as error:
            log.warning("cannot save the users for later workers", error=error.strerror)

    def text(self) -> str | None:
        """The text kept last; None if there was none."""
        with self._locked():
            number, data = max(self._read(file) for file in self._files)
        return data.decode() if number else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._files[0], fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._files[0], fcntl.LOCK_UN)

    @staticmethod
    def _read(file: int) -> tuple[int, bytes]:
        """The text's number and the text; 0 where there is none, or half of one."""
        raw = os.pread(file, os.fstat(file).st_size, 0)
        if len(raw) < _HEADER.size:
            return 0, b""
        number, digest = _HEADER.unpack_from(raw)
        data = raw[_HEADER.size :]
        return (number, data) if digest == _digest(number, data) else (0, b"")


def _digest(number: int, data: bytes) -> int:
    digest: int = xxhash.xxh3_64_intdigest(data, number)
    return digest
