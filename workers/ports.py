"""Addresses at start-up: is one taken, and keep it from being taken.

Workers listen with SO_REUSEPORT, which would let a second router on the same machine share the port and take half of
the requests unnoticed. So an address is first tried without it, which fails if anybody listens there, and is then
held by a bound socket that does not listen: it gets no connections, and it refuses everybody but our own children.
"""

import errno
import socket
from pathlib import Path

from workers.address import parse_address
from workers.config import ConfigError


class Reservation:
    """A bound socket on an address, until `release`. Raises ConfigError when the address cannot be had."""

    def __init__(self, address: str, *, shared: bool) -> None:
        self.address = address
        self._socket: socket.socket | None = None
        kind, host, port = parse_address(address)
        if kind == "unix":
            if not Path(host).parent.is_dir():
                raise ConfigError(f"{address}: the directory {Path(host).parent} does not exist")
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
            why = "is in use by another process" if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(f"{address}: cannot listen: {why}") from None

    def release(self) -> None:
        """Give the address up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def clear_stale_socket(address: str) -> None:
    """Remove the file of a unix socket on which nobody listens anymore. Raises ConfigError when somebody does, or when
    the file is anything else."""
    kind, path, _ = parse_address(address)
    if kind != "unix" or not Path(path).exists():
        return
    if not Path(path).is_socket():
        raise ConfigError(f"{address}: cannot listen: there is a file of that name that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except OSError as error:
            raise ConfigError(f"{address}: cannot be used: {error.strerror}") from None
    raise ConfigError(f"{address}: cannot listen: is in use by another process")
