"""The supervisor with real children: what cannot be started, and configurations that turn out not to work.

What is to go wrong does so where a file says it: the supervisor is a fork of this process, its patches included.
"""

import asyncio
import contextlib
import errno
import http.client
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
import yaml
from fleet import end_of, in_child
from waiting import wait_until

import workers.process
import workers.rolling_restart
import workers.supervisor
from bench.lab import Lab, free_ports, get
from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from state.tables import Tables
from workers.config import Config, ConfigError, load
from workers.supervisor import Supervisor


class Running:
    """A supervisor in a process of its own. `flags` are what the next SIGHUP changes."""

    def __init__(self, folder: Path, **flags: Any) -> None:
        ports = [f"127.0.0.1:{port}" for port in free_ports(8)]
        self.folder = folder
        self.base = {"listen": ports[0], "admin": ports[1], "worker_listen": ports[2], "drain_seconds": 1.0}
        self.base |= {"workers": 1, "log": {"format": "json"}}
        self.admin = ports[1]
        (folder / "log").touch()
        self.tell(**flags)
        self.pid = in_child(self._run)

    def _run(self) -> None:
        sys.stderr = (self.folder / "log").open("a", buffering=1)
        Supervisor(self._load(), self._load).run()

    def _load(self) -> Config:
        return load(None, self.base | orjson.loads((self.folder / "flags").read_bytes()))

    def tell(self, **flags: Any) -> None:
        """What the configuration says from the next time it is read."""
        (self.folder / "flags").write_bytes(orjson.dumps(flags))

    def hang_up(self) -> None:
        os.kill(self.pid, signal.SIGHUP)

    def children(self) -> dict[str, int]:
        found = {}
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(OSError):  # ended meanwhile
                title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b" \0").decode()
                found[title.removeprefix("pointsman: ")] = int(pid)
        return found

    def missing(self) -> list[str] | None:
        """What is not ready; None where nobody answers."""
        try:
            missing: list[str] = orjson.loads(get(self.admin, "/readyz")[1]).get("missing", [])
        except (OSError, http.client.HTTPException):
            return None
        return missing

    def ready(self) -> bool:
        return self.missing() == []

    def told(self) -> list[dict[str, Any]]:
        """The log, but for a line that is just being written."""
        lines = (self.folder / "log").read_text().splitlines(keepends=True)
        return [orjson.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def says(self, event: str) -> bool:
        return any(event in line["event"] for line in self.told())

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        assert end_of(self.pid) == 0


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(**flags: Any) -> Running:
        started.append(Running(tmp_path, **flags))
        wait_until(started[-1].ready)
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file exists, no process can be forked."""
    flag = tmp_path / "broken"
    fork = os.fork
    own = os.getpid()

    def may_fail() -> int:
        if os.getpid() != own and flag.exists():
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return fork()

    monkeypatch.setattr(os, "fork", may_fail)
    return flag


def test_a_fork_that_fails_is_tried_again_and_takes_nothing_down(running: Callable[..., Running], broken: Path) -> None:
    one = running()
    before = one.children()
    broken.touch()
    os.kill(before["worker 0"], signal.SIGKILL)
    wait_until(lambda: sum("cannot be started" in line["event"] for line in one.told()) >= 3)
    assert one.missing() == ["no worker is ready", "worker 0 is down"]
    assert one.children() == {name: pid for name, pid in before.items() if name != "worker 0"}
    os.kill(before["scraper"], signal.SIGKILL)
    wait_until(lambda: any("cannot be started" in line["event"] and line["child"] == "scraper" for line in one.told()))
    broken.unlink()
    wait_until(lambda: one.ready() and len(one.children()) == 3)


def test_a_fork_that_fails_in_a_rolling_restart_delays_it(running: Callable[..., Running], broken: Path) -> None:
    one = running(workers=2)
    before = one.children()
    broken.touch()
    one.hang_up()
    wait_until(lambda: sum("cannot be started" in line["event"] for line in one.told()) >= 3)
    assert one.children() == before and one.ready()
    broken.unlink()
    wait_until(lambda: len(set(one.children().values()) - set(before.values())) == 4 and one.ready())


@pytest.fixture
def _explain_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers with `explain: true` end at once, those with `usage_metrics: true` are never ready."""
    run_worker = workers.supervisor.run_worker

    async def run(config: Config, *rest: Any) -> None:
        if config.explain:
            raise RuntimeError("this is not to work")
        if config.usage_metrics:
            await asyncio.sleep(1000)
        await run_worker(config, *rest)

    monkeypatch.setattr(workers.supervisor, "run_worker", run)
    monkeypatch.setattr(workers.rolling_restart, "READY_SECONDS", 1.0)


@pytest.mark.usefixtures("_explain_breaks")
@pytest.mark.parametrize("change", ["explain", "usage_metrics"])
def test_a_configuration_with_which_no_worker_becomes_ready_changes_nothing(
    running: Callable[..., Running], change: str
) -> None:
    one = running(workers=2)
    before = one.children()
    one.tell(workers=2, **{change: True})
    one.hang_up()
    wait_until(lambda: one.says("the rolling restart stops here"))
    wait_until(lambda: one.children() == before)
    os.kill(before["worker 0"], signal.SIGKILL)
    wait_until(lambda: one.children().get("worker 0", before["worker 0"]) != before["worker 0"])
    wait_until(one.ready)
    one.tell(workers=2, strategy="random")
    one.hang_up()
    wait_until(lambda: not set(one.children().values()) & set(before.values()) and len(one.children()) == 4)
    wait_until(one.ready)


@pytest.mark.usefixtures("_explain_breaks")
def test_a_worker_that_dies_while_a_configuration_is_on_trial_comes_back_with_the_one_before(
    running: Callable[..., Running],
) -> None:
    one = running()
    before = one.children()
    one.tell(usage_metrics=True)
    one.hang_up()
    wait_until(lambda: one.says("rolling restart"))
    os.kill(before["worker 0"], signal.SIGKILL)
    wait_until(lambda: one.says("the rolling restart stops here"))
    wait_until(one.ready)
    after = one.children()
    assert after.pop("worker 0") != before.pop("worker 0")
    assert after == before


@pytest.mark.usefixtures("_explain_breaks")
def test_a_new_configuration_mends_workers_that_keep_ending(tmp_path: Path) -> None:
    one = Running(tmp_path, workers=2, explain=True)
    try:
        wait_until(lambda: sum("ended unexpectedly" in line["event"] for line in one.told()) >= 8)
        one.tell(workers=2)
        one.hang_up()
        wait_until(lambda: one.ready() and set(one.children()) == {"worker 0", "worker 1", "scraper", "admin"})
    finally:
        one.stop()


# -- start-up's checks, through the command


def ask(lab: Lab, user: str) -> int:
    """The status of the refusal, 0 for none."""
    message = ProcessingRequest()
    for name, value in {":path": "/v1/chat/completions", "user": user}.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    with grpc.insecure_channel(lab.listen) as channel:
        call = channel.stream_stream(
            "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )
        reply = next(call(iter([message]), timeout=10, wait_for_ready=True))
    return int(reply.immediate_response.status.code) if reply.HasField("immediate_response") else 0


def killed(lab: Lab) -> None:
    """The only worker, and wait for the next."""
    (before,) = lab.worker_pids()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: (pids := lab.worker_pids()) and pids != [before] and get(lab.config.admin, "/readyz")[0] == 200)


def test_a_worker_that_starts_while_the_users_file_is_broken_has_the_users_of_before(tmp_path: Path) -> None:
    path = tmp_path / "users.yaml"
    path.write_text("users: [{name: alice}, {name: bob}]")
    settings = {"limits": {"users_file": str(path)}}
    with Lab(pods=1, workers=1, with_envoy=False, settings=settings) as lab:
        assert (ask(lab, "alice"), ask(lab, "bob"), ask(lab, "carol")) == (0, 0, 401)
        path.write_text("users: [{name: alice}, {name: carol}]")
        wait_until(lambda: ask(lab, "carol") == 0)
        path.write_text("users: [")
        before = lab.router_children()
        os.kill(lab.router.pid, signal.SIGHUP)
        wait_until(lambda: "configuration not reloaded" in lab.router.tail())
        assert lab.router_children() == before
        for _ in range(2):
            killed(lab)
            assert (ask(lab, "alice"), ask(lab, "bob"), ask(lab, "carol")) == (0, 401, 0)
        path.write_text("users: [{name: bob}]")
        wait_until(lambda: ask(lab, "bob") == 0)
        assert ask(lab, "alice") == 401


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "tls: {certificate: /nonexistent.pem, key: /nonexistent.key}",
            "tls.certificate: /nonexistent.pem cannot be read: No such file",
        ),
        ("limits: {users_file: /nonexistent.yaml}", "no such users file"),
        ("endpoints: /nonexistent.yaml", "/nonexistent.yaml: cannot be read"),
    ],
)
def test_a_configuration_that_could_not_be_started_with_is_not_reloaded(change: str, says: str) -> None:
    with Lab(pods=0, workers=1, with_envoy=False) as lab:
        before = lab.router_children()
        document = yaml.safe_load(lab.config_path.read_text()) | yaml.safe_load(change)
        lab.config_path.write_text(yaml.safe_dump(document))
        os.kill(lab.router.pid, signal.SIGHUP)
        wait_until(lambda: "configuration not reloaded" in lab.router.tail())
        assert says in lab.router.tail()
        assert lab.router_children() == before
        killed(lab)


