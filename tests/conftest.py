"""What all tests share. Being here also makes `tests/fleet.py` importable as `fleet`."""

import os

import pytest
from hypothesis import settings

from workers.compiled import is_compiled, outdated

if is_compiled() and (changed := outdated()):
    pytest.exit(f"changed after they were compiled: {', '.join(changed)}; run `make install`", returncode=2)

settings.register_profile("pointsman", deadline=None, print_blob=True)
settings.load_profile("pointsman")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests configures nothing."""
    for name in os.environ:
        if name.startswith(("POINTSMAN_", "AIBRIX_", "REDIS_")) or name == "ROUTING_ALGORITHM":
            monkeypatch.delenv(name)
