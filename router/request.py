"""What a strategy may know of a request."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class RoutingRequest:
    """One request, parsed once. Strategies read it and may leave notes for their own `chosen` step."""

    model: str
    """The name the client asked for: a base model or an adapter."""
    text: bytes = b""
    """The routing text (UTF-8): equal prefixes of requests give equal prefixes of text."""
    prompt_tokens: int = 0
    """Prompt length, estimated from the text where the tokens are not known."""
    max_tokens: int = 0
    """The client's bound on output tokens, 0 when it gave none."""
    user: str = ""
    session_key: str = ""
    arrived: float = 0.0
    """Monotonic seconds."""
    uncached_tokens: int = -1
    """Prompt tokens the chosen pod is expected to compute; -1: no strategy knew, all of them."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What a strategy found while scoring (matched tokens for each candidate, say), for `chosen` and `explain`."""
