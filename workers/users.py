"""User records: what they say, the file they are in where there is no Redis, and users' API keys.

    users:
      - name: alice
        rpm: 60          # requests a minute; 0 or left out: 100; negative: none at all
        tpm: 100000      # tokens a minute; 0 or left out: 1000 for each request
        keys: [<SHA-256 of an API key, hex>]

The names and their meaning are those of AIBrix's records. A file whose name ends in .json holds the same as JSON, and
is the better choice for more than some hundred users: 1,000 of them are read in 2 ms, in YAML it takes half a second
(in a thread). `pointsman users` edits the file, or an editor does; running workers see the change within seconds.

An API key is shown once, when it is made; of it, only the SHA-256 digest is kept (`router/limits.py` says why that
is enough).
"""

import asyncio
import contextlib
import fcntl
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import orjson
import structlog
import yaml

from router.limits import KEY_PREFIX, MAX_USER_LENGTH, Limits, effective
from workers.documents import NotYaml, read_yaml
from workers.last_users import LastUsers

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
"""Between two looks at whether the users file has changed."""
_HEX: Final = frozenset("0123456789abcdef")
_LARGEST: Final = (1 << 53) - 1  # beyond it Redis's Lua does not count in whole numbers


class UsersError(Exception):
    """A record, or the place where it is kept, cannot be used. The message is one line for a person."""


class Unreadable(UsersError):
    """What a users file holds is not known: it may be readable in a moment, without being another file."""


@dataclass(frozen=True, slots=True)
class UserRecord:
    """One user, as it is written down."""

    name: str
    rpm: int = 0
    tpm: int = 0
    keys: tuple[str, ...] = ()
    """Digests."""

    @property
    def limits(self) -> Limits:
        """What rpm and tpm mean."""
        return effective(self.rpm, self.tpm)


class UserStore(Protocol):
    """Where records are kept. Every method raises UsersError."""

    place: str
    """For people."""

    def records(self) -> list[UserRecord]:
        """All of them, by name."""

    def add(self, record: UserRecord) -> None:
        """A new user."""

    def change(
        self, name: str, *, rpm: int | None, tpm: int | None, new_key: str | None, revoke_keys: bool
    ) -> UserRecord:
        """Change what is not None. `new_key` is a digest. Returns the record as it is now."""

    def remove(self, name: str) -> None:
        """A user and its keys."""


def new_key() -> str:
    """An API key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def checked(record: UserRecord, where: str = "") -> UserRecord:
    """The record itself. Raises UsersError where it cannot be used."""
    name = record.name
    if not name or name != name.strip() or not name.isprintable() or len(name) > MAX_USER_LENGTH:
        raise UsersError(
            f"{where}{name[:MAX_USER_LENGTH]!r} is not a valid user name: it needs 1 to {MAX_USER_LENGTH} printable "
            "characters, without blanks at its ends"
        )
    for field, value in (("rpm", record.rpm), ("tpm", record.tpm)):
        if type(value) is not int or abs(value) > _LARGEST:
            raise UsersError(f"{where}user {name!r}: {field} must be a whole number below 2^53, not {value!r}")
    for key in record.keys:
        if not isinstance(key, str) or len(key) != 64 or not _HEX.issuperset(key):
            raise UsersError(
                f"{where}user {name!r}: keys must be SHA-256 digests of 64 lowercase hex digits, not {key!r}"
            )
    return record


def unknown(name: str, place: str) -> UsersError:
    """Nobody of this name."""
    return UsersError(f"{place}: no user {name!r}; `pointsman users list` shows those there are")


def exists_already(name: str, place: str) -> UsersError:
    """There is one of this name."""
    return UsersError(f"{place}: user {name!r} exists already; change it with `pointsman users set {name}`")


def changed(record: UserRecord, rpm: int | None, tpm: int | None) -> UserRecord:
    """The record with what is not None."""
    return checked(replace(record, rpm=record.rpm if rpm is None else rpm, tpm=record.tpm if tpm is None else tpm))


def read_users(path: Path) -> dict[str, UserRecord]:
    """The records of a users file by name. Raises UsersError."""
    return parse_users(read_text(path), path)


def read_text(path: Path) -> str:
    """What a users file holds. Raises UsersError."""
    try:
        return path.read_text()
    except FileNotFoundError:
        raise UsersError(f"{path}: no such users file; `pointsman users add` makes it") from None
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsersError(f"{path}: is not UTF-8 text") from None


def parse_users(text: str, path: Path) -> dict[str, UserRecord]:
    """The records in a users file's text. Raises UsersError that names the path."""
    document: Any
    if path.suffix == ".json":
        try:
            document = orjson.loads(text) if text.strip() else None
        except orjson.JSONDecodeError as error:
            raise UsersError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    else:
        try:
            document = read_yaml(text)
        except NotYaml as error:
            raise UsersError(f"{path}:{error}") from None
    if document is None:
        return {}
    listed = document.get("users") if isinstance(document, dict) else None
    if not isinstance(document, dict) or set(document) != {"users"} or not isinstance(listed, list | None):
        raise UsersError(f"{path}: must hold `users:` and a list of records with name, rpm and tpm, and nothing else")
    users: dict[str, UserRecord] = {}
    owners: dict[str, str] = {}
    for number, entry in enumerate(listed or (), 1):
        record = checked(_record(entry, f"{path}: user {number}"), f"{path}: ")
        if record.name in users:
            raise UsersError(f"{path}: user {record.name!r} is listed twice")
        for key in record.keys:
            if key in owners:
                raise UsersError(f"{path}: users {owners[key]!r} and {record.name!r} have the same key {key[:8]}…")
            owners[key] = record.name
        users[record.name] = record
    return users


