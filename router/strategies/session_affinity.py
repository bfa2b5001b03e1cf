"""`session-affinity`: a session stays with its pod.

A reply carries `x-session-id`; a client that sends it back reaches the same pod as long as that pod takes requests.
A client that has its own key sends `x-aibrix-session-key` instead, and rendezvous hashing gives all requests of a key
to one pod, on every replica alike, moving only the keys of pods that go. Without either the pod is drawn at random.

The id is the first 128 bits of HMAC-SHA256(secret, address), in base64url. It says nothing about the pod, and nobody
without the secret can make one, so a client may stay where it was sent but not choose. AIBrix's ids, the base64 of
`ip:port`, do neither, and are ignored.

Workers and replicas must have the same secret. Among 64 pods a key costs 45 µs and an id 15 µs at most.
"""

import base64
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from secrets import token_bytes
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from router.fleet import Candidates, Pod
from router.request import RoutingRequest
from router.strategies.base import Context, Scoring
from state.pods import Floats

MAX_KEY_LENGTH: Final = 256
"""Bytes of an `x-aibrix-session-key`; longer ones are ignored."""
ID_LENGTH: Final = 22
"""Characters of an id: 16 bytes in base64 without padding."""
SESSION_ID: Final = "session_id"
"""Where the request's notes hold the `x-session-id` that came, if one did."""
NEW_SESSION_ID: Final = "new_session_id"
"""Where they hold the one to return, once a pod was chosen."""

_OFFSET: Final = 0xCBF29CE484222325
_PRIME: Final = 0x100000001B3
_UINT_PRIME: Final = np.uint64(_PRIME)
_SHIFT: Final = np.uint64(33)
_MIXERS: Final = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_MASK: Final = (1 << 64) - 1
_MAX_FLEETS: Final = 64


class SessionAffinity(Scoring):
    """score = 0 for the session's pod, 1 for the others, unknown for all without a session. [1]

    The pod is the one the session id names, else argmax mix(FNV-1a-64(key, 0x00, address)), the smaller address on a
    tie. mix is MurmurHash3's fmix64: FNV's last bytes hardly reach its high bits, so that without it, as in AIBrix, one
    of several pods that differ in the last digit of their ports gets half of all keys.
    """

    name: ClassVar[str] = "session-affinity"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._secret = context.session_secret or token_bytes(32)
        self._ids: dict[str, str] = {}
        self._fleets: OrderedDict[tuple[str, ...], _Addresses] = OrderedDict()

    def pick(self, request: RoutingRequest, candidates: Candidates, now: float) -> int:
        """The session's pod, else any."""
        index = self._home(request, candidates)
        return int(self.context.random.random() * len(candidates)) if index < 0 else index

    def scores(self, request: RoutingRequest, candidates: Candidates, now: float) -> Floats:
        """0 and 1, or NaN."""
        index = self._home(request, candidates)
        if index < 0:
            return np.full(len(candidates), np.nan)
        scores = np.ones(len(candidates))
        scores[index] = 0.0
        return scores

    def chosen(self, request: RoutingRequest, candidates: Candidates, index: int, now: float) -> None:
        """Leave the id to return."""
        notes = request.notes
        if notes is None:
            notes = request.notes = {}
        notes[NEW_SESSION_ID] = self.session_id(candidates.pods[index])

    def session_id(self, pod: Pod) -> str:
        """The id that leads back to this pod."""
        address = pod.address  # a name may change when the endpoints file does
        found = self._ids.get(address)
        if found is None:
            if len(self._ids) >= 65536:
                self._ids.clear()
            digest = hmac.digest(self._secret, address.encode(), "sha256")
            found = self._ids[address] = base64.urlsafe_b64encode(digest[:16]).decode().rstrip("=")
        return found

    def _home(self, request: RoutingRequest, candidates: Candidates) -> int:
        """Index of the pod the session belongs to; -1 if there is no session or its pod is not a candidate."""
        given = request.notes.get(SESSION_ID) if request.notes else None
        if type(given) is str and len(given) == ID_LENGTH and given.isascii():
            for index, pod in enumerate(candidates.pods):
                if hmac.compare_digest(self.session_id(pod), given):
                    return index
        if request.session_key:
            key = request.session_key.encode("utf-8", "surrogateescape")
            if len(key) <= MAX_KEY_LENGTH:
                return self._addresses(candidates.pods).highest(key)
        return -1

    def _addresses(self, pods: Sequence[Pod]) -> "_Addresses":
        key = tuple([pod.address for pod in pods])
        found = self._fleets.get(key)
        if found is None:
            if len(self._fleets) >= _MAX_FLEETS:
                self._fleets.popitem(last=False)
            found = self._fleets[key] = _Addresses(key)
        return found


class _Addresses:
    """The addresses of some pods, laid out so that all are hashed at once: one row for each byte position."""

    __slots__ = ("_addresses", "_columns", "_shortest", "_within")

    def __init__(self, addresses: tuple[str, ...]) -> None:
        raw = [address.encode() for address in addresses]
        longest = max(map(len, raw))
        padded = np.array([list(address.ljust(longest, b"\0")) for address in raw], np.uint64)
        lengths = np.array([len(address) for address in raw])
        self._addresses = addresses
        self._columns: npt.NDArray[np.uint64] = np.ascontiguousarray(padded.T)
        self._shortest = int(lengths.min())
        self._within: npt.NDArray[np.bool_] = np.arange(self._shortest, longest)[:, None] < lengths[None, :]

    def highest(self, key: bytes) -> int:
        """Index of the address with the highest hash for this key."""
        hashes = np.full(len(self._addresses), fnv1a(key + b"\0"), np.uint64)
        for column in self._columns[: self._shortest]:
            hashes ^= column
            hashes *= _UINT_PRIME
        for column, within in zip(self._columns[self._shortest :], self._within, strict=True):
            hashes = np.where(within, (hashes ^ column) * _UINT_PRIME, hashes)
        for mixer in _MIXERS:
            hashes ^= hashes >> _SHIFT
            hashes *= mixer
        hashes ^= hashes >> _SHIFT
        best = np.flatnonzero(hashes == hashes.max()).tolist()
        return int(min(best, key=self._addresses.__getitem__))


def fnv1a(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    state = _OFFSET
    for byte in data:
        state = ((state ^ byte) * _PRIME) & _MASK
    return state
