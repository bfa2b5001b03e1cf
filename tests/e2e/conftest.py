"""One lab for the tests that break nothing; those that kill things make their own."""

from collections.abc import Iterator

import pytest

from bench.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Three pods, two workers, Envoy."""
    with Lab(pods=3, workers=2, strategy="least-request") as running:
        yield running
