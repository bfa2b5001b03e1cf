"""One configuration out of file, environment and flags; whatever is wrong in one line."""

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fleet import make_tables
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from state.tables import FIRST_WORKER, Capacity
from workers.config import ENVELOPE_BYTES, Config, ConfigError, KubernetesConfig, TlsConfig, load
from workers.ext_proc import prefix_knowledge


def write(folder: Path, text: str) -> Path:
    path = folder / "pointsman.yaml"
    path.write_text(text)
    return path


def refused(path: Path | None = None, flags: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        load(path, flags)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_nothing_given() -> None:
    config = load(None)
    assert (config.listen, config.worker_listen, config.admin) == ("0.0.0.0:50052", "0.0.0.0:20052", "0.0.0.0:8080")
    assert (config.endpoints, config.redis, config.transport) == (None, None, "h2")
    assert config.workers >= 1


def test_each_source_wins_over_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "strategy: random")
    assert load(path).strategy == "random"
    monkeypatch.setenv("ROUTING_ALGORITHM", "throughput")
    assert load(path).strategy == "throughput"
    monkeypatch.setenv("POINTSMAN_STRATEGY", "least-latency")
    assert load(path).strategy == "least-latency"
    assert load(path, {"strategy": "round-robin"}).strategy == "round-robin"


def test_nested_keys_are_merged_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "scrape: {interval_max_seconds: 9, failures: 7}\nlog: {level: debug}")
    monkeypatch.setenv("AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS", "250")
    monkeypatch.setenv("POINTSMAN_SCRAPE__TIMEOUT_SECONDS", "3.5")
    config = load(path, {"log": {"format": "json"}})
    scrape = config.scrape
    assert (scrape.interval_min_seconds, scrape.interval_max_seconds) == (0.25, 9.0)
    assert (scrape.timeout_seconds, scrape.failures) == (3.5, 7)
    assert (config.log.format, config.log.level) == ("json", "debug")


@pytest.mark.parametrize("winner", ["file", "aibrix", "env"])
def test_nested_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    path = write(tmp_path, "scrape: {interval_min_seconds: 1}")
    if winner in ("aibrix", "env"):
        monkeypatch.setenv("AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS", "2000")
    if winner == "env":
        monkeypatch.setenv("POINTSMAN_SCRAPE__INTERVAL_MIN_SECONDS", "3")
    assert load(path).scrape.interval_min_seconds == {"file": 1, "aibrix": 2, "env": 3}[winner]


def test_a_nested_section_may_be_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_SCRAPE", '{"failures": 9}')
    assert load(None).scrape.failures == 9


def test_aibrix_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES", "8192")
    monkeypatch.setenv("REDIS_HOST", "redis.svc")
    monkeypatch.setenv("REDIS_PASSWORD", "p@ss:w/rd")
    config = load(None)
    assert config.max_message_bytes == 8192
    assert config.redis == "redis://:p%40ss%3Aw%2Frd@redis.svc:6379/0"
    assert config.envoy.body_limit_bytes == 8192 - ENVELOPE_BYTES
    monkeypatch.setenv("POINTSMAN_REDIS", "redis://other/1")
    assert load(None).redis == "redis://other/1"