def test_what_needs_a_full_restart_is_named(running: Callable[..., Running]) -> None:
    one = running()
    one.tell(prefix={"ring_bytes": 1 << 20}, capacity={"pods": 99})
    one.hang_up()
    wait_until(lambda: one.says("rolling restart"))
    assert [line["key"] for line in one.told() if "full restart" in line["event"]] == ["capacity", "prefix.ring_bytes"]
    wait_until(one.ready)


def test_the_supervisor_takes_what_a_new_configuration_says_of_the_log(running: Callable[..., Running]) -> None:
    one = running(log={"format": "json", "level": "error"})
    one.tell(log={"format": "json", "level": "info"})
    one.hang_up()
    wait_until(lambda: one.says("ready"))
    wait_until(one.ready)


def test_its_processes_may_open_as_many_files_as_the_system_allows(running: Callable[..., Running]) -> None:
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most // 2, most))
    try:
        one = running()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))
    assert resource.prlimit(one.children()["scraper"], resource.RLIMIT_NOFILE) == (most, most)


def test_tables_that_cannot_be_made_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(Tables, "create", no_memory)
    config = load(None)
    with pytest.raises(
        ConfigError, match=r"^the shared tables cannot be made: Cannot allocate memory; lower `capacity`"
    ):
        Supervisor(config, lambda: config)


