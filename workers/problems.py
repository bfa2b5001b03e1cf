"""What is wrong in what people wrote, in words for people: each problem one line, with its place and a cure."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError, ValidationInfo

from router.errors import RequestError
from router.strategies import STRATEGIES, Scoring
from router.strategies.weighted import parse_strategy

_SHAPES = {
    "dict_type": "must be a mapping of keys to values",
    "mapping_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "string_type": "must be text: write it in quotes",
}
"""For what pydantic says in terms of Python."""


class ConflictingKeys(ValueError):
    """What is wrong with several keys together, or with one that only the whole can judge. `keys` are these, dotted, as
    seen from where it is raised."""

    def __init__(self, text: str, *keys: str) -> None:
        super().__init__(text)
        self.keys = keys


class Problem(NamedTuple):
    """`place` is the way to it, empty for the whole document."""

    place: tuple[int | str, ...]
    text: str
    placed: bool = False
    """Whether the text names the place."""
    culprits: tuple[tuple[int | str, ...], ...] = ()
    """The ways to the values that make it, where they are others than `place`."""

    def __str__(self) -> str:
        return self.text if self.placed or not self.place else f"{'.'.join(map(str, self.place))}: {self.text}"


def no_such(what: str, name: str, known: Iterable[str], within: str = "") -> str:
    """That there is nothing of this name, `within` before it, and what was meant."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    names = ", ".join(within + each for each in sorted(known)) or "none"
    hint = f"did you mean {within + near[0]!r}?" if near else f"known: {names}"
    return f"no {what} {within + name!r}; {hint}"


def check_strategy(value: str) -> None:
    """Raises ValueError for what a `routing-strategy` header could not say."""
    if "," not in value and ":" not in value:
        if value not in STRATEGIES:
            raise ValueError(no_such("strategy", value, STRATEGIES))
        return
    try:
        names = [name for name, _ in parse_strategy(value, STRATEGIES)]
    except RequestError:
        raise ValueError(
            f"{value!r} is not a combination of strategies: write name:weight,name:weight with names that "
            "`pointsman strategies` lists"
        ) from None
    alone = [name for name in names if len(names) > 1 and not issubclass(STRATEGIES[name], Scoring)]
    if alone:
        raise ValueError(f"{alone[0]} has no scores and cannot be combined with others")


def problems_of(error: ValidationError, model: type[BaseModel]) -> Iterator[Problem]:
    """What pydantic found in a document of `model`'s shape."""
    for found in error.errors():
        place = found["loc"]
        if found["type"] == "extra_forbidden":
            *above, name = (str(part) for part in place)
            within = "".join(f"{part}." for part in above)
            yield Problem(place, no_such("key", name, _keys(model, place[:-1]), within), placed=True)
            continue
        text = _SHAPES.get(found["type"]) or found["msg"].removeprefix("Value error, ")
        if found["type"] == "model_type":
            text = f"must be a mapping with keys such as `{_keys(model, place)[0]}`"
        value = found.get("input")
        if isinstance(value, str | int | float) and repr(value) not in text and not _is_secret(model, place):
            text += f" (got {value!r})"
        cause = found.get("ctx", {}).get("error")
        keys = cause.keys if isinstance(cause, ConflictingKeys) else ()
        yield Problem(place, text, culprits=tuple((*place, *key.split(".")) for key in keys))


def numbers_only(model: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """For a validator of all fields: true and false are no 1 and 0 here, as they are to Python."""
    kinds = list(kinds_of(model.model_fields[info.field_name or ""].annotation))
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise ValueError("must be a number")
    return value


def _at(kind: Any, place: tuple[int | str, ...]) -> list[type]:
    """What may stand at a place of a document of this kind."""
    for part in place:
        kind = next((inner for each in kinds_of(kind) for inner in _inside(each, part)), None)
    return [each for each in kinds_of(kind) if isinstance(each, type)]


def _is_secret(kind: Any, place: tuple[int | str, ...]) -> bool:
    return SecretStr in _at(kind, place)


def _keys(kind: Any, place: tuple[int | str, ...]) -> list[str]:
    """The keys that may stand at a place of a document of this kind."""
    models = [each for each in _at(kind, place) if issubclass(each, BaseModel)]
    return [field.alias or name for each in models for name, field in each.model_fields.items()]


def kinds_of(kind: Any) -> Iterator[Any]:
    """The types that an annotation allows, one by one."""
    if get_origin(kind) in (Union, UnionType):
        for each in get_args(kind):
            yield from kinds_of(each)
    elif get_origin(kind) is Annotated:
        yield from kinds_of(get_args(kind)[0])
    else:
        yield kind


def _inside(kind: Any, part: int | str) -> Iterator[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from (field.annotation for name, field in kind.model_fields.items() if part in (name, field.alias))
    elif isinstance(get_origin(kind), type):
        yield get_args(kind)[-1 if issubclass(get_origin(kind), Mapping) else 0]
