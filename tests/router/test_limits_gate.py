"""The gate: who a request is from, what it is charged, and which answer it gets when it may not pass."""

from collections.abc import Awaitable, Iterator, Mapping
from typing import Any

import pytest

from router.errors import RequestError
from router.limits import (
    NOBODY,
    Answer,
    Ask,
    Gate,
    Grant,
    Limits,
    Outcome,
    SharedCounters,
    Totals,
    digest_of,
    effective,
)
from state.series import Series
from state.tables import Capacity, Tables

ALICES_KEY, BOBS_KEY = "pm-of-alice", "pm-of-bob"


class Book:
    """Users at hand: alice and bob have keys, carol has none."""

    limits: Mapping[str, Limits] = {"alice": Limits(3, 100), "bob": Limits(5, 10), "carol": Limits(2, 1000)}
    keys: Mapping[str, str] = {digest_of(ALICES_KEY): "alice", digest_of(BOBS_KEY): "bob"}

    def __init__(self, limits: Mapping[str, Limits] | None = None) -> None:
        if limits is not None:
            self.limits = limits

    def limits_of(self, user: str) -> Limits | None:
        return self.limits.get(user)

    def user_of(self, key_digest: str) -> str | None:
        return self.keys.get(key_digest)

    def has_keys(self, user: str) -> bool:
        return user in self.keys.values()


class Bench:
    """A gate over real tables, and a clock."""

    def __init__(
        self, *, users: bool = True, rows: int = 8, limits: Mapping[str, Limits] | None = None, **options: Any
    ) -> None:
        self.now = 600.0
        capacity = Capacity(pods=2, writers=4, series=64, limited_users=rows, limited_models=rows)
        self.tables = Tables.create(capacity, writer=3)
        self.counters = SharedCounters(
            self.tables.user_minutes, self.tables.model_seconds, Book(limits) if users else None, lambda: self.now
        )
        self.gate = Gate(self.counters, self.tables.series(), **options)

    def admit(self, user: str = "", authorization: str = "") -> Grant:
        grant = self.gate.admit(user.encode(), authorization.encode())
        assert isinstance(grant, Grant)
        return grant

    def refused(self, *what: Any, **named: Any) -> RequestError:
        with pytest.raises(RequestError) as caught:
            self.admit(*what, **named)
        return caught.value

    def outages(self) -> dict[str, float]:
        return {labels[1]: value for labels, value in self.tables.series().items() if labels[0] == "limits_outage"}


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield Bench()


def header(error: RequestError, name: str) -> bytes | None:
    return dict(error.headers).get(name)


def test_the_limits_a_record_means() -> None:
    assert effective(0, 0) == (100, 100_000)
    assert effective(60, 0) == (60, 60_000)
    assert effective(0, 7) == (100, 7)
    assert effective(-1, 0) == (-1, -1000)


def test_requests_of_nobody_cost_nothing(bench: Bench) -> None:
    assert bench.admit() is NOBODY
    assert bench.admit("", "Bearer EMPTY") is NOBODY
    assert bench.admit("", "Basic YWxhZGRpbg==") is NOBODY


def test_requests_of_a_minute(bench: Bench) -> None:
    bench.now = 610.5
    assert [bench.admit("carol").requests for _ in range(2)] == [1, 2]
    error = bench.refused("carol")
    assert (error.status, error.message) == (429, "user: carol has exceeded RPM: 2")
    assert header(error, "Retry-After") == b"50"
    assert header(error, "x-error-rpm-exceeded") == b"true"
    bench.now = 660.0
    assert bench.admit("carol") == Grant("carol", True, 1, 0)


def test_tokens_of_a_minute(bench: Bench) -> None:
    key = f"Bearer {BOBS_KEY}"
    assert bench.admit("", key) == Grant("bob", True, 1, 0)
    assert bench.gate.add_tokens("bob", 9) == Totals(1, 9)
    assert bench.admit("", key).tokens == 9
    assert bench.gate.add_tokens("bob", 30) == Totals(2, 39)
    error = bench.refused("", key)
    assert (error.status, error.message) == (429, "user: bob has exceeded TPM: 10")
    assert header(error, "x-error-tpm-exceeded") == b"true"
    assert header(error, "Retry-After") == b"60"
    assert bench.gate.add_tokens("bob", 0) == Totals(2, 39), "the refused one is not counted"