@pytest.mark.parametrize(("port", "taken"), [("6380", 6380), ("tcp://10.0.0.1:6381", 6381), ("tcp://[fd00::1]:1", 1)])
def test_the_port_that_kubernetes_sets_for_a_service_called_redis(
    monkeypatch: pytest.MonkeyPatch, port: str, taken: int
) -> None:
    monkeypatch.setenv("REDIS_HOST", "redis.svc")
    monkeypatch.setenv("REDIS_PORT", port)
    assert load(None).redis == f"redis://redis.svc:{taken}/0"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("fd00::1", "redis://[fd00::1]:6379/0"),
        ("[fd00::1]", "redis://[fd00::1]:6379/0"),
        ("10.0.0.1", "redis://10.0.0.1:6379/0"),
    ],
)
def test_a_redis_host_may_be_an_address(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    monkeypatch.setenv("REDIS_HOST", host)
    assert load(None).redis == url


@pytest.mark.parametrize("host", ["router", "router-0.ns.svc.cluster.local", "10.0.0.1", "fd00::1"])
def test_where_the_router_is_may_be_a_name_or_an_address(host: str) -> None:
    assert load(None, {"envoy": {"router_host": host}}).envoy.router_host == host


@pytest.mark.parametrize(
    ("given", "taken"), [("0", 0), ("1", 1), ("2", 2), ("100", 128), ("128", 128), ("129.0", 256), ("65535", 65536)]
)
def test_aibrix_block_size_becomes_a_power_of_two(monkeypatch: pytest.MonkeyPatch, given: str, taken: int) -> None:
    monkeypatch.setenv("AIBRIX_PREFIX_CACHE_BLOCK_SIZE", given)
    assert load(None).prefix.block_bytes == taken


@pytest.mark.parametrize("given", ["-1", "1.5", "65537", "inf", "nan", "many"])
def test_an_aibrix_block_size_that_is_none_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("AIBRIX_PREFIX_CACHE_BLOCK_SIZE", given)
    refused()


def test_empty_values_and_what_kubernetes_adds_for_a_service_of_our_name_mean_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POINTSMAN_STRATEGY", "")
    monkeypatch.setenv("POINTSMAN_ENDPOINTS", "")
    monkeypatch.setenv("POINTSMAN_SERVICE_HOST", "10.96.0.7")
    monkeypatch.setenv("POINTSMAN_PORT", "tcp://10.96.0.7:50052")
    assert load(None).model_dump() == load(None, {"strategy": "marginal-delay"}).model_dump()


def test_files_are_found_beside_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "endpoints: pods/e.yaml")
    assert load(path).endpoints == tmp_path / "pods/e.yaml"
    assert load(write(tmp_path, "endpoints: /etc/e.yaml")).endpoints == Path("/etc/e.yaml")
    assert load(write(tmp_path, "endpoints: ''")).endpoints is None
    monkeypatch.setenv("POINTSMAN_ENDPOINTS", "here.yaml")
    assert load(path).endpoints == Path("here.yaml")


