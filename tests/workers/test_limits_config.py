"""The gate that a configuration means."""

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from router.errors import RequestError
from router.limits import NOBODY, Gate, Grant, Totals
from state.tables import Capacity, Tables
from workers.config import load
from workers.limits import open_gate
from workers.users import UserRecord, UsersFile
from workers.users_redis import RedisUsers


def tables() -> Tables:
    return Tables.create(Capacity(pods=2, writers=4, series=64, limited_users=4, limited_models=4), writer=3)


async def admitted(gate: Gate, user: str, authorization: str = "") -> Grant:
    return await settled(gate.admit(user.encode(), authorization.encode()))


async def settled(grant: Grant | Awaitable[Grant]) -> Grant:
    return grant if isinstance(grant, Grant) else await grant


async def used(gate: Gate, user: str, tokens: int) -> Totals | None:
    totals = gate.add_tokens(user, tokens)
    return totals if totals is None or isinstance(totals, Totals) else await totals


@pytest.mark.parametrize("place", ["file", "redis"])
async def test_the_same_users_in_a_file_and_in_redis(place: str, tmp_path: Path, valkey_url: str) -> None:
    flags: dict[str, Any] = {"redis": valkey_url} if place == "redis" else {}
    flags["limits"] = {"timeout_seconds": 5, "bearer_token": "t"}
    if place == "file":
        flags["limits"]["users_file"] = tmp_path / "users.yaml"
    store = RedisUsers(valkey_url) if place == "redis" else UsersFile(tmp_path / "users.yaml")
    store.add(UserRecord("alice", 1000, 10))
    async with open_gate(load(None, flags), made := tables(), made.series()) as gate:
        grant = await admitted(gate, "alice", "Bearer t")
        assert (grant.user, grant.limited) == ("alice", True)
        of_model = await settled(gate.admit_model("m", 5))
        assert of_model.model == "m"
        totals = await used(gate, "alice", 10)
        assert totals is not None and totals.tokens == 10
        with pytest.raises(RequestError, match="has exceeded TPM: 10"):
            await admitted(gate, "alice", "Bearer t")
        with pytest.raises(RequestError, match="unknown user bob"):
            await admitted(gate, "bob", "Bearer t")
        with pytest.raises(RequestError, match="Incorrect API key"):
            await admitted(gate, "alice", "Bearer u")
        gate.give_back_model(of_model)
        assert await admitted(gate, "", "Bearer t") is NOBODY


async def test_without_users_models_are_limited_all_the_same() -> None:
    async with open_gate(load(None), made := tables(), made.series()) as gate:
        assert await admitted(gate, "anybody") == Grant("anybody")
        with pytest.raises(RequestError, match="model: m has exceeded RPS: 1"):
            for _ in range(100):  # in how many seconds soever that is done
                gate.admit_model("m", 1)
        assert await used(gate, "anybody", 10) == Totals(0, 0)