def test_an_unknown_user(bench: Bench) -> None:
    for name in ("mallory", "m" * 1000, "alice\x00"):
        error = bench.refused(name)
        assert (error.status, header(error, "x-error-user")) == (401, b"true")
    with pytest.raises(RequestError, match="unknown user"):
        bench.gate.admit(b"\xff\xfe", b"")
    assert bench.gate.add_tokens("mallory", 5) == Totals(0, 0)


def test_a_key_says_who_it_is_and_the_header_may_only_agree(bench: Bench) -> None:
    assert bench.admit("", f"Bearer {ALICES_KEY}").user == "alice"
    assert bench.admit("alice", f"bearer  {ALICES_KEY} ").user == "alice"
    for user, authorization in (
        ("bob", f"Bearer {ALICES_KEY}"),
        ("", "Bearer pm-forged"),
        ("carol", "Bearer pm-forged"),
        ("alice", ""),
        ("alice", "Bearer EMPTY"),
        ("alice", ALICES_KEY),
        ("alice", f"Bearer\t{ALICES_KEY}"),
    ):
        error = bench.refused(user, authorization)
        assert (error.status, error.code, error.param) == (401, "invalid_api_key", "api_key")
    assert bench.admit("alice", f"BEARER {ALICES_KEY}").requests == 3, "none of the refused is counted"
    assert bench.refused("", f"Bearer {ALICES_KEY}").status == 429


def test_where_a_key_is_required_nothing_else_will_do() -> None:
    bench = Bench(require_key=True, static_token="everybody")
    assert bench.admit("", f"Bearer {ALICES_KEY}").user == "alice"
    for user, authorization in (("", ""), ("carol", ""), ("carol", "Bearer everybody"), ("", "Bearer pm-forged")):
        assert bench.refused(user, authorization).code == "invalid_api_key"


