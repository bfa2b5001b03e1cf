"""Addresses at start-up: is one taken, and keep it from being taken.

Workers listen with SO_REUSEPORT, which would let a second router on the same machine share the port and take half of
the requests unnoticed. So an address is first tried without it, which fails if anybody listens there, and is then
held by a bound socket that does not listen: it gets no connections, and it refuses everybody but our own children.
"""

import errno
import os
import socket
from pathlib import Path

from workers.address import parse_address
from workers.config import ConfigError

_IN_USE = "cannot listen: is in use by another process; stop that one, or write another address"
_CURES = {
    errno.EACCES: "only root may have ports below 1024; write a higher one",
    errno.EADDRNOTAVAIL: "write an address of this machine, or 0.0.0.0 for all of them",
}


class AddressError(ConfigError):
    """An address cannot be had."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"{address}: {why}")
        self.address = address


class Reservation:
    """A bound socket on an address, until `release`. Raises AddressError."""

    def __init__(self, address: str, *, shared: bool) -> None:
        self.address = address
        self._socket: socket.socket | None = None
        kind, host, port = parse_address(address)
        if kind == "unix":
            folder = Path(host).parent
            if not folder.is_dir():
                raise AddressError(address, f"the directory {folder} does not exist; make it")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise AddressError(
                    address, f"the directory {folder} may not be written to by this user; let it, or write another path"
                )
            return
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            place = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                probe.listen(1)
            self._socket = held = socket.socket(family, socket.SOCK_STREAM)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(place)
        except OSError as error:
            self.release()
            raise AddressError(address, _why(error)) from None

    def release(self) -> None:
        """Give the address up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return _IN_USE
    cure = _CURES.get(error.errno or 0, "write another address")
    return f"cannot listen: {error.strerror}; {cure}"


def clear_stale_socket(address: str) -> None:
    """Remove the file of a unix socket on which nobody listens anymore. Raises AddressError when somebody does, or
    when the file is anything else."""
    kind, path, _ = parse_address(address)
    if kind != "unix" or not Path(path).exists():
        return
    if not Path(path).is_socket():
        raise AddressError(
            address, "cannot listen: there is a file of that name that is not a socket; write another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except OSError as error:
            raise AddressError(address, f"cannot be used: {error.strerror}; write another path") from None
    raise AddressError(address, _IN_USE)
