"""The user store in Redis: AIBrix's records, which its metadata service reads and writes too, and our API keys.

`workers/limits_redis.py` says which keys there are. Fields of a record that are not ours stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import orjson
import redis

from workers.limits_redis import KEY_PREFIX, USER_KEYS_PREFIX, USER_PREFIX
from workers.redis_link import parse_redis_url
from workers.users import UserRecord, UsersError, changed, checked, exists_already, unknown

_TIMEOUT_SECONDS: Final = 5.0


class RedisUsers:
    """See `workers.users.UserStore`. For the command line: blocking."""

    def __init__(self, url: str) -> None:
        self.place = parse_redis_url(url).place
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS
        )

    def records(self) -> list[UserRecord]:
        """See `UserStore.records`."""
        with self._speaking():
            found = sorted(self._redis.scan_iter(match=f"{USER_PREFIX}*", count=1000))
            return [self._read(self._redis, key[len(USER_PREFIX) :].decode("utf-8", "replace"))[0] for key in found]

    def add(self, record: UserRecord) -> None:
        """See `UserStore.add`."""
        checked(record)
        document = {"name": record.name, "rpm": record.rpm, "tpm": record.tpm}

        def write(pipe: Any) -> None:
            if pipe.exists(USER_PREFIX + record.name):
                raise exists_already(record.name, self.place)
            stale = pipe.smembers(USER_KEYS_PREFIX + record.name)  # of a user whom the metadata service deleted
            pipe.multi()
            self._drop_keys(pipe, record.name, stale)
            pipe.set(USER_PREFIX + record.name, orjson.dumps(document))
            self._add_keys(pipe, record.name, record.keys)

        self._together(write, record.name)

    def change(
        self, name: str, *, rpm: int | None, tpm: int | None, new_key: str | None, revoke_keys: bool
    ) -> UserRecord:
        """See `UserStore.change`."""

        def write(pipe: Any) -> UserRecord:
            before, document = self._read(pipe, name, mend=rpm is not None and tpm is not None)
            record = changed(before, rpm, tpm)
            pipe.multi()
            document |= {"name": name, "rpm": record.rpm, "tpm": record.tpm}
            pipe.set(USER_PREFIX + name, orjson.dumps(document))
            kept = record.keys
            if revoke_keys:
                self._drop_keys(pipe, name, kept)
                kept = ()
            added = (new_key,) if new_key else ()
            self._add_keys(pipe, name, added)
            return replace(record, keys=(*kept, *added))

        record: UserRecord = self._together(write, name)
        return record

    def remove(self, name: str) -> None:
        """See `UserStore.remove`."""

        def write(pipe: Any) -> None:
            if not pipe.exists(USER_PREFIX + name):
                raise unknown(name, self.place)
            keys = pipe.smembers(USER_KEYS_PREFIX + name)
            pipe.multi()
            self._drop_keys(pipe, name, keys)
            pipe.delete(USER_PREFIX + name)

        self._together(write, name)

    def _read(self, client: Any, name: str, *, mend: bool = False) -> tuple[UserRecord, dict[str, Any]]:
        """A record, and the document it is in. `mend`: a document that cannot be read counts as an empty one."""
        raw = client.get(USER_PREFIX + name)
        if raw is None:
            raise unknown(name, self.place)
        keys = tuple(sorted(digest.decode() for digest in client.smembers(USER_KEYS_PREFIX + name)))
        try:
            document = orjson.loads(raw)
            if not isinstance(document, dict):
                raise ValueError
            record = checked(UserRecord(name, document.get("rpm") or 0, document.get("tpm") or 0, keys))
        except (ValueError, UsersError):
            if mend:
                return UserRecord(name, keys=keys), {}
            raise UsersError(
                f"{self.place}: the record of user {name!r} cannot be read; "
                f"`pointsman users set {name} --rpm N --tpm N` rewrites it"
            ) from None
        return record, document

    @staticmethod
    def _add_keys(pipe: Any, name: str, digests: tuple[str, ...]) -> None:
        for digest in digests:
            pipe.set(KEY_PREFIX + digest, name)
            pipe.sadd(USER_KEYS_PREFIX + name, digest)

    @staticmethod
    def _drop_keys(pipe: Any, name: str, digests: Any) -> None:
        for digest in digests:
            pipe.delete(KEY_PREFIX + (digest.decode() if isinstance(digest, bytes) else digest))
        pipe.delete(USER_KEYS_PREFIX + name)

    def _together(self, write: Any, name: str) -> Any:
        """All of it or nothing, and again if somebody else changed the user meanwhile."""
        with self._speaking():
            return self._redis.transaction(write, USER_PREFIX + name, USER_KEYS_PREFIX + name, value_from_callable=True)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise UsersError(f"{self.place}: {' '.join(str(error).split())}") from None
