"""Addresses as they are written in the configuration: "host:port", "[v6]:port" or "unix:/path"."""

import contextlib
import re
import socket
from ipaddress import ip_address
from typing import Literal, NamedTuple

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)?[^/]+(/[!-~]*)?")
"""What stands around a host and a port in a URL."""


class Parsed(NamedTuple):
    """`place` is a host or a path; `port` is 0 for a path."""

    kind: Literal["tcp", "unix"]
    place: str
    port: int


def parse_address(text: str, *, of_pod: bool = False) -> Parsed:
    """Take an address apart; that of a pod is no unix path. Raises ValueError that says what is wrong."""
    if of_pod and text.startswith("unix:"):
        raise ValueError(f"{text!r} is not a pod address: write host:port")
    if text.startswith("unix:"):
        path = text[5:]
        if path.startswith("//"):
            path = path[2:]
        if not path.startswith("/"):
            raise ValueError(
                f"{text!r} is not an address: a unix path must be absolute, such as unix:/run/pointsman.sock"
            )
        if len(path.encode()) > 100:
            raise ValueError(f"{text!r} is not an address: a unix path may have 100 bytes")
        return Parsed("unix", path, 0)
    url = _URL.fullmatch(text)
    around = [part for part in url.groups() if part] if url else []
    if around:
        raise ValueError(f"{text!r} is not an address: write host:port alone, without {' and '.join(around)}")
    host, colon, port_text = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is not an address: write an IPv6 host in brackets, such as [::1]:50052")
    if not colon or not host or not port_text.isascii() or not port_text.isdigit() or not 0 < int(port_text) < 65536:
        example = "10.0.0.1:8000" if of_pod else "0.0.0.0:50052, or unix:/path"
        raise ValueError(f"{text!r} is not an address: write host:port, such as {example}")
    return Parsed("tcp", host, int(port_text))


def join_address(host: str, port: int) -> str:
    """The text form, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip(host: str) -> bool:
    """Whether a host is written as an address and needs no look-up."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def canonical_ip(host: str) -> str | None:
    """A host that is written as an address, as a look-up would give it; None for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            return socket.inet_ntop(family, socket.inet_pton(family, host))
    return None
