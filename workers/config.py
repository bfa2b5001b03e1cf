"""One configuration: a YAML file, the environment over it, flags over both; checked once, then passed down.

The environment names are POINTSMAN_<KEY>, nested with two underscores (POINTSMAN_SCRAPE__INTERVAL_MAX_SECONDS=10).
AIBrix's names are honoured where they mean the same; the POINTSMAN_ name wins over them.

Whatever is wrong is reported in one line that names the place, the thing and the cure: `ConfigError`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from state.tables import FIRST_WORKER, Capacity
from workers.address import Parsed, is_ip, parse_address
from workers.documents import NotYaml, read_yaml
from workers.origins import Origins, unknown_variable
from workers.problems import ConflictingKeys, check_strategy, kinds_of, numbers_only, problems_of
from workers.redis_link import parse_redis_url

NO_STRATEGY = "none"
ENVELOPE_BYTES = 1024
"""More than a gRPC message has around a request body."""


class ConfigError(Exception):
    """The configuration cannot be used. The message is one line for a person."""


def _address(value: str) -> str:
    parse_address(value)
    return value


def _host(value: str) -> str:
    if not is_ip(value) and not re.fullmatch(r"\w[\w.-]*", value, re.ASCII):
        raise ValueError(f"{value!r} is not a host: write a name or an IP address alone, such as pointsman.example")
    return value


def _secret(value: SecretStr) -> SecretStr:
    if value.get_secret_value() == str(SecretStr("hidden")):
        raise ValueError("is what check-config shows in its place: write the secret itself")
    return value


def _optional_path(value: Any) -> Any:
    return None if value == "" else value


Address = Annotated[str, AfterValidator(_address)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
Host = Annotated[str, AfterValidator(_host)]
OptionalPath = Annotated[Path | None, BeforeValidator(_optional_path)]
Namespace = Annotated[str, Field(pattern=r"^(\*|[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)$")]
Seconds = Annotated[float, Field(gt=0, le=86400)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return numbers_only(cls, value, info)


class ScrapeConfig(_Section):
    """How pods are polled."""

    interval_min_seconds: Seconds = 0.5
    """Between two polls of a pod that has requests in flight."""
    interval_max_seconds: Seconds = 5.0
    """Of an idle pod."""
    timeout_seconds: Seconds = 2.0
    window_seconds: Seconds = 60.0
    """What "recent" means for rates, means and quantiles."""
    failures: int = Field(3, ge=1, le=100)
    """Polls that must fail in a row before a pod is not ready."""

    @model_validator(mode="after")
    def _ordered(self) -> "ScrapeConfig":
        if self.interval_max_seconds < self.interval_min_seconds:
            raise ConflictingKeys(
                f"interval_max_seconds must not be below interval_min_seconds; set it to at least "
                f"{self.interval_min_seconds:g} (it is {self.interval_max_seconds:g})",
                "interval_max_seconds",
                "interval_min_seconds",
            )
        return self


class CapacityConfig(_Section):
    """How much room the shared tables have. Fixed when the router starts."""

    pods: int = Field(1024, ge=1, le=65536)
    workers: int = Field(0, ge=0, le=512)
    """Most workers that may ever run (SIGTTIN adds one); 0: four more than `workers`."""
    catalog_bytes: int = Field(4 << 20, ge=4096, le=1 << 30)
    series: int = Field(4096, ge=64, le=1 << 20)
    """Label sets each process can count."""
    limited_users: int = Field(4096, ge=1, le=1 << 20)
    """Users of the users file whose use is counted at a time."""
    limited_models: int = Field(256, ge=1, le=65536)
    """Models with a limit of requests a second."""


class LimitsConfig(_Section):
    """Users, their keys and limits."""

    users_file: OptionalPath = None
    """User records where there is no Redis; `pointsman users` edits it."""
    require_key: bool = False
    """Refuse requests without a user's API key."""
    bearer_token: Secret = SecretStr("")
    """One token that every request must carry, unless it carries a user's API key."""
    on_outage: Literal["open", "closed"] = "open"
    """While Redis cannot be reached, requests pass unlimited (open) or are refused (closed)."""
    timeout_seconds: float = Field(0.05, gt=0, le=10)
    """For an answer of Redis, before it counts as out of reach."""


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        below, above = 1 << value.bit_length() - 1, 1 << value.bit_length()
        raise ValueError(f"must be a power of two, or 0: write {below} or {above}")
    return value


