"""The two ways in which a client can break HTTP/2 (RFC 9113 5.4)."""


class ConnectionFault(Exception):
    """A connection error: GOAWAY with `code` and the end. `abuse` names the limit if one was passed."""

    def __init__(self, code: int, reason: str, *, abuse: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.abuse = abuse


class StreamFault(Exception):
    """A stream error: RST_STREAM with `code`; the connection lives on."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
