"""What a strategy may know of a request."""

from collections.abc import Callable
from typing import Any

from router.bodies.base import Body


class RoutingRequest:
    """One request, parsed once. Strategies read it and may leave notes for their own `chosen` step."""

    __slots__ = (
        "_read_text",
        "_text",
        "body",
        "max_tokens",
        "model",
        "notes",
        "prefix",
        "prompt_tokens",
        "session_key",
        "uncached_tokens",
        "user",
    )

    def __init__(
        self,
        model: str,
        prompt_tokens: int = 0,
        max_tokens: int = 0,
        read_text: Callable[[], bytes] | None = None,
        body: Body | None = None,
        *,
        text: bytes | None = None,
        user: str = "",
        session_key: str = "",
    ) -> None:
        self.model = model
        """The name the client asked for: a base model or an adapter."""
        self._text = text
        self._read_text = read_text
        self.body = body
        """Has the text, unless there is none."""
        self.prompt_tokens = prompt_tokens
        """Prompt length, estimated from the text where the tokens are not known."""
        self.max_tokens = max_tokens
        """The client's bound on output tokens, 0 when it gave none."""
        self.user = user
        self.session_key = session_key
        self.uncached_tokens = -1
        """Prompt tokens the chosen pod is expected to compute; -1: no strategy knew, all of them."""
        self.prefix: Any = None
        """`router.prefixes.LookUp`, once a strategy has asked for it."""
        self.notes: dict[str, Any] | None = None
        """What a strategy found while scoring (matched tokens for each candidate, say), for `chosen` and `explain`."""

    @property
    def text(self) -> bytes:
        """The routing text (UTF-8): equal prefixes of requests give equal prefixes of text. Built when first asked
        for, because most strategies never do."""
        text = self._text
        if text is None:
            body = self.body
            if body is not None:
                text = body.routing_text()
            else:
                text = self._read_text() if self._read_text is not None else b""
            self._text = text
        return text
