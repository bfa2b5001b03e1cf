"""How much of a pod's full KV cache is lost when more is written to it: what `marginal-delay` charges for evictions."""

from math import exp, inf
from typing import Final

TAIL: Final = 0.5
"""Of the time that runs stay in a cache: a run used again after more of it is used in the tail."""
FORGIVEN: Final = 0.5
"""Of a token written for each: the view takes pods to hold more than they do, so some of the tail is gone anyway."""


class Turnover:
    """What comes and goes in one pod's full cache: means over as much as the cache holds, however long that takes to be
    written. A few prompts say little of what comes back, and pods that only seem to differ draw prompts to and fro."""

    __slots__ = ("room", "stay", "tail", "written")

    def __init__(self) -> None:
        self.room = 0.0
        """Bytes that the cache holds."""
        self.stay = inf
        """Seconds from a run's last use to when it was dropped for want of room; infinite while nothing was."""
        self.tail = 0.0
        """Bytes that were used again after more than TAIL of that time."""
        self.written = 0.0
        """Bytes that were new."""

    def drop(self, stay: float, room: float) -> None:
        """A run is dropped so many seconds after its last use. At the first the whole cache has just been written."""
        self.room = room
        stay = max(stay, 0.0)
        if self.stay < inf:
            self.stay += 0.1 * (stay - self.stay)
        else:
            self.stay, self.written = stay, room

    def add(self, new: int, again: int) -> float:
        """Bytes come in that are new, and bytes are used again that were last used in the tail. Returns how many must
        be written again for each one that is written now.

        It shortens the stay of all others by its share of the cache, and the uses that come at the very end of the
        stay come too late then. In the tail there are `tail` of them, while (1 - TAIL) of a cache is written. So there
        is nothing to lose on a pod that keeps all it needs for long enough, nor on one where little is found anyway;
        most of all there is where the next request more would push out what is about to be used.
        """
        kept = exp(-new / self.room)
        self.written = self.written * kept + new
        self.tail = self.tail * kept + again
        return max(self.tail / ((1.0 - TAIL) * self.written) - FORGIVEN, 0.0)
