"""How the pods are: health and engine metrics, one row per pod, written by the scraper alone.

Each row has a sequence number: odd while the row is being written. A reader copies all rows at once and copies again
those whose number was odd or moved meanwhile, so it never sees half of one sample and half of another. `epoch` goes
up when something was written: a reader that finds it unchanged keeps its last copy, which makes the metrics free for
all but the first request after a poll. That one pays for all that is worked out from them anew, half a millisecond for
`marginal-delay` and 64 pods, in each worker. So the writer announces ordinary samples a few at a time.

    epoch        8 bytes
    high         8 bytes    rows in use are below this number
    last         8 bytes    the highest generation ever given out
    sequence     int64[P]
    generation   int64[P]   which pod has the row now (0: nobody)
    values       float64[P][len(FIELDS)]
"""

import time
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from state.fence import fence

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Health(IntEnum):
    """What the last polls and the last responses say of a pod."""

    UNSEEN = 0
    """No poll has succeeded yet: used only when no READY pod serves the model."""
    READY = 1
    FAILED = 2
    """Three polls in a row failed. Back with the first good one."""
    EJECTED = 3
    """Metrics answer, but requests fail: out for a while, longer each time."""
    ASLEEP = 4
    """The engine says that it sleeps."""


FIELDS: Final = (
    "health",  # one of Health
    "sampled_at",  # monotonic seconds of the last good poll, 0 before the first
    "incarnation",  # goes up each time the engine was seen to have restarted
    "failed_polls",  # in a row
    "tracked_requests_at_sample",  # in flight when the sample was taken, by the ledger: all replicas' that share load
    "tracked_tokens_at_sample",  # and their prompt tokens
    "tracked_promised_at_sample",  # and the prompt tokens ever promised to the pod, by the same ledger
    "running",  # requests in the batch
    "waiting",  # requests queued in the engine
    "swapped",  # requests swapped out or retracted
    "kv_usage",  # share of KV blocks in use, 0..1
    "utilization",  # 0..1, engines that publish one (xllm)
    "num_gpu_blocks",  # KV blocks the engine has
    "block_size",  # tokens in a block
    "start_time_seconds",  # unix seconds of the engine's start
    "window_seconds",  # what "recent" spans in this row
    "observed_age_seconds",  # of the newest observation behind the means, when the sample was taken
    "busy_ratio",  # share of recent time with at least one request running
    "hit_ratio",  # prefix cache: hit tokens / queried tokens, recent
    "prompt_tokens_per_second",  # recent, cached tokens included
    "computed_prompt_tokens_per_second",  # recent, without cached and transferred ones
    "generation_tokens_per_second",
    "requests_per_second",  # finished
    "preemptions_per_second",
    "steps_per_second",  # engine iterations
    "tokens_per_step",  # tokens in one engine iteration
    "ttft_mean_seconds",
    "ttft_p50_seconds",
    "ttft_p90_seconds",
    "ttft_p99_seconds",
    "itl_mean_seconds",  # time between output tokens: the step time while decoding
    "itl_p90_seconds",
    "e2e_mean_seconds",
    "e2e_p90_seconds",
    "queue_mean_seconds",
    "prefill_mean_seconds",
    "decode_mean_seconds",
    "prompt_tokens_mean",  # per request
    "generation_tokens_mean",
)
"""The columns of a row, all float64; NaN where the engine does not say."""

COLUMN: Mapping[str, int] = {name: column for column, name in enumerate(FIELDS)}

_HEADER: Final = 64
_PATIENCE_SECONDS: Final = 0.1


def _blank() -> Floats:
    """A row of which nothing is known."""
    row = np.full(len(FIELDS), np.nan)
    row[: COLUMN["running"]] = 0.0
    return row


class PodTable:
    """The shared rows. Exactly one process may call the methods that write."""

    def __init__(self, region: memoryview, pods: int) -> None:
        self.capacity = pods
        self._header = region[:_HEADER].cast("q")
        start = _HEADER
        self._sequence: Ints = np.frombuffer(region, np.int64, pods, start)
        start += 8 * pods
        self.generation: Ints = np.frombuffer(region, np.int64, pods, start)
        start += 8 * pods
        self._values: Floats = np.frombuffer(region, np.float64, pods * len(FIELDS), start).reshape(pods, len(FIELDS))

    @staticmethod
    def size(pods: int) -> int:
        """Bytes of shared memory for `pods` rows."""
        return _HEADER + pods * 8 * (2 + len(FIELDS))

    @property
    def epoch(self) -> int:
        """Changes whenever any row was written."""
        return self._header[0]

    @property
    def urgent(self) -> int:
        """Changes when a row has come to say something that no decision may miss: whose it is, or that its pod fails
        or is back."""
        return self._header[3]

    @property
    def high(self) -> int:
        """One more than the highest row in use."""
        return self._header[1]

    @property
    def last_generation(self) -> int:
        """The highest generation that any pod ever had."""
        return self._header[2]

    def claim(self, slot: int, generation: int) -> None:
        """Give row `slot` to a new pod: everything unknown, health UNSEEN. `generation` must be above
        `last_generation`, so that no charge on an earlier pod of this row is ever taken for one on this."""
        self._header[2] = max(self._header[2], generation)
        self.generation[slot] = generation
        self._header[1] = max(self._header[1], slot + 1)
        self.write(slot, _blank())

    def vacate(self, slot: int) -> None:
        """Take the row from a pod that is gone. Its figures go too: a row that a writer left half written would
        keep every reader waiting for as long as nobody writes it whole."""
        self.generation[slot] = 0
        self.write(slot, _blank())

    def write(self, slot: int, row: Floats, *, announce: bool = True) -> None:
        """Replace one row. `row` has one value per entry of FIELDS. Without `announce` it is not urgent: readers see it
        once `announce` has been called, or another row written."""
        sequence = int(self._sequence[slot]) | 1  # a writer that died half way left it odd
        self._sequence[slot] = sequence
        fence()
        self._values[slot] = row
        fence()
        self._sequence[slot] = sequence + 1
        if announce:
            self._header[3] += 1
            self.announce()

    def announce(self) -> None:
        """Let readers know that something was written."""
        self._header[0] += 1

    def row(self, slot: int) -> Floats:
        """A consistent copy of one row."""
        out: Floats = np.empty(len(FIELDS))
        self._copy_row(slot, out)
        return out

    def snapshot(self) -> tuple[int, Floats]:
        """(epoch, values[high, len(FIELDS)]): every row consistent in itself."""
        epoch = self._header[0]
        high = self._header[1]
        before = self._sequence[:high].copy()
        fence()
        values = self._values[:high].copy()
        fence()
        moved = (before != self._sequence[:high]) | (before & 1 == 1)
        for slot in moved.nonzero()[0]:
            self._copy_row(int(slot), values[slot])
        return epoch, values

    def _copy_row(self, slot: int, out: Floats) -> None:
        deadline = 0.0
        while True:
            before = int(self._sequence[slot])
            if not before & 1:
                fence()
                out[:] = self._values[slot]
                fence()
                if int(self._sequence[slot]) == before:
                    return
            now = time.monotonic()
            deadline = deadline or now + _PATIENCE_SECONDS
            if now > deadline:
                # The writer died inside `write`. Its successor will write the row whole; until then: unseen.
                out[:] = _blank()
                return