def _record(entry: Any, where: str) -> UserRecord:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UsersError(f"{where}: must be a record with a name (in quotes where it looks like a number)")
    extra = sorted(str(key) for key in entry if key not in ("name", "rpm", "tpm", "keys"))
    if extra:
        raise UsersError(f"{where} ({entry['name']!r}): no key {extra[0]!r}; known: name, rpm, tpm, keys")
    keys = entry.get("keys") or ()
    if not isinstance(keys, list | tuple):
        raise UsersError(f"{where} ({entry['name']!r}): keys must be a list of SHA-256 digests")
    rpm, tpm = entry.get("rpm"), entry.get("tpm")
    return UserRecord(entry["name"], 0 if rpm is None else rpm, 0 if tpm is None else tpm, tuple(keys))


class UsersFile:
    """The store behind `pointsman users` where there is no Redis. Comments in a YAML file do not survive a change."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._path = path

    def records(self) -> list[UserRecord]:
        """See `UserStore.records`."""
        users = read_users(self._path)
        return [users[name] for name in sorted(users)]

    def add(self, record: UserRecord) -> None:
        """See `UserStore.add`. Makes the file where there is none."""
        checked(record)
        with self._changing() as users:
            if record.name in users:
                raise exists_already(record.name, self.place)
            users[record.name] = record

    def change(
        self, name: str, *, rpm: int | None, tpm: int | None, new_key: str | None, revoke_keys: bool
    ) -> UserRecord:
        """See `UserStore.change`."""
        with self._changing() as users:
            if name not in users:
                raise unknown(name, self.place)
            record = changed(users[name], rpm, tpm)
            keys = () if revoke_keys else record.keys
            users[name] = record = replace(record, keys=(*keys, new_key) if new_key else keys)
            return record

    def remove(self, name: str) -> None:
        """See `UserStore.remove`."""
        with self._changing() as users:
            if users.pop(name, None) is None:
                raise unknown(name, self.place)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, UserRecord]]:
        """All records, to be changed in place; written back whole, or not at all. One at a time does it."""
        path = self._path.resolve()
        try:
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UsersError(f"{path.parent}: cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            users = read_users(path) if path.exists() else {}
            yield users
            self._write(path, users)
        except OSError as error:
            raise UsersError(f"{path}: cannot be written: {error.strerror}") from None
        finally:
            os.close(folder)

    @staticmethod
    def _write(path: Path, users: dict[str, UserRecord]) -> None:
        entries: list[dict[str, Any]] = []
        for record in users.values():
            entry: dict[str, Any] = {"name": record.name, "rpm": record.rpm, "tpm": record.tpm}
            if record.keys:
                entry["keys"] = list(record.keys)
            entries.append(entry)
        document = {"users": entries}
        if path.suffix == ".json":
            text = orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n"
        else:
            text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o640
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fchmod(handle, mode)
                os.fsync(handle)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


class UserBook:
    """The users file as a worker has it at hand (`router.limits.Users`). What cannot be read leaves all as it was."""

    def __init__(self, path: Path, room: int, last: LastUsers | None = None) -> None:
        """`room`: how many users can be counted, `Capacity.limited_users`. `last`: for a file that cannot be used now.
        Raises UsersError when that has none either: a worker without users would refuse them all."""
        self._path = path
        self._room = room
        self._last = last
        self._limits: dict[str, Limits] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._with_keys: frozenset[str] = frozenset()
        self._unread = ""
        self._seen: object = self._look()
        users = self._read()
        if isinstance(users, Unreadable):
            self._seen = None
        if last is not None and isinstance(users, UsersError):
            text = last.text()
            if text is None:
                raise users
            log.error("users file cannot be used, keeping those it held before", error=str(users))
            users = parse_users(text, path)
        self._take(users)

    def limits_of(self, user: str) -> Limits | None:
        """None for an unknown user."""
        return self._limits.get(user)

    def user_of(self, key_digest: str) -> str | None:
        """Whose API key that is."""
        digest, user = self._keys.get(key_digest, ("", None))
        return user if hmac.compare_digest(digest, key_digest) else None

    def has_keys(self, user: str) -> bool:
        """Whether the user has any."""
        return user in self._with_keys

    async def watch(self) -> None:
        """Follow the file until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                users = await asyncio.to_thread(self._read)
                if isinstance(users, Unreadable):
                    self._seen = None  # it is tried again
                    if str(users) == self._unread:
                        continue
                self._unread = str(users) if isinstance(users, Unreadable) else ""
                self._take(users)

    def _read(self) -> dict[str, UserRecord] | UsersError:
        try:
            text = read_text(self._path)
            users = parse_users(text, self._path)
        except UsersError as error:
            return error
        if self._last is not None:
            self._last.keep(text)
        return users

    def _take(self, users: dict[str, UserRecord] | UsersError) -> None:
        if isinstance(users, UsersError):
            log.error("users file cannot be used, the users stay as they are", error=str(users))
            return
        if len(users) > self._room:
            log.warning("more users than can be counted at a time", users=len(users), room=self._room)
        self._limits = {name: record.limits for name, record in users.items()}
        self._keys = {key: (key, name) for name, record in users.items() for key in record.keys}
        self._with_keys = frozenset(name for name, record in users.items() if record.keys)

    def _look(self) -> object:
        try:
            status = self._path.stat()
        except OSError as error:
            return error.errno
        return (status.st_mtime_ns, status.st_ino, status.st_size)
