"""User records, the users file, and the book that a worker keeps of it."""

import asyncio
import errno
import stat
from multiprocessing import get_context
from pathlib import Path

import pytest
from waiting import until

import workers.users
from router.limits import Gate, Grant, Limits, SharedCounters, digest_of
from state.tables import Capacity, Tables
from workers.users import UserBook, UserRecord, UsersError, UsersFile, new_key, parse_users, read_users

YAML = """
users:
  - name: alice
    rpm: 60
    tpm: 100000
  - {name: bob, rpm: -1, keys: [%s]}
  - name: "007"
""" % ("ab" * 32)


def test_a_file_as_people_write_it() -> None:
    users = parse_users(YAML, Path("users.yaml"))
    assert users["alice"] == UserRecord("alice", 60, 100_000)
    assert users["bob"] == UserRecord("bob", -1, 0, ("ab" * 32,))
    assert [users[name].limits for name in users] == [Limits(60, 100_000), Limits(-1, -1000), Limits(100, 100_000)]


def test_the_same_as_json() -> None:
    text = '{"users": [{"name": "alice", "rpm": 60, "tpm": 0}]}'
    assert parse_users(text, Path("u.json")) == parse_users(text, Path("u.yaml")) == {"alice": UserRecord("alice", 60)}


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "users:\n", "users: []\n"])
def test_nobody_yet(text: str) -> None:
    assert parse_users(text, Path("users.yaml")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("users: {", "u.yaml: line 1"),
        ("- name: alice", "must hold `users:`"),
        ("alice: 60", "must hold `users:`"),
        ("users: []\nmore: 1", "must hold `users:`"),
        ("users: [alice]", "user 1: must be a record with a name"),
        ("users: [{name: 7}]", "user 1: must be a record with a name .in quotes"),
        ("users: [{name: a, limit: 3}]", "user 1 .'a'.: no key 'limit'; known: name, rpm, tpm, keys"),
        ("users: [{name: a}, {name: a}]", "user 'a' is listed twice"),
        ("users: [{name: ' a'}]", "is not a valid user name"),
        ("users: [{name: ''}]", "is not a valid user name"),
        ("users: [{name: a, rpm: many}]", "u.yaml: user 'a': rpm must be a whole number below 2.53, not 'many'"),
        ("users: [{name: a, tpm: 1.5}]", "tpm must be a whole number"),
        ("users: [{name: a, rpm: true}]", "rpm must be a whole number"),
        ("users: [{name: a, keys: [pm-plain]}]", "keys must be SHA-256 digests"),
        ("users: [{name: a, keys: pm-plain}]", "keys must be a list"),
        (f"users: [{{name: a, keys: [{'0f' * 32}]}}, {{name: b, keys: [{'0f' * 32}]}}]", "'a' and 'b' have the same"),
    ],
)
def test_files_that_cannot_be_used_say_why_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsersError, match=message) as caught:
        parse_users(text, Path("u.yaml"))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsersError, match="no such users file; `pointsman users add` makes it"):
        read_users(tmp_path / "none.yaml")
    with pytest.raises(UsersError, match="cannot be read: Is a directory"):
        read_users(tmp_path)
    (tmp_path / "u.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsersError, match="is not UTF-8 text"):
        read_users(tmp_path / "u.yaml")
    (tmp_path / "u.json").write_text('{"users": [}')
    with pytest.raises(UsersError, match="line 1, column 12: not JSON"):
        read_users(tmp_path / "u.json")


@pytest.mark.parametrize("name", ["users.yaml", "users.json"])
def test_a_users_file_is_written_whole_and_keeps_its_mode(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    store = UsersFile(path)
    store.add(UserRecord("zoë", 5, 0, (digest_of("pm-1"),)))
    store.add(UserRecord("adam", rpm=-1))
    assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0, "digests are not for everybody"
    path.chmod(0o600)
    assert store.change("zoë", rpm=None, tpm=7, new_key=digest_of("pm-2"), revoke_keys=False) == UserRecord(
        "zoë", 5, 7, (digest_of("pm-1"), digest_of("pm-2"))
    )
    assert store.change("zoë", rpm=6, tpm=None, new_key=None, revoke_keys=True) == UserRecord("zoë", 6, 7)
    assert store.records() == [UserRecord("adam", -1), UserRecord("zoë", 6, 7)]
    store.remove("adam")
    assert store.records() == [UserRecord("zoë", 6, 7)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_change_that_cannot_be_made_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "users.yaml"
    path.write_text(YAML)
    store = UsersFile(path)
    for what, message in (
        (lambda: store.add(UserRecord("alice")), "user 'alice' exists already"),
        (lambda: store.add(UserRecord("a\nb")), "is not a valid user name"),
        (lambda: store.add(UserRecord("eve", rpm=1 << 60)), "rpm must be"),
        (lambda: store.remove("eve"), "no user 'eve'"),
        (lambda: store.change("eve", rpm=1, tpm=1, new_key=None, revoke_keys=False), "no user 'eve'"),
        (lambda: store.change("alice", rpm=1 << 60, tpm=1, new_key=None, revoke_keys=False), "rpm must be"),
    ):
        with pytest.raises(UsersError, match=message):
            what()
    assert path.read_text() == YAML
    with pytest.raises(UsersError, match="cannot be opened"):
        UsersFile(tmp_path / "none" / "users.yaml").add(UserRecord("a"))


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "users.yaml"
    link = tmp_path / "users.yaml"
    link.symlink_to(target)
    UsersFile(link).add(UserRecord("a"))
    assert link.is_symlink() and target.exists()


def _add(path: Path, number: int) -> None:
    UsersFile(path).add(UserRecord(f"user {number}"))


def test_two_who_change_the_file_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "users.json"
    with get_context("fork").Pool(4) as pool:
        pool.starmap(_add, [(path, number) for number in range(24)])
    assert len(read_users(path)) == 24


def test_keys_are_long_random_and_recognisable() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("pm-") and len(key) == 46 for key in keys)


async def test_a_worker_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.users, "LOOK_SECONDS", 0.01)
    path = tmp_path / "users.yaml"
    book = UserBook(path, 10)
    assert book.limits_of("alice") is None
    watching = asyncio.create_task(book.watch())

    store, key = UsersFile(path), new_key()
    store.add(UserRecord("alice", 60, 0, (digest_of(key),)))
    await until(lambda: book.limits_of("alice") == Limits(60, 60_000))
    assert book.user_of(digest_of(key)) == "alice" and book.has_keys("alice")
    assert book.user_of(digest_of("pm-other")) is None
    store.change("alice", rpm=70, tpm=None, new_key=None, revoke_keys=True)
    await until(lambda: book.limits_of("alice") == Limits(70, 70_000))
    assert book.user_of(digest_of(key)) is None and not book.has_keys("alice")
    path.write_text("users: [")
    before = book._seen
    await until(lambda: book._seen != before)
    path.unlink()
    await until(lambda: book._seen == 2)
    assert book.limits_of("alice") == Limits(70, 70_000), "what cannot be read changes nothing"
    path.write_text("users: [{name: bob}]")
    await until(lambda: book.limits_of("bob") is not None)
    assert book.limits_of("alice") is None
    watching.cancel()


async def test_a_file_that_cannot_be_read_for_a_moment_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that was revoked meanwhile does not stay good."""
    monkeypatch.setattr(workers.users, "LOOK_SECONDS", 0.01)
    path, key = tmp_path / "users.yaml", new_key()
    UsersFile(path).add(UserRecord("alice", 60, 0, (digest_of(key),)))
    book = UserBook(path, 10)
    watching = asyncio.create_task(book.watch())
    tries: list[Path] = []

    def read_text(self: Path) -> str:
        tries.append(self)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as spoiled:
        spoiled.setattr(Path, "read_text", read_text)
        path.write_text("users: [{name: alice}]")
        await until(lambda: len(tries) > 3)
        assert book.user_of(digest_of(key)) == "alice"
    await until(lambda: book.user_of(digest_of(key)) is None)
    assert "".join(capsys.readouterr()).count("Too many open files") == 1
    watching.cancel()


def test_limits_from_a_file_through_the_gate(tmp_path: Path) -> None:
    path, key = tmp_path / "users.yaml", new_key()
    UsersFile(path).add(UserRecord("alice", 2, 0, (digest_of(key),)))
    tables = Tables.create(Capacity(pods=2, writers=4, series=64, limited_users=4, limited_models=4), writer=3)
    counters = SharedCounters(tables.user_minutes, tables.model_seconds, UserBook(path, 4), lambda: 0.0)
    gate = Gate(counters, tables.series(), require_key=True)
    assert gate.admit(b"", f"Bearer {key}".encode()) == Grant("alice", True, 1)


def test_more_users_than_can_be_counted_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "users.yaml"
    path.write_text("users: [{name: a}, {name: b}]")
    UserBook(path, 1)
    assert "more users than can be counted" in "".join(capsys.readouterr())
