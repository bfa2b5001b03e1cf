"""Addresses at start-up: taken or not, and held afterwards."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import end_of, in_child

from workers.config import ConfigError
from workers.ports import Reservation, clear_stale_socket


def listener(port: int = 0, *, reuse: bool = False, host: str = "127.0.0.1") -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if reuse:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
        sock.listen(8)
    except OSError:
        sock.close()
        raise
    return sock


@pytest.fixture
def free_port() -> Iterator[int]:
    with listener() as sock:
        port: int = sock.getsockname()[1]
    yield port


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wildcard", [False, True])
def test_an_address_on_which_somebody_listens_is_refused(reuse: bool, shared: bool, wildcard: bool) -> None:
    with listener(reuse=reuse) as sock:
        port = sock.getsockname()[1]
        address = f"{'0.0.0.0' if wildcard else '127.0.0.1'}:{port}"
        with pytest.raises(ConfigError, match=f"^{address}: cannot listen: is in use by another process; stop"):
            Reservation(address, shared=shared)


def test_a_held_address_is_for_those_who_share_it_and_gets_no_connections(free_port: int) -> None:
    held = Reservation(f"127.0.0.1:{free_port}", shared=True)
    try:
        with pytest.raises(OSError, match="in use"):
            listener(free_port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", free_port), 1)
        with listener(free_port, reuse=True) as worker:
            for _ in range(20):  # none goes to the holder
                with socket.create_connection(("127.0.0.1", free_port), 1):
                    worker.accept()[0].close()
    finally:
        held.release()
        held.release()


def test_an_unshared_one_keeps_even_those_away_who_would_share(free_port: int) -> None:
    held = Reservation(f"127.0.0.1:{free_port}", shared=False)
    with pytest.raises(OSError, match="in use"):
        listener(free_port, reuse=True)
    held.release()


def test_ipv6(free_port: int) -> None:
    held = Reservation(f"[::1]:{free_port}", shared=True)
    assert held.address == f"[::1]:{free_port}"
    held.release()


@pytest.mark.parametrize(
    ("host", "cure"), [("203.0.113.7", "write an address of this machine"), ("no-such-host.invalid", "write another")]
)
def test_an_address_that_is_not_ours_is_refused_in_one_line(host: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=f"^{host}:20900: cannot listen: .+; {cure}") as raised:
        Reservation(f"{host}:20900", shared=True)
    assert "\n" not in str(raised.value)


def test_a_unix_path_needs_its_directory(tmp_path: Path) -> None:
    Reservation(f"unix:{tmp_path}/a.sock", shared=True).release()
    with pytest.raises(ConfigError, match=r"the directory .* does not exist"):
        Reservation(f"unix:{tmp_path}/no/a.sock", shared=True)


def test_a_unix_path_needs_a_directory_that_may_be_written_to() -> None:
    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(ConfigError, match=r"^unix:/a.sock: the directory / may not be written to by this user"):
            Reservation("unix:/a.sock", shared=True)

    assert end_of(in_child(as_nobody)) == 0


def test_a_stale_socket_is_removed_a_live_one_and_any_other_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    address = f"unix:{path}"
    clear_stale_socket(address)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(1)
        with pytest.raises(ConfigError, match="in use by another process"):
            clear_stale_socket(address)
        assert path.exists()
    clear_stale_socket(address)
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        clear_stale_socket(address)
    assert path.read_text() == "precious"
    clear_stale_socket("127.0.0.1:1")