@pytest.mark.parametrize(
    ("authorization", "passes"),
    [
        ("Bearer s3cret", True),
        ("bEARER s3cret", True),
        ("  Bearer   s3cret  ", True),
        ("Bearer\ts3cret", False),
        ("Bearers3cret", False),
        ("s3cret", False),
        ("Basic s3cret", False),
        ("Bearer s3cre", False),
        ("Bearer s3cret2", False),
        ("Bearer ", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("users", [True, False])
def test_the_static_token(authorization: str, passes: bool, users: bool) -> None:
    bench = Bench(static_token=" s3cret ", users=users)
    if passes:
        assert bench.admit("", authorization) is NOBODY
        assert bench.admit("carol", authorization).user == "carol"
    else:
        error = bench.refused("carol", authorization)
        assert (error.status, error.message) == (401, "Incorrect API key provided")


def test_a_users_key_is_as_good_as_the_static_token() -> None:
    bench = Bench(static_token="s3cret")
    assert bench.admit("", f"Bearer {BOBS_KEY}").user == "bob"
    assert bench.refused("bob", "Bearer s3cret").code == "invalid_api_key", "bob has keys, so he needs one"
    assert bench.refused("", "Bearer pm-forged").code == "invalid_api_key"


def test_without_user_records_a_user_is_a_name() -> None:
    bench = Bench(users=False)
    assert bench.admit("mallory") == Grant("mallory")
    assert bench.admit("mallory", "Bearer pm-x").user == "mallory"
    assert bench.gate.add_tokens("mallory", 5) == Totals(0, 0)


def test_requests_of_a_model_in_a_second(bench: Bench) -> None:
    first = bench.gate.admit_model("m", 2)
    assert isinstance(first, Grant)
    bench.gate.admit_model("m", 2)
    with pytest.raises(RequestError) as caught:
        bench.gate.admit_model("m", 2)
    assert (caught.value.status, caught.value.message) == (429, "model: m has exceeded RPS: 2")
    assert header(caught.value, "x-error-model-rps-exceeded") == b"true"
    assert header(caught.value, "Retry-After") == b"1"
    bench.gate.give_back_model(first)
    bench.gate.admit_model("m", 2)
    bench.now += 1
    bench.gate.admit_model("m", 2)
    assert bench.gate.admit_model("other", 0) is NOBODY
    bench.gate.give_back_model(NOBODY)


def test_user_and_model_are_charged_together_or_not_at_all(bench: Bench) -> None:
    ask = bench.counters.ask
    assert ask(Ask("carol", "", "m", 1)).requests == 1
    assert ask(Ask("carol", "", "m", 1)) == Answer(Outcome.OVER_MODEL_RPS, "carol", 1)
    bench.now += 1
    assert ask(Ask("carol", "", "m", 2)).requests == 2, "the refused one is not counted for the user"
    assert ask(Ask("carol", "", "m", 2)).outcome is Outcome.OVER_RPM
    assert ask(Ask("", "", "m", 2)).outcome is Outcome.ADMITTED, "and not for the model"


def test_more_users_than_rows_meet_the_outage_policy() -> None:
    for policy in ("open", "closed"):
        bench = Bench(rows=1, on_outage=policy)
        bench.admit("carol")
        if policy == "open":
            assert bench.admit("", f"Bearer {BOBS_KEY}").user == "bob"
        else:
            error = bench.refused("", f"Bearer {BOBS_KEY}")
            assert (error.status, header(error, "Retry-After")) == (503, b"1")
        assert bench.outages() == {policy: 1.0}
        assert bench.gate.add_tokens("bob", 1) is None


class Remote:
    """Counters whose answer has been decided; given at once or to be awaited."""

    has_users = True

    def __init__(self, answer: Answer, later: bool) -> None:
        self._answer = answer
        self._later = later

    def ask(self, ask: Ask) -> Answer | Awaitable[Answer]:
        async def wait() -> Answer:
            return self._answer

        return wait() if self._later else self._answer

    def add_tokens(self, user: str, tokens: int) -> Totals | None:
        return None

    def give_back_model(self, model: str, window: int) -> None:
        raise AssertionError


async def outcome(answer: Answer, later: bool, user: str, authorization: str, **options: Any) -> Grant | int:
    series = Series(memoryview(bytearray(Series.size(64))))
    gate = Gate(Remote(answer, later), series, **options)
    try:
        grant = gate.admit(user.encode(), authorization.encode())
        assert isinstance(grant, Grant) is not later
        return grant if isinstance(grant, Grant) else await grant
    except RequestError as error:
        return error.status


@pytest.mark.parametrize("later", [True, False])
async def test_answers_at_once_and_answers_to_wait_for_mean_the_same(later: bool) -> None:
    assert await outcome(Answer(Outcome.ADMITTED, "a", requests=4, tokens=9), later, "a", "") == Grant("a", True, 4, 9)
    for what, status in (
        (Outcome.UNKNOWN_USER, 401),
        (Outcome.WRONG_KEY, 401),
        (Outcome.OVER_RPM, 429),
        (Outcome.OVER_TPM, 429),
        (Outcome.OVER_MODEL_RPS, 429),
        (Outcome.BROKEN_RECORD, 500),
    ):
        assert await outcome(Answer(what, "a"), later, "a", "") == status


@pytest.mark.parametrize("later", [True, False])
async def test_in_an_outage_the_policy_lifts_limits_and_not_identity(later: bool) -> None:
    unknown, alices = Answer(Outcome.OUTAGE), Answer(Outcome.OUTAGE, "alice")
    key = "Bearer pm-x"
    assert await outcome(unknown, later, "a", "") == Grant("a", True)
    assert await outcome(unknown, later, "", key) == Grant()
    assert await outcome(unknown, later, "a", key) == Grant()
    assert await outcome(alices, later, "", key) == Grant("alice", True)
    assert await outcome(alices, later, "bob", key) == 401
    for options in ({"require_key": True}, {"static_token": "s"}):
        assert await outcome(unknown, later, "", key, **options) == 503
        assert await outcome(alices, later, "", key, **options) == Grant("alice", True)
    for answer in (unknown, alices):
        assert await outcome(answer, later, "", key, on_outage="closed") == 503
    assert await outcome(unknown, later, "a", "", on_outage="closed") == 503


@pytest.mark.parametrize("who", ["nobody", "static token", "user", "key"])
def test_cost(benchmark: Any, who: str) -> None:
    endless = Limits(1 << 31, 1 << 31)
    bench = Bench(static_token="s3cret" if who == "static token" else "", limits={"carol": endless, "alice": endless})
    user, authorization = {
        "nobody": (b"", b"Bearer EMPTY"),
        "static token": (b"", b"Bearer s3cret"),
        "user": (b"carol", b""),
        "key": (b"", f"Bearer {ALICES_KEY}".encode()),
    }[who]
    benchmark(bench.gate.admit, user, authorization)