class PrefixConfig(_Section):
    """What the router remembers of the prefixes it sent where."""

    blocks: int = Field(1 << 20, ge=1024, le=1 << 26)
    """Distinct blocks that each worker's view may hold."""
    ttl_seconds: Seconds = 1200.0
    """After which a prefix that was not used again counts as evicted by the engine."""
    block_bytes: Annotated[int, Field(ge=0, le=65536), AfterValidator(_power_of_two)] = 0
    """Bytes of text in a block, a power of two (the prefix log has room for its logarithm); 0 follows the engines' KV
    blocks."""
    seed: int = Field(0, ge=0, lt=1 << 63)
    """Of the hashes; must be the same in all replicas."""
    ring_bytes: int = Field(4 << 20, ge=65536, le=1 << 30)
    """Room of each worker's log in shared memory."""


class PdConfig(_Section):
    """Prefill on one pod, decode on another (strategy `pd`)."""

    timeout_seconds: float = Field(30.0, gt=0, le=290)
    """For a prefill, before another pod is asked. Two of them have to fit into Envoy's `message_timeout`."""
    connections: int = Field(256, ge=1, le=4096)
    """Of one worker to one prefill pod; more prefills at a time wait."""
    kv_connector: Literal["shfs", "nixl"] = "shfs"
    """How vLLM's pods hand over that do not say it in the label `model.aibrix.ai/kv-connector-type`: AIBrix's names."""


