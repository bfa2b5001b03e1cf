"""`pointsman users`, as a person uses it, on a file and on a real server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from router.limits import digest_of
from workers.cli import main

Users = Callable[..., Result]


@pytest.fixture(params=["file", "redis"])
def users(request: pytest.FixtureRequest, tmp_path: Path, valkey_url: str) -> Users:
    config = tmp_path / "pointsman.yaml"
    if request.param == "file":
        config.write_text("limits: {users_file: users.yaml}\n")
    else:
        config.write_text(f"redis: {valkey_url}\n")

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["users", *arguments, "--config", str(config)])

    return run


def listed(users: Users) -> dict[str, Any]:
    lines = users("list", "--json").stdout.splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def test_the_life_of_a_user(users: Users) -> None:
    assert users("add", "alice", "--rpm", "60", "--tpm", "100000").exit_code == 0
    made = users("add", "bob", "--key")
    key = made.stdout.strip()
    assert made.exit_code == 0 and key.startswith("pm-") and "shown this once" in made.stderr
    assert listed(users) == {
        "alice": {"name": "alice", "rpm": 60, "tpm": 100000, "keys": []},
        "bob": {"name": "bob", "rpm": 0, "tpm": 0, "keys": [digest_of(key)]},
    }
    assert [line.split() for line in users("list").stdout.splitlines()] == [
        ["NAME", "RPM", "TPM", "KEYS"],
        ["alice", "60", "100000", "0"],
        ["bob", "100", "100000", "1"],
    ]
    assert users("set", "alice", "--rpm", "-1").exit_code == 0
    second = users("set", "bob", "--key").stdout.strip()
    assert listed(users)["alice"]["rpm"] == -1 and listed(users)["alice"]["tpm"] == 100000
    assert set(listed(users)["bob"]["keys"]) == {digest_of(key), digest_of(second)}
    third = users("set", "bob", "--key", "--revoke-keys").stdout.strip()
    assert listed(users)["bob"]["keys"] == [digest_of(third)]
    assert users("set", "bob", "--revoke-keys").exit_code == 0
    assert listed(users)["bob"]["keys"] == []
    assert users("remove", "bob").exit_code == 0
    assert users("remove", "alice").exit_code == 0
    assert users("list").stderr == "no users\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "alice"), "user 'alice' exists already; change it with `pointsman users set alice`"),
        (("set", "eve", "--rpm", "1"), "no user 'eve'; `pointsman users list` shows those there are"),
        (("remove", "eve"), "no user 'eve'"),
        (("set", "alice"), "nothing to change: give --rpm, --tpm, --key or --revoke-keys"),
        (("add", " "), "is not a valid user name"),
        (("add", "x", "--rpm", str(1 << 60)), "rpm must be a whole number below 2^53"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(users: Users, arguments: tuple[str, ...], message: str) -> None:
    users("add", "alice")
    result = users(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["users", *arguments, "--config", str(config)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("workers: 1\n", "nowhere to keep users: set limits.users_file or redis"),
        ("redis: redis://127.0.0.1:1/0\n", "redis://127.0.0.1:1/0: "),
        ("redis: redis://:secret@127.0.0.1:1/0\n", "redis://127.0.0.1:1/0: "),
        ("redis: localhost\n", "redis: not a Redis URL"),
        ("redis: redis://h/0\nlimits: {users_file: u.yaml}\n", "leave one of them out"),
        ("limits: {require_key: true}\n", "there are no users to have keys"),
        ("limits: {on_outage: maybe}\n", "limits.on_outage"),
        ("limits: {users_file: none.yaml}\n", "no such users file"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, config: str, message: str) -> None:
    path = tmp_path / "pointsman.yaml"
    path.write_text(config)
    result = run(path, "list")
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert "secret" not in result.output


def test_the_router_does_not_start_with_a_users_file_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "pointsman.yaml"
    path.write_text("limits: {users_file: users.yaml}\n")
    (tmp_path / "users.yaml").write_text("users: [{name: a, rpm: many}]")
    result = CliRunner().invoke(main, ["check-config", "--config", str(path)])
    assert result.exit_code == 2 and "rpm must be a whole number" in result.stderr


def test_the_static_token_is_taken_from_aibrix_and_never_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIBRIX_AUTH_BEARER_TOKEN", " hush-hush ")
    path = tmp_path / "pointsman.yaml"
    path.write_text("limits: {on_outage: closed}\n")
    result = CliRunner().invoke(main, ["check-config", "--config", str(path)])
    assert result.exit_code == 0 and "bearer_token: '**********'" in result.stdout and "hush" not in result.output
    from workers.config import load

    config = load(path)
    assert config.limits.bearer_token.get_secret_value() == "hush-hush" and config.limits.on_outage == "closed"


def test_records_of_the_metadata_service_keep_what_is_not_ours(tmp_path: Path, valkey_url: str) -> None:
    path = tmp_path / "pointsman.yaml"
    path.write_text(f"redis: {valkey_url}\n")
    with redis.Redis.from_url(valkey_url, decode_responses=True) as client:
        client.set("aibrix-users/alice", '{"name": "alice", "rpm": 5, "tpm": 6, "team": "blue"}')
        key = run(path, "set", "alice", "--rpm", "7", "--key").stdout.strip()
        assert json.loads(client.get("aibrix-users/alice")) == {"name": "alice", "rpm": 7, "tpm": 6, "team": "blue"}
        assert client.get("pointsman-keys/" + digest_of(key)) == "alice"
        client.delete("aibrix-users/alice")  # as the metadata service does; the key stays behind
        assert run(path, "add", "alice").exit_code == 0
        assert client.get("pointsman-keys/" + digest_of(key)) is None, "an old key is none of a new user's"
        client.set("aibrix-users/bad", "{")
        assert "record of user 'bad' cannot be read" in run(path, "list").stderr
        assert run(path, "set", "bad", "--rpm", "1", "--tpm", "2").exit_code == 0
        assert "bad" in run(path, "list").stdout
        run(path, "remove", "bad")
        run(path, "remove", "alice")
        assert client.dbsize() == 0