def test_a_unix_path_of_all_workers_stays_that_of_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    one = Running(tmp_path, listen=f"unix:{tmp_path}/own/sock", capacity={"workers": 2})
    try:
        wait_until(one.ready)
        before = (tmp_path / "own" / "sock").stat().st_ino
        os.kill(one.pid, signal.SIGTTIN)
        wait_until(lambda: one.says("no room for another worker: the unix path"))
        assert (tmp_path / "own" / "sock").stat().st_ino == before
        assert "worker 1" not in one.children()
    finally:
        one.stop()
    assert list((tmp_path / "own").iterdir()) == []


def test_a_replicator_comes_with_redis_and_is_replaced_when_it_dies(
    running: Callable[..., Running], valkey_url: str
) -> None:
    router = running()
    assert "replicator" not in router.children()
    router.tell(redis=valkey_url)
    router.hang_up()
    wait_until(lambda: "replicator" in router.children())
    wait_until(router.ready)
    wait_until(lambda: 'pointsman_exchanges_total{result="ok"}' in get(router.admin, "/metrics")[1].decode())
    before = router.children()["replicator"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: router.children().get("replicator", before) != before)
    wait_until(router.ready)
    before = router.children()["replicator"]
    router.tell(redis=valkey_url, replicas={"share": False})
    router.hang_up()  # the job stays, and whoever does it has nothing to do
    wait_until(lambda: router.children().get("replicator", before) != before)
    wait_until(router.ready)


