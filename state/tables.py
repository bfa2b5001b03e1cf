"""All tables of one replica, made once by the supervisor and opened by every other process."""

from dataclasses import asdict, dataclass
from secrets import token_bytes

import orjson

from state.abandoned import Abandoned
from state.catalog import Catalog
from state.ended_log import EndedLog
from state.ledger import Ledger
from state.limits import Windows
from state.pods import PodTable
from state.prefix_log import PrefixLog
from state.roster import Roster
from state.segment import Segment
from state.series import Series
from state.user_tokens import UserTokens


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much each table holds. Fixed for the life of the segment; configuration sets it."""

    pods: int = 1024
    writers: int = 34
    catalog_bytes: int = 4 << 20
    series: int = 4096
    prefix_ring_bytes: int = 4 << 20
    limited_users: int = 4096
    limited_models: int = 256


SUPERVISOR, SCRAPER, ADMIN, REPLICATOR = 0, 1, 2, 3
"""Writer rows of the processes of which there is one. Workers have the rows from FIRST_WORKER on."""
FIRST_WORKER = 4
_ID_BYTES = 4
_HEEDING_BYTES = 8
"""More than there are ways in which Envoy learns the pod."""


class Place:
    """How far the replicator has read what other replicas told: the place of the last entry in the stream, which is
    "milliseconds-number". Here, so that a successor goes on there."""

    SIZE = 16

    def __init__(self, region: memoryview) -> None:
        self._numbers = region[: self.SIZE].cast("Q")

    @property
    def milliseconds(self) -> int:
        """By the server's clock, 0 for the begin."""
        return self._numbers[0]

    def put(self, place: bytes) -> None:
        """That far."""
        milliseconds, _, number = place.partition(b"-")
        self._numbers[0], self._numbers[1] = int(milliseconds), int(number)

    def beyond(self, newest: bytes) -> bool:
        """Whether it lies behind the newest entry of the stream, which is empty where there is none."""
        milliseconds, _, number = newest.partition(b"-")
        return (self._numbers[0], self._numbers[1]) > (int(milliseconds or 0), int(number or 0))

    def clear(self) -> None:
        """From the begin."""
        self._numbers[0] = self._numbers[1] = 0

    def following(self) -> bytes:
        """The first place that has not been read."""
        return b"%d-%d" % (self._numbers[0], self._numbers[1] + 1)


class Tables:
    """Every table of the segment. `writer` is the row that this process may write; None for a pure reader."""

    def __init__(self, segment: Segment, writer: int | None = None) -> None:
        self.segment = segment
        self.writer = writer
        raw = bytes(segment.region("capacity")).rstrip(b"\0")
        self.capacity = capacity = Capacity(**orjson.loads(raw))
        self.catalog = Catalog(segment.region("catalog"))
        self.pods = PodTable(segment.region("pods"), capacity.pods)
        self.ledger = Ledger(segment.region("ledger"), self.pods.generation, capacity.writers, capacity.pods, writer)
        self.roster = Roster(segment.region("roster"), capacity.writers)
        self.prefix_log = PrefixLog(segment.region("prefix_log"), capacity.writers, capacity.prefix_ring_bytes, writer)
        self.ended_log = EndedLog(segment.region("ended_log"), capacity.writers, writer)
        """What Envoy told workers here of requests that other replicas had routed (`router.access_log`)."""
        self.abandoned = Abandoned(segment.region("abandoned"), capacity.writers, writer)
        self.heeding = segment.region("heeding")
        """By how Envoy learns the pod: has one that leaves the ends of requests to its log shown a response when asked
        to? One byte each, only ever set."""
        self.user_tokens = UserTokens(segment.region("user_tokens"), capacity.writers, writer)
        fd, writers = segment.fd, capacity.writers
        self.user_minutes = Windows(
            segment.region("user_minutes"), capacity.limited_users, writers, 60.0, fd=fd, lock_byte=0, writer=writer
        )
        self.model_seconds = Windows(
            segment.region("model_seconds"), capacity.limited_models, writers, 1.0, fd=fd, lock_byte=1, writer=writer
        )
        self.place = Place(segment.region("place"))
        self._series = segment.region("series")
        self.replica = bytes(segment.region("replica")).hex()
        """By chance: tells this replica, for as long as its tables live, from every other."""

    @classmethod
    def create(cls, capacity: Capacity, writer: int | None = None) -> "Tables":
        """Make the segment."""
        described = orjson.dumps(asdict(capacity))
        segment = Segment.create(
            {
                "capacity": len(described),
                "catalog": Catalog.size(capacity.catalog_bytes),
                "pods": PodTable.size(capacity.pods),
                "ledger": Ledger.size(capacity.writers, capacity.pods),
                "roster": Roster.size(capacity.writers),
                "prefix_log": PrefixLog.size(capacity.writers, capacity.prefix_ring_bytes),
                "ended_log": EndedLog.size(capacity.writers),
                "abandoned": Abandoned.size(capacity.writers),
                "heeding": _HEEDING_BYTES,
                "user_tokens": UserTokens.size(capacity.writers),
                "user_minutes": Windows.size(capacity.limited_users, capacity.writers),
                "model_seconds": Windows.size(capacity.limited_models, capacity.writers),
                "series": Series.size(capacity.series) * capacity.writers,
                "replica": _ID_BYTES,
                "place": Place.SIZE,
            }
        )
        segment.region("capacity")[:] = described
        segment.region("replica")[:] = token_bytes(_ID_BYTES)
        return cls(segment, writer)

    @classmethod
    def attach(cls, fd: int, writer: int | None = None) -> "Tables":
        """Open the segment that the supervisor made."""
        return cls(Segment.attach(fd), writer)

    def series(self, writer: int | None = None) -> Series:
        """The counters of one writer, by default this process's own."""
        index = self.writer if writer is None else writer
        if index is None:
            raise ValueError("a process without a writer row has no counters")
        size = Series.size(self.capacity.series)
        return Series(self._series[index * size : (index + 1) * size])

    def all_series(self) -> list[Series]:
        """The counters of every writer."""
        return [self.series(writer) for writer in range(self.capacity.writers)]
