"""AIBrix's ModelClaims: models that a pod holds, awake or not, as annotations tell of them.

    modelclaim.aibrix.ai/<claim> = {"model": "qwen", "port": 8000, "state": "sleeping"}

A state is active, activating, sleeping or failed; where it is missing, a port means active and none activating. The
endpoints file may write the state alone, `modelclaim.aibrix.ai/<model> = sleeping`.
"""

from collections.abc import Mapping
from typing import Any, Final

import orjson

PREFIX: Final = "modelclaim.aibrix.ai/"
ACTIVE: Final = "active"
ACTIVATING: Final = "activating"
SLEEPING: Final = "sleeping"
STATES: Final = (ACTIVE, ACTIVATING, SLEEPING, "failed")
"""Of several pods' claims the first of these is the model's."""


def claims_of(labels: Mapping[str, str]) -> dict[str, str]:
    """The state of each model that a pod's labels claim. What cannot be read is no claim."""
    found = {}
    for key, text in labels.items():
        if key.startswith(PREFIX):
            model, state = _claim(text)
            model = model or key.removeprefix(PREFIX)
            if model and state:
                found[model] = state
    return found


def state_in(value: Any) -> str:
    """One of STATES, or empty."""
    state = value.strip().lower() if isinstance(value, str) else ""
    return state if state in STATES else ""


def _claim(text: str) -> tuple[str, str]:
    """Model and state, each empty where it is not told."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return "", state_in(text)
    if not isinstance(document, dict):
        return "", ""
    model, state = document.get("model"), document.get("state")
    if not state:
        state = ACTIVE if document.get("port") else ACTIVATING
    return (model if isinstance(model, str) else ""), state_in(state)
