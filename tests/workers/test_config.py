"""One configuration out of file, environment and flags; whatever is wrong in one line."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from workers.config import Config, ConfigError, load


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
    monkeypatch.setenv("POINTSMAN_REDIS", "redis://other/1")
    assert load(None).redis == "redis://other/1"


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
        ("listen: nonsense", "listen: 'nonsense' is no address: write host:port"),
        ("listen: 50052", "listen: "),
        ("admin: '::1:80'", "write an IPv6 host in brackets"),
        ("worker_listen: unix:/run/w.sock", "worker_listen: a unix path needs {i}"),
        ("worker_listen: '0.0.0.0:65530'\nworkers: 9", "leaves no room for 13 workers"),
        ("worker_listen: '0.0.0.0:50050'\nworkers: 2", "include that of listen, 50052"),
        ("worker_listen: '127.0.0.1:8078'\nworkers: 2", "include that of admin, 8080"),
        ("workers: 0", "workers: Input should be greater than or equal to 1 (got 0)"),
        ("workers: many", "workers: Input should be a valid integer"),
        ("capacity: {workers: 1}\nworkers: 2", "capacity.workers is 1, fewer than the 2 workers to start"),
        ("transport: http", "transport: Input should be 'h2' or 'grpcio'"),
        ("scrape: {interval_min_seconds: 9}", "interval_max_seconds must not be below interval_min_seconds"),
        ("scrape: {interval_min_seconds: .nan}", "scrape.interval_min_seconds: "),
        ("scrape: {timeout_seconds: 0}", "scrape.timeout_seconds: "),
        ("log: {level: loud}", "log.level: "),
        ("prefix: {block_bytes: 100}", "prefix.block_bytes: must be a power of two, or 0: write 64 or 128 (got 100)"),
        ("prefix: {block_bytes: 131072}", "prefix.block_bytes: Input should be less than or equal to 65536"),
        ("drain_seconds: -1", "drain_seconds: "),
        ("max_message_bytes: 1", "max_message_bytes: "),
        ("envoy: {listen: x}", "envoy.listen: 'x' is no address"),
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


def test_several_mistakes_are_one_line_still(tmp_path: Path) -> None:
    message = refused(write(tmp_path, "workers: 0\nlisten: x\nfoo: 1"))
    assert all(part in message for part in ("workers: ", "listen: ", "no key 'foo'"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"
    assert "Is a directory" in refused(tmp_path)
    (tmp_path / "latin").write_bytes(b"a: \xff")
    assert "is no UTF-8 text" in refused(tmp_path / "latin")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("POINTSMAN_WORKERS", "x", "workers: "),
        ("POINTSMAN_SCRAPE", "x", "environment: "),
        ("POINTSMAN_SCRAPE__NOTHING", "1", "no key 'scrape.nothing'"),
        ("ROUTING_ALGORITHM", "pdd", "strategy: no strategy 'pdd'"),
        ("AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS", "soon", "AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS: 'soon' is no number"),
        ("AIBRIX_POD_METRIC_REFRESH_INTERVAL_MS", "-5", "scrape.interval_min_seconds: "),
        ("AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES", "1e9x", "max_message_bytes: "),
    ],
)
def test_what_is_wrong_in_the_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    assert says in refused()


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
        assert config.table_capacity().writers == 3 + 2 * config.max_workers


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        load(None).workers = 3