@pytest.fixture
def _fast_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.process, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(workers.supervisor, "LOOK_SECONDS", 0.2)


@pytest.mark.usefixtures("_fast_looks")
def test_a_child_that_hangs_is_told_of_and_one_that_goes_on_is_left_alone(running: Callable[..., Running]) -> None:
    one = running(workers=2)
    before = one.children()
    os.kill(before["worker 1"], signal.SIGSTOP)
    wait_until(lambda: one.missing() == ["worker 1 hangs"])
    os.kill(before["worker 1"], signal.SIGCONT)
    wait_until(one.ready)
    wait_until(lambda: one.says("a hung child has recovered"))
    assert one.children() == before


@pytest.mark.usefixtures("_fast_looks")
@pytest.mark.parametrize("name", ["worker 0", "scraper"])
def test_a_child_that_hangs_for_long_is_replaced(running: Callable[..., Running], name: str) -> None:
    one = running(workers=2)
    before = one.children()
    os.kill(before[name], signal.SIGSTOP)
    wait_until(lambda: one.children().get(name, before[name]) != before[name])
    wait_until(lambda: one.says("killing a child that hangs"))
    wait_until(one.ready)
    assert {each: pid for each, pid in one.children().items() if each != name} == {
        each: pid for each, pid in before.items() if each != name
    }


@pytest.mark.usefixtures("_fast_looks")
def test_a_child_that_hangs_is_not_waited_for_when_it_is_to_be_replaced(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.supervisor, "KILL_LOOKS", 1_000_000)
    monkeypatch.setattr(workers.supervisor, "KILL_AFTER_SECONDS", 0.1)
    one = running(workers=1, drain_seconds=600)
    before = one.children()
    os.kill(before["worker 0"], signal.SIGSTOP)
    wait_until(lambda: one.says("a child hangs"))
    one.hang_up()
    wait_until(lambda: one.children().get("worker 0", before["worker 0"]) != before["worker 0"])
    wait_until(one.ready)


def test_a_worker_added_while_the_one_removed_before_drains_has_its_number(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so the address that Envoy knows."""
    monkeypatch.setattr(workers.supervisor, "KILL_AFTER_SECONDS", 0.1)
    one = running(workers=2)
    before = one.children()["worker 1"]
    os.kill(before, signal.SIGSTOP)  # as one that is not done draining
    os.kill(one.pid, signal.SIGTTOU)
    wait_until(lambda: one.says("worker removed"))
    os.kill(one.pid, signal.SIGTTIN)
    wait_until(lambda: one.says("worker added"))
    wait_until(lambda: not Path(f"/proc/{before}").exists())
    wait_until(one.ready)
    assert {name for name in one.children() if "worker" in name} == {"worker 0", "worker 1"}
    os.kill(one.pid, signal.SIGTTOU)
    wait_until(lambda: "worker 1" not in one.children())
    os.kill(one.pid, signal.SIGTTIN)  # its address was given up, and can be had again
    wait_until(lambda: "worker 1" in one.children() and one.ready())


@pytest.mark.usefixtures("_fast_looks")
def test_a_child_that_hangs_before_it_is_ready_is_replaced(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_worker = workers.supervisor.run_worker

    async def run(*given: Any) -> None:
        try:
            (tmp_path / "hung").touch(exist_ok=False)
        except FileExistsError:
            await run_worker(*given)
        else:
            time.sleep(1000)

    monkeypatch.setattr(workers.supervisor, "run_worker", run)
    one = running(workers=1)
    wait_until(lambda: one.says("killing a child that hangs"))
    wait_until(one.ready)
    assert not one.says("a child hangs")
