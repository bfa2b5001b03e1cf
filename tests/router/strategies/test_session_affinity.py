import base64
from collections import Counter
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet import Candidates, Pod
from router.request import RoutingRequest
from router.strategies.base import Context
from router.strategies.session_affinity import ID_LENGTH, NEW_SESSION_ID, SESSION_ID, SessionAffinity, fnv1a
from state.catalog import PodRecord
from state.pods import FIELDS
from state.tables import Capacity, Tables


@pytest.fixture(scope="module")
def tables() -> Iterator[Tables]:
    yield Tables.create(Capacity(pods=16, writers=4, catalog_bytes=4096, series=64), writer=3)


def candidates(tables: Tables, *addresses: str) -> Candidates:
    pods = [Pod(PodRecord(slot, 1, f"pod-{address}", address, ("m",))) for slot, address in enumerate(addresses)]
    return Candidates(tables, pods, np.full((len(pods), len(FIELDS)), np.nan))


def affinity(secret: bytes = b"s" * 32) -> SessionAffinity:
    return SessionAffinity(Context(Random(1), session_secret=secret))


def picks(strategy: SessionAffinity, pods: Candidates, session_id: str | None = None, key: str = "") -> set[str]:
    found = set()
    for _ in range(40):
        request = RoutingRequest("m", session_key=key)
        if session_id is not None:
            request.notes = {SESSION_ID: session_id}
        found.add(pods.pods[strategy.pick(request, pods, 0.0)].address)
    return found


ADDRESSES = ("10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.10:8000", "[fd00::1]:8000")


def mixed(value: int) -> int:
    """MurmurHash3's fmix64."""
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD % 2**64
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 % 2**64
    return value ^ value >> 33


def test_fnv_is_fnv() -> None:
    """Vectors of the reference implementation (draft-eastlake-fnv, appendix C)."""
    assert fnv1a(b"") == 0xCBF29CE484222325
    assert fnv1a(b"a") == 0xAF63DC4C8601EC8C
    assert fnv1a(b"foobar") == 0x85944171F73967E8


def test_a_session_goes_back_to_its_pod(tables: Tables) -> None:
    pods = candidates(tables, *ADDRESSES)
    for index, address in enumerate(ADDRESSES):
        request = RoutingRequest("m")
        affinity().chosen(request, pods, index, 0.0)
        assert request.notes is not None
        session_id = request.notes[NEW_SESSION_ID]
        assert len(session_id) == ID_LENGTH
        assert picks(affinity(), pods, session_id) == {address}


def test_without_a_session_any_pod_is_taken(tables: Tables) -> None:
    pods = candidates(tables, *ADDRESSES)
    assert picks(affinity(), pods) == set(ADDRESSES)
    assert np.isnan(affinity().scores(RoutingRequest("m"), pods, 0.0)).all()


@pytest.mark.parametrize(
    "session_id",
    [
        base64.b64encode(b"10.0.0.2:8000").decode(),
        base64.b64encode(b"10.0.0.2:8000").decode()[:ID_LENGTH].ljust(ID_LENGTH, "A"),
        "A" * ID_LENGTH,
        "é" * ID_LENGTH,
        "A" * 100_000,
        "",
    ],
)
def test_a_client_cannot_make_an_id(tables: Tables, session_id: str) -> None:
    assert picks(affinity(), candidates(tables, *ADDRESSES), session_id) == set(ADDRESSES)


def test_an_id_of_another_secret_or_a_pod_that_is_gone_counts_for_nothing(tables: Tables) -> None:
    pods = candidates(tables, *ADDRESSES)
    session_id = affinity(b"other").session_id(pods.pods[1])
    assert picks(affinity(), pods, session_id) == set(ADDRESSES)
    fewer = candidates(tables, ADDRESSES[0], ADDRESSES[2])
    assert picks(affinity(), fewer, affinity().session_id(pods.pods[1])) == {ADDRESSES[0], ADDRESSES[2]}


def test_an_id_does_not_tell_the_address(tables: Tables) -> None:
    pod = candidates(tables, *ADDRESSES).pods[0]
    raw = base64.urlsafe_b64decode(affinity().session_id(pod) + "==")
    assert len(raw) == 16
    assert b"10.0.0" not in raw


@settings(deadline=None)
@given(st.text(min_size=1, max_size=64), st.permutations(ADDRESSES))
def test_a_key_goes_to_the_highest_hash(tables: Tables, key: str, addresses: list[str]) -> None:
    pods = candidates(tables, *addresses)
    wanted = max(ADDRESSES, key=lambda address: mixed(fnv1a(key.encode() + b"\0" + address.encode())))
    assert picks(affinity(), pods, key=key) == {wanted}


@pytest.mark.parametrize("pattern", ["127.0.0.1:800{}", "10.0.0.{}:8000", "vllm-{}.svc:8000"])
@pytest.mark.parametrize("keys", ["u{}", "session-{:08}"])
def test_keys_spread_evenly_however_alike_the_addresses_are(tables: Tables, pattern: str, keys: str) -> None:
    pods = candidates(tables, *(pattern.format(n) for n in range(1, 5)))
    strategy = affinity()
    homes = Counter(strategy.pick(RoutingRequest("m", session_key=keys.format(n)), pods, 0.0) for n in range(1000))
    assert min(homes.values()) > 200 and max(homes.values()) < 300


def test_a_key_moves_only_when_its_pod_goes(tables: Tables) -> None:
    strategy = affinity()
    all_pods = candidates(tables, *ADDRESSES)
    homes = {f"user-{n}": picks(strategy, all_pods, key=f"user-{n}").pop() for n in range(200)}
    assert min(Counter(homes.values()).values()) > 20
    fewer = candidates(tables, *ADDRESSES[1:])
    for key, home in homes.items():
        if home != ADDRESSES[0]:
            assert picks(strategy, fewer, key=key) == {home}


def test_the_id_comes_before_the_key_and_long_keys_are_ignored(tables: Tables) -> None:
    pods = candidates(tables, *ADDRESSES)
    home = picks(affinity(), pods, key="k").pop()
    other = next(pod for pod in pods.pods if pod.address != home)
    assert picks(affinity(), pods, affinity().session_id(other), "k") == {other.address}
    assert picks(affinity(), pods, "A" * ID_LENGTH, "k") == {home}
    assert len(picks(affinity(), pods, key="k" * 256)) == 1
    assert picks(affinity(), pods, key="k" * 257) == set(ADDRESSES)
    assert picks(affinity(), pods, key="é" * 129) == set(ADDRESSES)


def test_equal_addresses_do_not_matter(tables: Tables) -> None:
    assert picks(affinity(), candidates(tables, "a:1", "a:1"), key="k") == {"a:1"}


def test_in_a_combination_the_sessions_pod_is_the_cheapest(tables: Tables) -> None:
    pods = candidates(tables, *ADDRESSES)
    request = RoutingRequest("m")
    request.notes = {SESSION_ID: affinity().session_id(pods.pods[2])}
    assert affinity().scores(request, pods, 0.0).tolist() == [1.0, 1.0, 0.0, 1.0]


def test_what_is_remembered_of_fleets_is_bounded(tables: Tables) -> None:
    strategy = affinity()
    for n in range(300):
        picks(strategy, candidates(tables, f"10.1.0.{n}:1", "b:2"), key="k")
    assert len(strategy._fleets) <= 64