class ReplicasConfig(_Section):
    """What the replicas of a router tell each other through Redis."""

    share: bool = True
    """Whether they do. Without Redis: whether others may route to the same pods, whose choices are to be guessed."""
    interval_seconds: float = Field(0.05, ge=0.01, le=1)
    """Between two exchanges of a replica."""
    group: str = Field("default", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Replicas of one router have the same; routers for other pods in the same Redis have another."""


class LogConfig(_Section):
    """What is written to standard error."""

    format: Literal["auto", "console", "json"] = "auto"
    """auto: console on a terminal, else JSON."""
    level: Literal["debug", "info", "warning", "error"] = "info"


class TlsConfig(_Section):
    """TLS on the workers' addresses. All are PEM files."""

    certificate: Path
    key: Path
    client_ca: OptionalPath = None
    """Ask for client certificates, signed by one of these."""


class EnvoyConfig(_Section):
    """What `pointsman envoy` writes."""

    listen: Address = "0.0.0.0:10080"
    admin: Address = "127.0.0.1:9901"
    router_host: Host = "127.0.0.1"
    """Where Envoy finds the workers when they listen on a wildcard address."""
    destination: Literal["header", "metadata", "override-host"] = "header"
    pods_file: OptionalPath = None
    """With destination override-host: the router keeps its list of pods for Envoy there."""
    accounting: Literal["access-log", "stream"] = "access-log"
    body_limit_bytes: int = Field(32 << 20, ge=1024)
    """By default less where `max_message_bytes` leaves less."""
    heap_bytes: int | None = Field(None, ge=64 << 20)
    """Near it Envoy refuses new requests; none: it takes what it gets."""
    upload_seconds: float = Field(120.0, ge=0.001, le=86400)
    """For a client to send all of a request."""
    max_connections: int = Field(65536, ge=1)
    router_ca: OptionalPath = None
    """Where `tls` is set: what Envoy checks the workers' certificate against; none: it is not checked."""
    router_name: Host | None = None
    """With `router_ca`: the name that the certificate must be for; none: any."""
    client_certificate: OptionalPath = None
    client_key: OptionalPath = None
    """What Envoy shows where `tls.client_ca` is set."""

    @model_validator(mode="after")
    def _pair(self) -> "EnvoyConfig":
        if (self.client_certificate is None) != (self.client_key is None):
            raise ConflictingKeys(
                "client_certificate and client_key: one needs the other; set both or neither",
                "client_certificate",
                "client_key",
            )
        if self.router_name is not None and self.router_ca is None:
            raise ConflictingKeys(
                "router_name: a name proves nothing in a certificate that nobody checks; set router_ca",
                "router_name",
                "router_ca",
            )
        if self.pods_file is not None and self.destination != "override-host":
            raise ConflictingKeys(
                f"pods_file: with destination {self.destination} Envoy keeps no list of pods; leave it out, or set "
                "destination to override-host",
                "pods_file",
                "destination",
            )
        return self


class KubernetesConfig(_Section):
    """Pods that the Kubernetes API lists. `kubernetes: {}` is enough for pods with AIBrix's labels."""

    namespaces: tuple[Namespace, ...] = ()
    """Empty: the router's own; "*": all."""
    model_label: Annotated[str, Field(min_length=1, max_length=317)] = "model.aibrix.ai/name"
    """The label, or annotation, that names a pod's model."""
    selector: Annotated[str, Field(max_length=4096)] = ""
    """A label selector as kubectl takes it; empty: pods that have `model_label` as a label."""
    port: int = Field(8000, ge=1, le=65535)
    """Of pods that name none in `model.aibrix.ai/port`."""

    @model_validator(mode="after")
    def _once(self) -> "KubernetesConfig":
        if "*" in self.namespaces and len(self.namespaces) > 1:
            raise ConflictingKeys('namespaces: "*" are all; leave the others out', "namespaces")
        return self


class Config(BaseSettings):
    """Everything `pointsman` can be told."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="POINTSMAN_", env_nested_delimiter="__", env_ignore_empty=True
    )

    listen: Address = "0.0.0.0:50052"
    """All workers, SO_REUSEPORT."""
    worker_listen: Address = "0.0.0.0:20052"
    """Worker i alone: port + i, or a unix path with {i}."""
    workers: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1, le=256)
    transport: Literal["h2", "grpcio"] = "h2"
    admin: Address = "0.0.0.0:8080"
    strategy: str = "marginal-delay"
    """For requests that name none. "none": as in AIBrix, they get a `model` header and Envoy finds a pod by itself."""
    explain: bool = False
    """Clients may ask for the receipt of a decision (`x-pointsman-explain: 1`): pod names, loads and scores."""
    usage_metrics: bool = False
    """Read the usage of every request and count tokens per model. Responses then pass through the router."""
    retry_candidates: int = Field(2, ge=0, le=16)
    """With destination override-host: how many pods Envoy may try after the first."""
    session_secret: Secret = SecretStr("")
    """Makes session ids. Set the same in all replicas; empty: new with each start of the router."""
    endpoints: OptionalPath = None
    """A file of models and their pods; without it and `kubernetes` there are none."""
    kubernetes: KubernetesConfig | None = None
    """Find the pods by the Kubernetes API."""
    redis: str | None = None
    max_message_bytes: int = Field(64 << 20, ge=4096, le=1 << 30)
    """The largest gRPC message a worker takes: a request body and its envelope."""
    max_buffered_bytes: int = Field(512 << 20, ge=4096)
    """With transport h2: of incomplete messages in a worker, all its connections together. By default more where
    `max_message_bytes` is."""
    drain_seconds: Seconds = 30.0
    """How long a stopping worker waits for streams that still need it."""
    tls: TlsConfig | None = None
    """Needs transport h2."""
    scrape: ScrapeConfig = ScrapeConfig()
    prefix: PrefixConfig = PrefixConfig()
    pd: PdConfig = PdConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    capacity: CapacityConfig = CapacityConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()
    envoy: EnvoyConfig = EnvoyConfig()

    _origins: Origins | None = PrivateAttr(None)
    _file: ClassVar[Mapping[str, Any]] = {}
    _aibrix: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment; the file is merged below by `load`."""
        return (
            init_settings,
            env_settings,
            _Lower(settings_cls, cls._aibrix),
            _Lower(settings_cls, cls._file),
        )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return numbers_only(cls, value, info)

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.strategy != NO_STRATEGY:
            try:
                check_strategy(self.strategy)
            except ValueError as error:
                raise ConflictingKeys(f"strategy: {error}", "strategy") from None
        self._check_users()
        if self.endpoints is not None and self.kubernetes is not None:
            raise ConflictingKeys(
                "kubernetes: the pods are listed in `endpoints` already; leave one of them out",
                "kubernetes",
                "endpoints",
            )
        limit = self.envoy.body_limit_bytes
        if "body_limit_bytes" in self.envoy.model_fields_set and limit > self.max_message_bytes - ENVELOPE_BYTES:
            raise ConflictingKeys(
                f"max_message_bytes: {self.max_message_bytes} has no room for a body of envoy.body_limit_bytes, "
                f"{limit}, and its envelope; set at least {limit + ENVELOPE_BYTES}",
                "max_message_bytes",
                "envoy.body_limit_bytes",
            )
        if "max_buffered_bytes" in self.model_fields_set and self.max_buffered_bytes < self.max_message_bytes:
            raise ConflictingKeys(
                f"max_buffered_bytes: {self.max_buffered_bytes} has no room for a message of max_message_bytes, "
                f"{self.max_message_bytes}; set at least that",
                "max_buffered_bytes",
                "max_message_bytes",
            )
        if self.tls is not None and self.transport != "h2":
            raise ConflictingKeys("tls: only transport h2 serves TLS", "tls", "transport")
        if parse_address(self.listen).kind == "unix" and self.workers > 1:
            raise ConflictingKeys(
                "listen: a unix path serves one worker; with more give a port, or use worker_listen alone",
                "listen",
                "workers",
            )
        most = self.max_workers
        if most < self.workers:
            raise ConflictingKeys(
                f"capacity.workers: {most} is fewer than the {self.workers} workers to start",
                "capacity.workers",
                "workers",
            )
        kind, place, port = parse_address(self.worker_listen)
        if kind == "unix" and most > 1 and "{i}" not in place:
            raise ConflictingKeys("worker_listen: a unix path needs {i} for the worker's number", "worker_listen")
        if kind == "tcp" and port + most - 1 > 65535:
            raise ConflictingKeys(
                f"worker_listen: port {port} leaves no room for {most} workers",
                "worker_listen",
                "workers",
                "capacity.workers",
            )
        listen, admin = parse_address(self.listen), parse_address(self.admin)
        if _collide(listen, admin):
            raise ConflictingKeys(
                f"listen: {self.listen} and admin, {self.admin}, use the same address; change one", "listen", "admin"
            )
        envoy = self.envoy
        if _collide(parse_address(envoy.listen), parse_address(envoy.admin)):
            raise ConflictingKeys(
                f"envoy.listen: {envoy.listen} and envoy.admin, {envoy.admin}, use the same address; change one",
                "envoy.listen",
                "envoy.admin",
            )
        for name, other in (("listen", listen), ("admin", admin)):
            if kind == other.kind == "tcp" and port <= other.port < port + most and _overlap(place, other.place):
                raise ConflictingKeys(
                    f"worker_listen: the ports {port} to {port + most - 1} of {most} workers include that of {name}, "
                    f"{other.port}",
                    "worker_listen",
                    name,
                    "workers",
                    "capacity.workers",
                )
            if kind == "unix" and any(_collide(parse_address(self.worker_address(i)), other) for i in range(most)):
                raise ConflictingKeys(
                    f"worker_listen: {self.worker_listen} is also that of {name}; change one", "worker_listen", name
                )
        return self

    def _check_users(self) -> None:
        if self.redis:
            try:
                parse_redis_url(self.redis)
            except ValueError as error:
                raise ConflictingKeys(f"redis: {error}", "redis") from None
            if self.limits.users_file is not None:
                raise ConflictingKeys(
                    "limits.users_file: where `redis` is set, users are kept there; leave one of them out",
                    "limits.users_file",
                    "redis",
                )
        elif self.limits.require_key and self.limits.users_file is None:
            raise ConflictingKeys(
                "limits.require_key: there are no users to have keys; set limits.users_file or redis",
                "limits.require_key",
            )

    def where(self, address: str) -> str:
        """The place and the key of an address to listen on, for people."""
        keys = {self.worker_address(number): "worker_listen" for number in range(self.max_workers)}
        keys |= {self.listen: "listen", self.admin: "admin"}
        key = keys[address]
        return f"{self._origins.of_key(key)}: {key}" if self._origins else key

    @property
    def default_strategy(self) -> str:
        """As the scheduler takes it: empty for none."""
        return "" if self.strategy == NO_STRATEGY else self.strategy

    @property
    def has_replicas(self) -> bool:
        """Whether replicas tell each other what they do."""
        return bool(self.redis) and self.replicas.share

    @property
    def has_silent_replicas(self) -> bool:
        """Whether there may be some that tell nothing."""
        return not self.redis and self.replicas.share

    @property
    def max_workers(self) -> int:
        """The most workers that may run at the same time, not counting predecessors that drain."""
        return self.capacity.workers or self.workers + 4

    def worker_address(self, index: int) -> str:
        """Worker `index`'s own address."""
        kind, place, port = parse_address(self.worker_listen)
        if kind == "unix":
            return "unix:" + place.replace("{i}", str(index))
        host = f"[{place}]" if ":" in place else place
        return f"{host}:{port + index}"

    def table_capacity(self) -> Capacity:
        """Room for the shared tables: a draining worker and its successor both write, so workers count twice."""
        return Capacity(
            pods=self.capacity.pods,
            writers=FIRST_WORKER + 2 * self.max_workers,
            catalog_bytes=self.capacity.catalog_bytes,
            series=self.capacity.series,
            prefix_ring_bytes=self.prefix.ring_bytes,
            limited_users=self.capacity.limited_users,
            limited_models=self.capacity.limited_models,
        )


def _collide(one: Parsed, other: Parsed) -> bool:
    """Whether nobody can listen on both."""
    if one.kind != other.kind or one.port != other.port:
        return False
    return one.place == other.place if one.kind == "unix" else _overlap(one.place, other.place)


def _overlap(host: str, other: str) -> bool:
    """Whether two hosts have an address in common, as far as can be said without a look-up. "::" takes IPv4, too."""
    hosts = {"127.0.0.1" if each == "localhost" else each for each in (host, other)}
    return len(hosts) == 1 or "::" in hosts or ("0.0.0.0" in hosts and not any(":" in each for each in hosts))


class _Lower(PydanticBaseSettingsSource):
    """A source that is a plain mapping."""

    def __init__(self, settings_cls: type[BaseSettings], values: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Part of the interface; `__call__` gives everything at once."""
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """All values."""
        return dict(self._values)


def _aibrix_environment() -> dict[str, Any]:
    """The environment that AIBrix's gateway plugin understands, where the meaning is the same."""
    env = os.environ
    values: dict[str, Any] = {}
    if env.get("ROUTING_ALGORITHM"):
        values["strategy"] = env["ROUTING_ALGORITHM"]
    if env.get("AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES"):
        values["max_message_bytes"] = env["AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES"]
    if env.get("AIBRIX_AUTH_BEARER_TOKEN", "").strip():
        values["limits"] = {"bearer_token": env["AIBRIX_AUTH_BEARER_TOKEN"].strip()}
    if env.get("REDIS_HOST"):
        password = f":{quote(env['REDIS_PASSWORD'], safe='')}@" if env.get("REDIS_PASSWORD") else ""
        # For a Service called redis, Kubernetes sets REDIS_PORT=tcp://10.0.0.1:6379.
        port = env.get("REDIS_PORT", "6379").rpartition(":")[2]
        host = env["REDIS_HOST"]
        values["redis"] = f"redis://{password}{f'[{host}]' if ':' in host and is_ip(host) else host}:{port}/0"
    interval = _aibrix_number("AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS", "milliseconds")
    if interval is not None:
        values["scrape"] = {"interval_min_seconds": interval / 1000}
    prefix = {
        "blocks": _aibrix_number("AIBRIX_PREFIX_CACHE_BLOCK_NUMBER", "blocks"),
        "block_bytes": _aibrix_number("AIBRIX_PREFIX_CACHE_BLOCK_SIZE", "bytes"),
        "seed": _aibrix_number("AIBRIX_PREFIX_CACHE_HASH_SEED", ""),
        "ttl_seconds": _aibrix_number("AIBRIX_PREFIX_CACHE_EVICTION_DURATION_MINS", "minutes"),
    }
    if prefix["ttl_seconds"] is not None:
        prefix["ttl_seconds"] *= 60
    size = prefix["block_bytes"]
    if size is not None and size > 1 and size.is_integer():
        prefix["block_bytes"] = 1 << (int(size) - 1).bit_length()  # AIBrix takes any size
    given = {name: value for name, value in prefix.items() if value is not None}
    if given:
        values["prefix"] = given
    pd = {
        "timeout_seconds": _aibrix_number("AIBRIX_PREFILL_REQUEST_TIMEOUT", "seconds"),
        "kv_connector": env.get("AIBRIX_KV_CONNECTOR_TYPE") or None,
    }
    if any(pd.values()):
        values["pd"] = {name: value for name, value in pd.items() if value}
    return values


def _aibrix_number(name: str, unit: str) -> float | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a number{' of ' + unit if unit else ''}") from None


def load(path: Path | None, flags: Mapping[str, Any] | None = None) -> Config:
    """Read, merge and check. Raises ConfigError."""
    given: Mapping[str, Any] = {}
    if path is not None:
        given = _beside(_read_file(path), Config, path.parent.absolute())
    if unknown := unknown_variable(Config, os.environ):
        raise ConfigError(unknown)
    aibrix = _aibrix_environment()
    origins = Origins(str(path or "configuration"), given, aibrix, os.environ, flags or {})
    source = type("_Loaded", (Config,), {"_file": given, "_aibrix": aibrix})
    try:
        config: Config = source(**(flags or {}))
    except ValidationError as error:
        raise ConfigError(origins.tell(problems_of(error, Config))) from None
    except SettingsError as error:
        section = str(error).partition('"')[2].partition('"')[0].upper()
        raise ConfigError(
            f"POINTSMAN_{section}: is not a JSON mapping; write nested keys as POINTSMAN_{section}__<KEY>"
        ) from None
    config._origins = origins
    room = config.max_message_bytes - ENVELOPE_BYTES
    if config.envoy.body_limit_bytes > room:
        config = config.model_copy(update={"envoy": config.envoy.model_copy(update={"body_limit_bytes": room})})
    return config


def _beside(given: Mapping[str, Any], model: type[BaseModel], folder: Path) -> dict[str, Any]:
    """Relative paths are relative to the file they are written in."""
    found = dict(given)
    for name, value in given.items():
        kinds = kinds_of(model.model_fields[name].annotation) if name in model.model_fields else []
        for kind in kinds:
            if kind is Path and isinstance(value, str) and value:
                found[name] = str(folder / value)
            elif isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name] = _beside(value, kind, folder)
    return found


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    try:
        given = read_yaml(text)
    except NotYaml as error:
        raise ConfigError(f"{path}:{error}") from None
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ConfigError(f"{path}: must be a mapping of keys to values, such as `strategy: least-request`")
    return given