def test_every_path_in_the_file_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from the folder itself, and for Envoy, which is started elsewhere."""
    named = {
        "endpoints": "e", "limits": {"users_file": "u"}, "tls": {"certificate": "c", "key": "k", "client_ca": "a"},
        "envoy": {"router_ca": "r", "client_certificate": "ec", "client_key": "ek"},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path, yaml.safe_dump(named))
    shown = load(Path("pointsman.yaml")).model_dump()
    for key, value in named.items():
        for inner, name in value.items() if isinstance(value, dict) else [("", value)]:
            assert (shown[key][inner] if inner else shown[key]) == tmp_path / name


def test_one_load_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    load(write(tmp_path, "strategy: random"))
    assert load(None).strategy == "marginal-delay"
    assert Config().strategy == "marginal-delay"


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, text)).model_dump() == load(None).model_dump()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("strateggy: random", "no key 'strateggy'; did you mean 'strategy'?"),
        ("scrape: {failres: 3}", "no key 'scrape.failres'; did you mean 'scrape.failures'?"),
        ("zzz: 1", "no key 'zzz'; known: admin, "),
        ("strategy: least-requests", "strategy: no strategy 'least-requests'; did you mean 'least-request'?"),
        ("strategy: zzz", "no strategy 'zzz'; known: "),
        ("listen: nonsense", "listen: 'nonsense' is not an address: write host:port"),
        ("listen: 50052", "listen: "),
        ("admin: '::1:80'", "write an IPv6 host in brackets"),
        ("worker_listen: unix:/run/w.sock", "worker_listen: a unix path needs {i}"),
        ("worker_listen: '0.0.0.0:65530'\nworkers: 9", "leaves no room for 13 workers"),
        ("worker_listen: '0.0.0.0:50050'\nworkers: 2", "include that of listen, 50052"),
        ("worker_listen: '127.0.0.1:8078'\nworkers: 2", "include that of admin, 8080"),
        ("listen: '0.0.0.0:8080'", "listen: 0.0.0.0:8080 and admin, 0.0.0.0:8080, use the same address"),
        ("listen: '127.0.0.1:8080'", "use the same address"),
        ("admin: '[::]:50052'", "use the same address"),
        ("listen: 'localhost:9'\nadmin: '127.0.0.1:9'", "use the same address"),
        ("listen: unix:/run/x\nadmin: unix:/run/x\nworkers: 1", "use the same address"),
        ("worker_listen: 'unix:/run/{i}'\nadmin: unix:/run/3\nworkers: 2", "unix:/run/{i} is also that of admin"),
        ("workers: 0", "workers: Input should be greater than or equal to 1 (got 0)"),
        ("workers: many", "workers: Input should be a valid integer"),
        ("workers: true", "workers: must be a number (got True)"),
        ("drain_seconds: on", "drain_seconds: must be a number (got True)"),
        ("scrape: {failures: yes}", "scrape.failures: must be a number (got True)"),
        ("prefix: {seed: false}", "prefix.seed: must be a number (got False)"),
        (
            "redis: 'redis://h/0?password=secret'",
            "redis: not a Redis URL: nothing may come after the database's number",
        ),
        ("capacity: {workers: 1}\nworkers: 2", "capacity.workers: 1 is fewer than the 2 workers to start"),
        ("transport: http", "transport: Input should be 'h2' or 'grpcio'"),
        (
            "scrape: {interval_min_seconds: 9}",
            "interval_max_seconds must not be below interval_min_seconds; set it to at least 9 (it is 5)",
        ),
        ("scrape: {interval_min_seconds: .nan}", "scrape.interval_min_seconds: "),
        ("scrape: {timeout_seconds: 0}", "scrape.timeout_seconds: "),
        ("log: {level: loud}", "log.level: "),
        ("prefix: {block_bytes: 100}", "prefix.block_bytes: must be a power of two, or 0: write 64 or 128 (got 100)"),
        ("prefix: {block_bytes: 131072}", "prefix.block_bytes: Input should be less than or equal to 65536"),
        ("drain_seconds: -1", "drain_seconds: "),
        ("max_message_bytes: 1", "max_message_bytes: "),
        ("envoy: {client_certificate: c.pem}", "envoy: client_certificate and client_key: one needs the other"),
        ("envoy: {client_key: k.pem}", "envoy: client_certificate and client_key: one needs the other"),
        ("max_message_bytes: 33554432\nenvoy: {body_limit_bytes: 33554432}", "set at least 33555456"),
        ("strategy: random\nstrategy: random", " line 2, column 1: not YAML: 'strategy' is written twice"),
        ("log: {level: info, format: json, level: debug}", "not YAML: 'level' is written twice"),
        ("? [a, b]\n: 1", "not YAML: found unhashable key"),
        ("x: !!map [a]", "not YAML: "),
        ("x: !!map a", "not YAML: "),
        ("tls: {certificate: , key: k}", "tls.certificate: must be a path"),
        ("tls: {certificate: a, key: b, ca: c}", "no key 'tls.ca'; known: tls.certificate, tls.client_ca, tls.key"),
        ("envoy: {listen: x}", "envoy.listen: 'x' is not an address"),
        ("envoy: {listen: '0.0.0.0:9901'}", "envoy.listen: 0.0.0.0:9901 and envoy.admin, 127.0.0.1:9901, use the"),
        ("envoy: {router_host: 'http://router'}", "envoy.router_host: 'http://router' is not a host: write a name or"),
        ("envoy: {router_host: 'router:20052'}", "envoy.router_host: 'router:20052' is not a host"),
        ("envoy: {router_host: '[::1]'}", "envoy.router_host: '[::1]' is not a host"),
        ("envoy: {router_host: ''}", "envoy.router_host: '' is not a host"),
        ("capacity: {catalog_bytes: 1000000000000000}", "capacity.catalog_bytes: Input should be less than or equal"),
        ("capacity: {series: 100000000000000000000}", "capacity.series: Input should be less than or equal"),
        ("prefix: {ring_bytes: 100000000000000000000}", "prefix.ring_bytes: Input should be less than or equal"),
        ("- a\n- b", "must be a mapping of keys to values"),
        ("just text", "must be a mapping of keys to values"),
        ("1: 2", "must be a mapping of keys to values"),
        ("a: [1,\nb: 2", " line 2, column 5: not YAML: "),
        ("listen: 'x\n", "not YAML: "),
        ("x: 2001-99-99", "not YAML: month must be in 1..12"),
        ("\x07", "not YAML: unacceptable character"),
    ],
)
def test_what_is_wrong_in_the_file(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    message = refused(path)
    assert message.startswith(f"{path}:")
    assert says in message


@pytest.mark.parametrize(
    "text",
    [
        "listen: '127.0.0.1:8080'\nadmin: '127.0.0.2:8080'",
        "listen: '0.0.0.0:8080'\nadmin: '[::1]:8080'",
        "listen: unix:/run/x\nadmin: unix:/run/y\nworkers: 1",
        "worker_listen: 'unix:/run/{i}'\nadmin: unix:/run/9\nworkers: 2",
    ],
)
def test_addresses_that_only_look_alike(tmp_path: Path, text: str) -> None:
    load(write(tmp_path, text))


def test_several_mistakes_are_one_line_still(tmp_path: Path) -> None:
    message = refused(write(tmp_path, "workers: 0\nlisten: x\nfoo: 1"))
    assert all(part in message for part in ("workers: ", "listen: ", "no key 'foo'"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"
    assert "Is a directory" in refused(tmp_path)
    (tmp_path / "latin").write_bytes(b"a: \xff")
    assert "is not UTF-8 text" in refused(tmp_path / "latin")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("POINTSMAN_WORKERS", "x", "POINTSMAN_WORKERS: workers: Input should be"),
        ("POINTSMAN_SCRAPE", "x", "POINTSMAN_SCRAPE: is not a JSON mapping; write nested keys as POINTSMAN_SCRAPE__"),
        ("POINTSMAN_SCRAPE", "7", "POINTSMAN_SCRAPE: scrape: must be a mapping"),
        ("POINTSMAN_SCRAPE", '{"failures": 0}', "POINTSMAN_SCRAPE: scrape.failures: "),
        ("POINTSMAN_SCRAPE__NOTHING", "1", "POINTSMAN_SCRAPE__NOTHING: no key 'scrape.nothing'"),
        (
            "POINTSMAN_SCRAPE__INTERVAL_MAX_SECONDS",
            "0.1",
            "POINTSMAN_SCRAPE__INTERVAL_MAX_SECONDS: scrape: interval_max",
        ),
        ("POINTSMAN_TLS__CERTIFICATE", "x", "POINTSMAN_TLS__CERTIFICATE: tls.key: Field required"),
        ("POINTSMAN_TLS__KEI", "1", "no key 'tls.kei'; did you mean 'tls.key'?"),
        ("POINTSMAN_WORKER", "3", "POINTSMAN_WORKER: there is no such key; did you mean POINTSMAN_WORKERS?"),
        ("POINTSMAN_LOG_LEVEL", "debug", "did you mean POINTSMAN_LOG__LEVEL?"),
        ("POINTSMAN_PORT", "8080", "POINTSMAN_PORT: there is no such key; "),
        ("POINTSMAN_IMAGE", "x", "POINTSMAN_IMAGE: there is no such key; unset it, or see docs/configuration.md"),
        ("POINTSMAN_LISTEN", "0.0.0.0:8080", "POINTSMAN_LISTEN: listen: 0.0.0.0:8080 and admin"),
        ("POINTSMAN_CAPACITY__WORKERS", "1", "c.yaml and POINTSMAN_CAPACITY__WORKERS: capacity.workers: 1 is fewer"),
        ("ROUTING_ALGORITHM", "pdd", "ROUTING_ALGORITHM: strategy: no strategy 'pdd'"),
        (
            "AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS",
            "soon",
            "AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS: 'soon' is not a number",
        ),
        (
            "AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS",
            "-5",
            "AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS: scrape.interval_min_seconds: ",
        ),
        ("AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES", "1e9x", "AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES: max_message_bytes: "),
    ],
)
def test_what_is_wrong_in_the_environment_is_said_of_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("workers: 2")
    monkeypatch.setenv(name, value)
    assert says in refused(Path("c.yaml"))
    if not name.startswith("POINTSMAN_WORKER"):
        monkeypatch.setenv("POINTSMAN_WORKERS", "2")
    assert name in refused()


def test_mistakes_of_several_sources_are_said_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "listen: x\nfoo: 1")
    monkeypatch.setenv("POINTSMAN_WORKERS", "0")
    message = refused(path, {"transport": "quic", "log": {"format": "xml"}})
    assert [part in message for part in (f"{path}: listen: ", f"{path}: no key 'foo'")] == [True, True]
    assert [part in message for part in ("POINTSMAN_WORKERS: workers: ", "--transport: transport: ")] == [True, True]
    assert "--log-format: log.format: " in message
    assert refused(write(tmp_path, "workers: 4"), {"workers": 0}).startswith("--workers: workers: ")


def test_only_those_who_set_the_key_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other keys the message speaks of: strategies have names like theirs."""
    flags = {"strategy": "foo", "prefix": {"blocks": 4096, "seed": 5}}
    assert refused(None, flags).startswith("--strategy: strategy: no strategy 'foo'")
    monkeypatch.setenv("POINTSMAN_PREFIX__SEED", "5")
    path = write(tmp_path, "strategy: foo")
    assert refused(path).startswith(f"{path}: strategy: no strategy 'foo'")
    monkeypatch.setenv("POINTSMAN_SCRAPE__INTERVAL_MAX_SECONDS", "0.1")
    path = write(tmp_path, "scrape: {failures: 5}")
    assert refused(path).startswith("POINTSMAN_SCRAPE__INTERVAL_MAX_SECONDS: scrape: interval_max_seconds must not")


