"""Whose a unix socket's path is: it belongs to whoever bound it last, so that a successor can take it over while its
predecessor still serves, and there is never a moment without a listener.
"""

import contextlib
import os
from pathlib import Path


class UnixPath:
    """Bind to `temporary`, then `take`; `release` when nobody shall come that way any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{os.urandom(3).hex()}")
        """Seven bytes longer: a path that the configuration takes may have 100 bytes, one that the kernel takes 107."""
        self._inode = 0

    def take(self) -> None:
        """Move what was bound over the path. Raises OSError."""
        self._inode = self.temporary.stat().st_ino
        self.temporary.rename(self.path)

    def release(self) -> None:
        """Remove the file, unless a successor has put its own there. Safe to call whatever has been done."""
        with contextlib.suppress(OSError):
            self.temporary.unlink()
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
