"""Who said what is wrong: a key of the file, a variable of the environment, a flag. Errors begin with it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import groupby
from typing import Any

from pydantic import BaseModel

from workers.problems import Problem, kinds_of

Path = tuple[int | str, ...]

PREFIX = "POINTSMAN_"
AIBRIX: Mapping[Path, str] = {
    ("strategy",): "ROUTING_ALGORITHM",
    ("max_message_bytes",): "AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES",
    ("limits", "bearer_token"): "AIBRIX_AUTH_BEARER_TOKEN",
    ("redis",): "REDIS_HOST and REDIS_PORT",
    ("scrape", "interval_min_seconds"): "AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS",
    ("prefix", "blocks"): "AIBRIX_PREFIX_CACHE_BLOCK_NUMBER",
    ("prefix", "block_bytes"): "AIBRIX_PREFIX_CACHE_BLOCK_SIZE",
    ("prefix", "seed"): "AIBRIX_PREFIX_CACHE_HASH_SEED",
    ("prefix", "ttl_seconds"): "AIBRIX_PREFIX_CACHE_EVICTION_DURATION_MINS",
}
_NOT_OURS = re.compile(
    r"POINTSMAN_(COMPILE=.*"
    r"|(\w+_)?SERVICE_(HOST|PORT(_\w+)?)=.*"
    r"|(\w+_)?PORT=\w+://.*"
    r"|(\w+_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)",
    re.DOTALL,
)
"""The build's, and those that Kubernetes sets in every pod for a Service called pointsman or pointsman-something."""


class Origins:
    """Of the values of one configuration, by their keys. Later sources win, as they do in the configuration."""

    def __init__(
        self,
        file: str,
        given: Mapping[str, Any],
        aibrix: Mapping[str, Any],
        environment: Mapping[str, str],
        flags: Mapping[str, Any],
    ) -> None:
        self._file = file
        self._known: dict[Path, str] = dict.fromkeys(_paths(given), file)
        self._known |= {path: AIBRIX.get(path, "environment") for path in _paths(aibrix)}
        for name, value in environment.items():
            if name.upper().startswith(PREFIX) and value:
                self._known[tuple(name[len(PREFIX) :].lower().split("__"))] = name
        self._known |= {path: "--" + "-".join(map(str, path)).replace("_", "-") for path in _paths(flags)}

    def tell(self, problems: Iterable[Problem]) -> str:
        """All problems in one line, each after its origin."""
        groups = groupby(problems, key=self._of)
        return "; ".join(f"{origin}: " + "; ".join(map(str, group)) for origin, group in groups)

    def _of(self, problem: Problem) -> str:
        if problem.culprits:
            found = {path for culprit in problem.culprits for path in self._at(culprit)}
        else:
            found = set(self._at(problem.place) or self._at(problem.place[:-1]))  # the latter for what is missing
        return " and ".join(dict.fromkeys(name for path, name in self._known.items() if path in found)) or self._file

    def of_key(self, key: str) -> str:
        """Who set it; the file, or what stands for it, where nobody did."""
        return self._of(Problem(tuple(key.split(".")), ""))

    def _at(self, place: Path) -> list[Path]:
        return [path for path in self._known if place and path[: len(place)] == place[: len(path)]]


def unknown_variable(model: type[BaseModel], environment: Mapping[str, str]) -> str | None:
    """What is wrong with one that bears our name and means nothing. Those in known sections are the sections' to
    refuse."""
    sections = {name.upper() for name in model.model_fields}
    for name, value in environment.items():
        if not name.upper().startswith(PREFIX) or not value or _NOT_OURS.fullmatch(f"{name}={value}"):
            continue
        key = name[len(PREFIX) :].upper()
        if key.partition("__")[0] not in sections:
            near = get_close_matches(key, ["__".join(path).upper() for path in _keys(model)] + sorted(sections), 1)
            cure = f"did you mean {PREFIX}{near[0]}?" if near else "unset it, or see docs/configuration.md for the keys"
            return f"{name}: there is no such key; {cure}"
    return None


def _keys(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        inner = [kind for kind in kinds_of(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            yield from ((name, *path) for kind in inner for path in _keys(kind))
        else:
            yield (name,)


def _paths(values: Mapping[str, Any]) -> Iterator[Path]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((name, *path) for path in _paths(value))
        else:
            yield (name,)
