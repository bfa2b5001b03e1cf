"""`pointsman users`: who may send, and how much."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import orjson

from router.limits import digest_of
from workers.config import ConfigError, load
from workers.users import UserRecord, UsersError, UsersFile, UserStore, new_key

_CONFIG_ERROR = 2

_config = click.option(
    "--config", "path", type=click.Path(path_type=Path), help="YAML file; see docs/configuration.md."
)
_rpm = click.option("--rpm", type=int, help="Requests per minute; 0: 100; negative: none.")
_tpm = click.option("--tpm", type=int, help="Tokens per minute; 0: 1000 for each request.")


@click.group(short_help="Users, their limits and API keys.")
def users() -> None:
    """Add, list, change and remove the users whose requests are limited.

    They are kept in Redis where the configuration names one, else in the file `limits.users_file`. Running workers
    follow by themselves.
    """


@users.command()
@click.argument("name")
@_rpm
@_tpm
@click.option("--key", is_flag=True, help="Make an API key, and print it: it cannot be shown again.")
@_config
def add(name: str, rpm: int | None, tpm: int | None, key: bool, path: Path | None) -> None:
    """Add the user NAME."""
    made = new_key() if key else None
    with _store(path) as store:
        store.add(UserRecord(name, rpm or 0, tpm or 0, (digest_of(made),) if made else ()))
    _show_key(made)


@users.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON, one record per line, as stored.")
@_config
def list_users(as_json: bool, path: Path | None) -> None:
    """List all users, their limits and how many API keys they have."""
    with _store(path) as store:
        records = store.records()
    if as_json:
        for record in records:
            shown = {"name": record.name, "rpm": record.rpm, "tpm": record.tpm, "keys": [*record.keys]}
            click.echo(orjson.dumps(shown).decode())
        return
    if not records:
        click.echo("no users", err=True)
        return
    rows = [("NAME", "RPM", "TPM", "KEYS")]
    rows += [(record.name, *_limits(record), str(len(record.keys))) for record in records]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        click.echo(f"{row[0]:{widths[0]}}  " + "  ".join(f"{row[column]:>{widths[column]}}" for column in (1, 2, 3)))


@users.command("set")
@click.argument("name")
@_rpm
@_tpm
@click.option("--key", is_flag=True, help="Make one more API key, and print it: it cannot be shown again.")
@click.option("--revoke-keys", is_flag=True, help="Take away the API keys there are, before --key makes one.")
@_config
def set_user(name: str, rpm: int | None, tpm: int | None, key: bool, revoke_keys: bool, path: Path | None) -> None:
    """Change the limits or the API keys of the user NAME.

    A user without API keys is whoever says so in the `user` header, unless `limits.require_key` is set.
    """
    if rpm is None and tpm is None and not key and not revoke_keys:
        _fail("nothing to change: give --rpm, --tpm, --key or --revoke-keys")
    made = new_key() if key else None
    with _store(path) as store:
        store.change(name, rpm=rpm, tpm=tpm, new_key=digest_of(made) if made else None, revoke_keys=revoke_keys)
    _show_key(made)


@users.command()
@click.argument("name")
@_config
def remove(name: str, path: Path | None) -> None:
    """Remove the user NAME and its API keys."""
    with _store(path) as store:
        store.remove(name)


@contextmanager
def _store(path: Path | None) -> Iterator[UserStore]:
    """The store that the configuration names. Its errors end the command."""
    try:
        config = load(path)
        if config.redis:
            from workers.users_redis import RedisUsers

            yield RedisUsers(config.redis)
        elif config.limits.users_file is not None:
            yield UsersFile(config.limits.users_file)
        else:
            raise UsersError("there is nowhere to keep users: set limits.users_file or redis in the configuration")
    except (ConfigError, UsersError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    click.echo(f"pointsman: {message}", err=True)
    sys.exit(_CONFIG_ERROR)


def _limits(record: UserRecord) -> tuple[str, str]:
    limits = record.limits
    return str(limits.rpm), str(limits.tpm)


def _show_key(key: str | None) -> None:
    if key is not None:
        click.echo("API key, shown this once:", err=True)
        click.echo(key)
