"""A model's `config`: AIBrix's `model.aibrix.ai/config`, of an endpoints file or of a pod's annotation, read strictly.

Whatever of it could not be followed would surface as a refusal of every request, as if the client were at fault.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

import orjson
import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from router.claims import STATES, state_in
from workers.problems import check_strategy, no_such, problems_of

log = structlog.get_logger()


def _strategy(value: str) -> str:
    if value.strip():
        check_strategy(value.strip())
    return value


def _state(value: str) -> str:
    if not state_in(value):
        raise ValueError(no_such("state", value, STATES))
    return value


def _jsonable(value: Any) -> Any:
    try:
        orjson.dumps(value)
    except TypeError as error:
        raise ValueError(f"must contain only JSON values: {error}") from None
    return value


def _hints(value: Any) -> Any:
    if isinstance(value, Mapping):
        for name in ("promptTokensGte", "promptTokensLt", "maxTokensGte", "maxTokensLt"):
            if value.get(name) is not None and type(value[name]) is not int:
                raise ValueError(f"{name}: must be a whole number (got {value[name]!r})")
    return value


Strategy = Annotated[str, AfterValidator(_strategy)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel)


class RoutingProfile(_Strict):
    """One profile; null is the same as nothing."""

    routing_strategy: Strategy | None = None
    requests_per_second: Annotated[int, Field(strict=True, ge=0)] | None = None
    routing_config: Annotated[Any, AfterValidator(_jsonable), AfterValidator(_hints)] = None


class ModelConfig(_Strict):
    """All of it. `state` is ours: the annotation has it elsewhere."""

    locked_routing_strategy: Strategy | None = None
    default_profile: str | None = None
    profiles: Mapping[str, RoutingProfile | None] | None = None
    state: Annotated[str, AfterValidator(_state)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.default_profile and self.default_profile not in (self.profiles or {}):
            raise ValueError(f"defaultProfile: {no_such('profile', self.default_profile, self.profiles or {})}")
        if self.locked_routing_strategy and not self.profiles:
            raise ValueError("lockedRoutingStrategy: is only followed beside profiles; add `profiles: {default: {}}`")
        return self

    def settings(self) -> dict[str, Any]:
        """As it was written."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def first_problem(annotation: str) -> str:
    """What is wrong with an annotation; empty if nothing is."""
    try:
        ModelConfig.model_validate_json(annotation)
    except ValidationError as error:
        return str(next(problems_of(error, ModelConfig)))
    return ""


@lru_cache(maxsize=1024)
def usable(annotation: str, pod: str) -> str:
    """The annotation without the profiles, or a lock, that could not be followed; empty if it is none. What is left out
    is logged, once. Keys that nobody knows are passed over: other routers may."""
    try:
        document = orjson.loads(annotation)
        ModelConfig.model_validate(document)
    except orjson.JSONDecodeError as error:
        log.warning("a pod's routing profiles are ignored", pod=pod, error=f"not JSON: {error}")
        return ""
    except ValidationError as error:
        for found, problem in zip(error.errors(), problems_of(error, ModelConfig), strict=True):
            match found["loc"]:
                case _ if found["type"] == "extra_forbidden":
                    continue
                case ("profiles", name, *_):
                    log.warning("a routing profile is ignored", pod=pod, error=str(problem))
                    document["profiles"].pop(name, None)
                case (key, *_):
                    log.warning("a part of a pod's routing profiles is ignored", pod=pod, error=str(problem))
                    document.pop(key, None)
                case () if not isinstance(document, dict):
                    log.warning("a pod's routing profiles are ignored", pod=pod, error=str(problem))
                    return ""
        return orjson.dumps(document).decode()
    return annotation