def test_all_who_set_keys_that_do_not_fit_each_other_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "worker_listen: '0.0.0.0:65530'\nstrategy: random")
    monkeypatch.setenv("POINTSMAN_WORKERS", "9")
    assert refused(path).startswith(f"{path} and POINTSMAN_WORKERS: worker_listen: port 65530 leaves no room")
    path = write(tmp_path, "envoy: {body_limit_bytes: 5000, listen: '0.0.0.0:1'}")
    message = refused(path, {"max_message_bytes": 5000})
    assert message.startswith(f"{path} and --max-message-bytes: max_message_bytes: 5000 has no room")


def test_it_is_known_who_set_an_address_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "listen: '127.0.0.1:1'")
    monkeypatch.setenv("POINTSMAN_WORKER_LISTEN", "127.0.0.1:20000")
    config = load(path, {"admin": "127.0.0.1:2"}).model_copy(update={"workers": 3})
    assert config.where("127.0.0.1:1") == f"{path}: listen"
    assert config.where("127.0.0.1:2") == "--admin: admin"
    assert config.where("127.0.0.1:20002") == "POINTSMAN_WORKER_LISTEN: worker_listen"
    assert load(None).where("0.0.0.0:8080") == "configuration: admin"
    assert Config().where("0.0.0.0:8080") == "admin"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POINTSMAN_SERVICE_PORT", "50052"),
        ("POINTSMAN_SERVICE_PORT_GRPC_0", "50052"),
        ("POINTSMAN_PORT_50052_TCP", "tcp://10.96.0.7:50052"),
        ("POINTSMAN_PORT_50052_TCP_PROTO", "tcp"),
        ("POINTSMAN_PORT_50052_TCP_ADDR", "10.96.0.7"),
        ("POINTSMAN_PORT_53_UDP_PORT", "53"),
        ("POINTSMAN_ADMIN_SERVICE_HOST", "10.96.0.8"),
        ("POINTSMAN_ADMIN_PORT", "tcp://10.96.0.8:8080"),
        ("POINTSMAN_ADMIN_PORT_8080_TCP_PORT", "8080"),
        ("POINTSMAN_COMPILE", "0"),
    ],
)
def test_variables_of_others_that_bear_our_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    load(None)


