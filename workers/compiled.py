"""Whether the hot path runs compiled (setup.py), and whether what was compiled is what the sources say now."""

import json
from hashlib import sha256
from pathlib import Path

from router import wire

_ROOT = Path(__file__).parents[1]


def is_compiled() -> bool:
    """Whether this process runs the compiled modules."""
    return not str(wire.__file__).endswith(".py")


def outdated() -> list[str]:
    """Sources that were changed, or went, after they were compiled. An installed package has none, only a working
    copy."""
    try:
        compiled = json.loads((_ROOT / "build" / "compiled.json").read_bytes())
    except OSError:
        return []
    return [name for name, digest in compiled.items() if _digest(_ROOT / name) != digest]


def _digest(source: Path) -> str:
    try:
        return sha256(source.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
