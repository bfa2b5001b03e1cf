"""What the configuration says of all requests of a process, for the exchanges to share."""

from typing import Final

from router.limits import Gate


class Policy:
    """`gate` is None where nobody is identified or limited."""

    __slots__ = ("draining", "explain", "gate", "usage_metrics")

    def __init__(self, gate: Gate | None = None, *, explain: bool = False, usage_metrics: bool = False) -> None:
        self.gate = gate
        self.explain = explain
        """Whether clients may ask for the receipt of a decision."""
        self.usage_metrics = usage_metrics
        """Whether the usage of every request is read, not only that of limited users."""
        self.draining = False
        """This process is about to end, and with it streams whose requests go on."""


NO_POLICY: Final = Policy()