def test_what_is_wrong_in_flags() -> None:
    assert "transport: " in refused(None, {"transport": "quic"})


@pytest.mark.parametrize(
    ("worker_listen", "addresses"),
    [
        ("0.0.0.0:20052", ["0.0.0.0:20052", "0.0.0.0:20053"]),
        ("[::]:20052", ["[::]:20052", "[::]:20053"]),
        ("unix:/run/w{i}.sock", ["unix:/run/w0.sock", "unix:/run/w1.sock"]),
    ],
)
def test_each_worker_has_an_address(worker_listen: str, addresses: list[str]) -> None:
    config = load(None, {"worker_listen": worker_listen, "workers": 2})
    assert [config.worker_address(number) for number in range(2)] == addresses


def test_tables_have_room_for_every_worker_twice() -> None:
    for workers, room in itertools.product((1, 7), (0, 30)):
        config = load(None, {"workers": workers, "capacity": {"workers": room}})
        assert config.max_workers == (room or workers + 4)
        assert config.table_capacity().writers == FIRST_WORKER + 2 * config.max_workers


def test_every_size_of_the_tables_is_configured() -> None:
    sizes = {"pods": 7, "catalog_bytes": 5000, "series": 70, "limited_users": 8, "limited_models": 9}
    config = load(None, {"capacity": sizes, "prefix": {"ring_bytes": 1 << 17}, "workers": 3})
    usual = asdict(Capacity())
    assert asdict(config.table_capacity()) == {
        **usual,
        **sizes,
        "writers": FIRST_WORKER + 14,
        "prefix_ring_bytes": 1 << 17,
    }
    assert not [name for name, size in asdict(config.table_capacity()).items() if size == usual[name]]


