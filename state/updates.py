"""What replicas of the router tell each other, as bytes. Who carries them is `workers.replicator`.

Rows, generations and clocks are each replica's own. So a pod is called by a hash of its address, an incarnation of its
engine by the time when it started, and times are ages in seconds.

    loads     a row of LOADS for each pod: all that a replica has in flight there. Always whole, so that updates that
              got lost are made up for by the next
    routed    one after the other, for each prompt: `_ROUTED`, then the hashes of its blocks, as in `state.prefix_log`
    users     a row of USERS for each cell of the sketch of users' tokens (`state.user_tokens`) that is not 0

Whatever cannot be such an update raises UpdateError, and nothing of it is believed.
"""

import struct
from collections.abc import Iterator
from math import isfinite
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from state.user_tokens import CELLS, ROWS

FORMAT: Final = 1
"""Replicas that speak another one keep out of each other's way: it is part of the names in Redis."""
LOADS: Final = np.dtype([("pod", "<u8"), ("requests", "<i4"), ("tokens", "<i8"), ("promised", "<i8"), ("wait", "<f4")])
"""`promised`: prompt tokens sent and not expected in the pod's cache, for as long as the replica knows the pod.
`wait`: seconds until the pod will have computed all that it was promised, by anybody."""
USERS: Final = np.dtype([("cell", "<u2"), ("tokens", "<f4")])
"""`cell`: row * CELLS + cell."""
_ROUTED: Final = struct.Struct("<QQfII")
"""Pod, its engine's start, age in seconds, bytes in a block, number of hashes."""

_MAX_TOKENS: Final = float(1 << 40)

Loads = npt.NDArray[np.void]


class UpdateError(Exception):
    """These bytes are no update."""


class PromptUpdate(NamedTuple):
    """This prompt went to this pod."""

    pod: int
    started: int
    """When the pod's engine started, in milliseconds of unix time; 0 where it does not say."""
    age: float
    """Seconds, when it was told."""
    block_bytes: int
    hashes: bytes


def pod_key(address: str) -> int:
    """What replicas call the pod at "ip:port"."""
    return xxh3_64_intdigest(address.encode())


def read_loads(update: bytes) -> Loads:
    """The rows. Raises UpdateError."""
    if len(update) % LOADS.itemsize:
        raise UpdateError(f"{len(update)} bytes are not rows of {LOADS.itemsize}")
    rows: Loads = np.frombuffer(update, LOADS)
    if len(np.unique(rows["pod"])) != len(rows):
        raise UpdateError("a pod twice")
    if not (np.isfinite(rows["wait"]).all() and (rows["wait"] >= 0).all()):
        raise UpdateError("a wait that is not a time")
    return rows


def write_users(totals: npt.NDArray[np.float64]) -> bytes:
    """What a replica's users have used: [ROWS][CELLS]."""
    flat = totals.ravel()
    cells = flat.nonzero()[0]
    rows = np.zeros(len(cells), USERS)
    rows["cell"], rows["tokens"] = cells, np.minimum(flat[cells], _MAX_TOKENS)
    return rows.tobytes()


def read_users(update: bytes) -> npt.NDArray[np.float64]:
    """The same. Raises UpdateError."""
    if len(update) % USERS.itemsize:
        raise UpdateError(f"{len(update)} bytes are not rows of {USERS.itemsize}")
    rows = np.frombuffer(update, USERS)
    with np.errstate(invalid="ignore"):  # whatever is no number is refused below
        cells, tokens = rows["cell"], rows["tokens"].astype(float)
    if len(np.unique(cells)) != len(cells) or (cells >= ROWS * CELLS).any():
        raise UpdateError("a cell out of range, or twice")
    if not (np.isfinite(tokens).all() and (tokens >= 0).all()):
        raise UpdateError("tokens that are not a number")
    totals = np.zeros(ROWS * CELLS)
    totals[cells] = np.minimum(tokens, _MAX_TOKENS)
    return totals.reshape(ROWS, CELLS)


def write_routed(prompt: PromptUpdate) -> bytes:
    """One prompt."""
    return (
        _ROUTED.pack(prompt.pod, prompt.started, prompt.age, prompt.block_bytes, len(prompt.hashes) >> 3)
        + prompt.hashes
    )


def read_routed(update: bytes) -> Iterator[PromptUpdate]:
    """The prompts, in order. Raises UpdateError at the first that is none."""
    at = 0
    while at < len(update):
        if len(update) - at < _ROUTED.size:
            raise UpdateError(f"{len(update) - at} bytes are not a prompt")
        pod, started, age, block_bytes, count = _ROUTED.unpack_from(update, at)
        at += _ROUTED.size
        if count > (len(update) - at) >> 3:
            raise UpdateError(f"{count} hashes in {len(update) - at} bytes")
        if not isfinite(age) or age < 0 or block_bytes < 1 or block_bytes & (block_bytes - 1):
            raise UpdateError("an impossible age or block size")
        yield PromptUpdate(pod, started, age, block_bytes, update[at : at + 8 * count])
        at += 8 * count
