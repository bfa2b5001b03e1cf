"""Routing profiles of a model: what the annotation `model.aibrix.ai/config` (or the endpoints file) says.

    {"lockedRoutingStrategy": "...", "defaultProfile": "...",
     "profiles": {"<name>": {"routingStrategy": "...", "requestsPerSecond": 5, "routingConfig": {...}}}}

A request names its profile in `config-profile`; an unknown name, or none, means the default one. `auto` takes the
profile whose hints fit the request: `promptTokensGte`, `promptTokensLt`, `maxTokensGte`, `maxTokensLt` in its
`routingConfig`. All of a profile's hints must hold; of several that fit, the one with more hints is taken, then the
larger Gte, the smaller Lt, prompt before output, and at last the first name.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import orjson

DEFAULT_PROFILE: Final = "default"
AUTO: Final = "auto"
_ENDLESS: Final = (1 << 63) - 1


class ProfileError(ValueError):
    """The configuration cannot be used; says why in one line."""


class Hints(NamedTuple):
    """For which requests `auto` takes a profile; None where a bound was not given."""

    prompt_gte: int | None
    prompt_lt: int | None
    max_gte: int | None
    max_lt: int | None

    def fit(self, prompt_tokens: int, max_tokens: int | None) -> bool:
        """Whether a request lies within all bounds. A request without an output bound fits no hint on it."""
        if self.prompt_gte is not None and prompt_tokens < self.prompt_gte:
            return False
        if self.prompt_lt is not None and prompt_tokens >= self.prompt_lt:
            return False
        if self.max_gte is None and self.max_lt is None:
            return True
        if max_tokens is None:
            return False
        return (self.max_gte or -_ENDLESS) <= max_tokens < (_ENDLESS if self.max_lt is None else self.max_lt)

    @property
    def rank(self) -> tuple[int, int, int, int, int]:
        """Higher is more specific."""
        return (
            sum(bound is not None for bound in self),
            self.prompt_gte or 0,
            -(_ENDLESS if self.prompt_lt is None else self.prompt_lt),
            self.max_gte or 0,
            -(_ENDLESS if self.max_lt is None else self.max_lt),
        )


class Profile(NamedTuple):
    """One profile."""

    name: str
    routing_strategy: str
    requests_per_second: int
    """Of the whole model; 0 for no limit."""
    routing_config: Any
    """Free-form; only its hints are read."""
    hints: Hints | None


class Resolved(NamedTuple):
    """What applies to one request."""

    profile: Profile | None
    locked_strategy: str
    chosen_by_auto: str
    """The name to return in `x-aibrix-config-profile`; empty when the client did not say `auto` or nothing applies."""


class Profiles:
    """The profiles of one model."""

    __slots__ = ("_default", "_hinted", "_locked", "_profiles")

    def __init__(self, profiles: Mapping[str, Profile], default: str, locked: str) -> None:
        self._profiles = profiles
        self._default = default
        self._locked = locked
        hinted = [profiles[name] for name in sorted(profiles) if profiles[name].hints is not None]
        hinted.sort(
            key=lambda profile: profile.hints.rank if profile.hints else (), reverse=True
        )  # stable: names in order
        self._hinted = hinted

    def resolve(self, requested: str, prompt_tokens: Callable[[], int], max_tokens: int) -> Resolved:
        """What applies to a request with this `config-profile`. `prompt_tokens` is only called for `auto`;
        `max_tokens` is 0 where the client gave no bound."""
        requested = requested.strip()
        if requested.lower() == AUTO:
            profile = self._automatic(prompt_tokens(), max_tokens or None)
            name = profile.name if profile else self._default if self._locked else ""
            return Resolved(profile, self._locked, name)
        profile = self._profiles.get(requested) or self._profiles.get(self._default)
        return Resolved(profile, self._locked, "")

    def _automatic(self, prompt_tokens: int, max_tokens: int | None) -> Profile | None:
        for profile in self._hinted:
            if profile.hints is not None and profile.hints.fit(prompt_tokens, max_tokens):
                return profile
        return self._profiles.get(self._default)


def parse_profiles(source: str | bytes | Mapping[str, Any]) -> Profiles:
    """The profiles in an annotation's JSON text, or in the same thing already parsed. Raises ProfileError; at least one
    profile is needed, even beside a lock."""
    if isinstance(source, str | bytes):
        try:
            source = orjson.loads(source)
        except orjson.JSONDecodeError as error:
            raise ProfileError(f"parse model config: {error}") from None
    if not isinstance(source, Mapping):
        raise ProfileError("model config is not an object")
    locked = _field(source, "lockedRoutingStrategy", str, "")
    default = _field(source, "defaultProfile", str, "") or DEFAULT_PROFILE
    entries = source.get("profiles")
    if entries is None or entries == {}:
        raise ProfileError("model config has no profiles")
    if not isinstance(entries, Mapping):
        raise ProfileError("profiles: not an object")
    return Profiles({name: _profile(name, entry) for name, entry in entries.items()}, default, locked.strip())


def effective_strategy(locked: str, header: str, profile: Profile | None, default: str) -> str:
    """The strategy a request is routed by: lock, then header, then profile, then the configured default. Empty when
    nobody named one."""
    return locked.strip() or header.strip() or (profile.routing_strategy.strip() if profile else "") or default.strip()


def _profile(name: str, entry: Any) -> Profile:
    if entry is None:
        entry = {}
    if not isinstance(entry, Mapping):
        raise ProfileError(f"profiles.{name}: not an object")
    config = entry.get("routingConfig")
    return Profile(
        name,
        _field(entry, "routingStrategy", str, "", f"profiles.{name}."),
        _field(entry, "requestsPerSecond", int, 0, f"profiles.{name}."),
        config,
        _hints(config),
    )


def _hints(config: Any) -> Hints | None:
    """The hints of a `routingConfig`; None if it has none or one of them is no integer."""
    if not isinstance(config, Mapping):
        return None
    hints = Hints(*(config.get(name) for name in ("promptTokensGte", "promptTokensLt", "maxTokensGte", "maxTokensLt")))
    if any(bound is not None and type(bound) is not int for bound in hints):
        return None
    return hints if any(bound is not None for bound in hints) else None


def _field(entry: Mapping[str, Any], name: str, kind: type[Any], default: Any, where: str = "") -> Any:
    value = entry.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        raise ProfileError(f"{where}{name}: must be {'a string' if kind is str else 'an integer'}")
    return value