def section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def keys() -> Iterator[tuple[str, str]]:
    """Section and name of each key; those of no section are the whole configuration's."""
    for name, field in Config.model_fields.items():
        inner = section(field)
        for key in [name] if inner is None else inner.model_fields:
            yield (Config if inner is None else inner).__name__, key


def reads(source: Path) -> Iterator[tuple[str, str]]:
    """Section and name of what a file reads: `config.workers`, `config.scrape.failures`, `scrape.failures`, or through
    a parameter that is annotated as a section. The checks in config.py do not count."""
    classes = {name: inner.__name__ for name, field in Config.model_fields.items() if (inner := section(field))}
    own = source.name == "config.py"
    for function in ast.walk(ast.parse(source.read_text())):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or (own and function.name.startswith("_")):
            continue
        owners = {**classes, "config": "Config", "_config": "Config"} | ({"self": "Config"} if own else {})
        for each in function.args.args:
            for kind in (node.id for node in ast.walk(each) if isinstance(node, ast.Name)):
                if kind in classes.values():
                    owners[each.arg] = kind
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute):
                yield owners.get(getattr(node.value, "id", getattr(node.value, "attr", "")), ""), node.attr


def test_every_key_is_read_somewhere() -> None:
    files = Path(inspect.getfile(Config)).parent.rglob("*.py")
    found = {read for file in files for read in reads(file)}
    assert [key for key in keys() if key not in found] == []


DOCUMENTED = re.compile(r"^\| (?P<keys>`[a-z_.]+`(?:, `[a-z_.]+`)*) \| (?P<default>[^|]+) \| [^|]+ \|$", re.M)


def told(key: str, default: object) -> str:
    """A default as the page has it."""
    match default:
        case None | "" | []:
            return "none"
        case bool():
            return str(default).lower()
        case str():
            return f"`{default}`"
        case int() if key.endswith("_bytes") and default:
            return f"{default >> 20} MiB"
        case int() if default > 9999:
            return f"{default:,}"
    return f"{default:g}"


def test_every_key_is_documented_with_its_default() -> None:
    page = (Path(inspect.getfile(Config)).parent.parent / "docs" / "configuration.md").read_text()
    rows = {
        key: row["default"] for row in DOCUMENTED.finditer(page) for key in row["keys"].replace("`", "").split(", ")
    }
    usual = load(None).model_dump(mode="json") | {
        "tls": dict.fromkeys(TlsConfig.model_fields),
        "kubernetes": KubernetesConfig().model_dump(mode="json"),
    }
    defaults = {}
    for name, value in usual.items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            full = f"{name}.{key}" if key else name
            defaults[full] = told(full, inner)
    defaults |= {"workers": "CPUs", "session_secret": "new at each start", "capacity.workers": "`workers` + 4"}
    assert rows == defaults


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        load(None).workers = 3


@pytest.mark.parametrize("secret", [12345, True, ["s3cret"]])
def test_a_secret_of_the_wrong_kind_is_not_shown(secret: object) -> None:
    for values in ({"session_secret": secret}, {"limits": {"bearer_token": secret}}):
        with pytest.raises(ConfigError) as raised:
            load(None, values)
        assert "12345" not in str(raised.value)
        assert "s3cret" not in str(raised.value)


def test_aibrixs_names_for_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIBRIX_PREFILL_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("AIBRIX_KV_CONNECTOR_TYPE", "nixl")
    pd = load(None).pd
    assert (pd.timeout_seconds, pd.kv_connector) == (60.0, "nixl")


@pytest.mark.parametrize(
    ("settings", "silent"),
    [({}, True), ({"replicas": {"share": False}}, False), ({"redis": "redis://127.0.0.1:1"}, False)],
)
def test_without_redis_other_replicas_may_route_and_tell_nothing(settings: dict[str, Any], silent: bool) -> None:
    config = load(None, settings)
    assert config.has_silent_replicas is silent
    assert prefix_knowledge(config, make_tables()).homes is silent
