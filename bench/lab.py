"""Simulated pods, the router and a real Envoy on this machine, for as long as a `with` block lasts.

    with Lab(pods=3, workers=2, strategy="least-request") as lab:
        requests.post(lab.envoy_url + "/v1/chat/completions", json={"model": lab.model, ...})

`with` returns once every pod has been polled, every worker listens and Envoy serves; it ends when every process has
ended and the folder of configuration and logs is gone. Each process is a session of its own, so that a Ctrl-C in the
terminal is ours to handle, and it gets SIGTERM from the kernel should the thread that started it die.

The environment does not count: a lab is what its arguments say. Everything listens on loopback, on ports below the
range from which the kernel takes the ports of outgoing connections.
"""

import contextlib
import ctypes
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

import yaml

from workers.config import Config, load
from workers.envoy import ROUTER_CLUSTER, bootstrap
from workers.envoy_binary import envoy_path

READY_SECONDS = 30.0
"""For each of pods, router and Envoy: far more than they need, for slow machines."""
STOP_SECONDS = 10.0
"""Between being asked to end and being killed; for the router on top of its own drain time."""
PORTS = range(10_000, 32_000)
_PR_SET_PDEATHSIG = 1
_OURS = ("POINTSMAN_", "AIBRIX_", "REDIS_", "ROUTING_ALGORITHM")
_PYTHON = (sys.executable, "-m")
_libc = ctypes.CDLL(None)


class LabError(Exception):
    """Something did not start, or ended. The first line says what; the last lines of its log may follow."""


@dataclass
class Process:
    """A process and the file that gets its output."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def tail(self, lines: int = 12) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def check(self) -> None:
        """Raise LabError if it has ended."""
        code = self.popen.poll()
        if code is not None:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise LabError(f"{self.name} (pid {self.pid}) {how}; the end of its log:\n{self.tail()}")

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """Ask it to end, wait, and kill it if it does not. Returns the exit code."""
        self.popen.terminate()
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()  # what it started goes with it, by the same order to the kernel
            return self.popen.wait()


@dataclass
class Lab:
    """See the head of this file. The first group of fields is for the caller to choose, the second for it to read."""

    pods: int = 3
    workers: int = 2
    model: str = "llama-3.1-8b"
    strategy: str | None = None
    transport: str | None = None
    destination: str | None = None
    accounting: str | None = None
    """These four are the configuration's defaults unless given."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """More of the configuration, nested as in the file; wins over what the lab would write."""
    rolesets: Sequence[tuple[int, int]] = ()
    """How many of the pods prefill and how many decode, for each roleset, in the order of the pods."""
    pod_arguments: Sequence[str] = ()
    """More options of `simulate-pod`."""
    process_per_pod: bool = False
    """Instead of one process for all, which is lighter: for those who want to kill one."""
    with_envoy: bool = True
    envoy_concurrency: int = 1
    other_workers: Sequence[str] = ()
    """host:port of another router's workers, to which Envoy shall talk as well."""
    keep_logs: bool = False
    """Leave the folder behind."""
    progress: Callable[[str], None] = lambda _: None
    """Told what is being waited for."""

    addresses: list[str] = field(default_factory=list, init=False)
    """host:port of each pod. The router calls them pod-0, pod-1 and so on, in this order."""
    config: Config = field(init=False)
    folder: Path = field(init=False)
    processes: list[Process] = field(default_factory=list, init=False)
    pod_processes: list[Process] = field(default_factory=list, init=False)
    router: Process = field(init=False)
    envoy: Process = field(init=False)

    def __enter__(self) -> Self:
        binary = envoy_path() if self.with_envoy else ""
        self.folder = Path(tempfile.mkdtemp(prefix="pointsman-lab-"))
        try:
            self.config = self._configuration()
            if self.pods:
                self.start_pods(self.pods)
            self.write_endpoints(self.addresses)
            self.start_router()
            if self.with_envoy:
                self._start_envoy(binary)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What there is

    @property
    def envoy_url(self) -> str:
        """Where clients send their requests."""
        return f"http://{self.config.envoy.listen}"

    @property
    def envoy_admin_url(self) -> str:
        return f"http://{self.config.envoy.admin}"

    @property
    def admin_url(self) -> str:
        """The router's health, metrics and /debug/pods."""
        return f"http://{self.config.admin}"

    @property
    def listen(self) -> str:
        """host:port that all workers share."""
        return self.config.listen

    @property
    def worker_addresses(self) -> list[str]:
        return [self.config.worker_address(number) for number in range(self.workers)]

    @property
    def config_path(self) -> Path:
        return self.folder / "pointsman.yaml"

    @property
    def endpoints_path(self) -> Path:
        return self.folder / "endpoints.yaml"

    def router_children(self) -> dict[str, int]:
        """Process ids of the router's processes now: "worker 0", "scraper", "admin" and so on."""
        listed = Path(f"/proc/{self.router.pid}/task/{self.router.pid}/children").read_text().split()
        children = {}
        for pid in listed:
            with contextlib.suppress(OSError):  # ended meanwhile
                title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
                children[title.removeprefix("pointsman: ")] = int(pid)
        return children

    def worker_pids(self) -> list[int]:
        """Process ids of the workers now, by number."""
        found = [(int(name.split()[1]), pid) for name, pid in self.router_children().items() if "worker " in name]
        return [pid for _, pid in sorted(found)]

    def believed_pods(self) -> list[dict[str, Any]]:
        """What the router says of the pods: the list in /debug/pods."""
        status, body = get(self.config.admin, "/debug/pods")
        if status != 200:
            raise LabError(f"{self.admin_url}/debug/pods answered {status}; the end of its log:\n{self.router.tail()}")
        listed: list[dict[str, Any]] = json.loads(body)["pods"]
        return listed

    def check(self) -> None:
        """Raise LabError if a process has ended that should not have."""
        for process in self.processes:
            process.check()

    # Changing it

    def start_pods(self, count: int) -> list[str]:
        """Start more pods and wait until they answer. They get requests once `write_endpoints` names them."""
        self.progress(f"starting {count} simulated pods")
        ports = free_ports(count)
        at_once = 1 if self.process_per_pod else count
        for port in ports[::at_once]:
            self.pod_processes.append(self._start_pod(port, at_once))
        started = [f"127.0.0.1:{port}" for port in ports]
        for address in started:
            self.until(lambda address=address: _answers(address, "/health"), f"pod {address}")  # type: ignore[misc]
        self.addresses += started
        return started

    def restart_pod(self, number: int) -> None:
        """End one pod's process and start another at its address, with nothing in its cache. For a process per pod."""
        self.stop_process(self.pod_processes[number])
        address = self.addresses[number]
        self.pod_processes[number] = self._start_pod(int(address.rpartition(":")[2]), 1)
        self.until(lambda: _answers(address, "/health"), f"pod {address}")

    def _start_pod(self, port: int, count: int) -> Process:
        options = ["--port", port, "--count", count, "--model", self.model]
        return self._start(f"pods-{port}", [*_PYTHON, "bench.pod", *options, *self.pod_arguments])

    def stop_process(self, process: Process) -> int:
        """End one process on purpose. Returns its exit code."""
        self.processes.remove(process)
        return process.stop(STOP_SECONDS + (self.config.drain_seconds if process.name == "router" else 0))

    def write_endpoints(self, addresses: Sequence[str]) -> None:
        """Make these the pods of the model."""
        names = {address: f"pod-{number}" for number, address in enumerate(self.addresses)}
        endpoints = [{"address": each, "name": names.get(each)} for each in addresses]
        model: dict[str, Any] = {"name": self.model}
        if self.rolesets:
            left = iter(self.addresses)
            by_address = dict(zip(addresses, endpoints, strict=True))
            model["rolesets"] = [
                {
                    "name": f"roleset-{number}",
                    **{
                        role: [by_address[each] for each in islice(left, count) if each in by_address]
                        for role, count in (("prefill", prefill), ("decode", decode))
                    },
                }
                for number, (prefill, decode) in enumerate(self.rolesets)
            ]
        else:
            model["endpoints"] = endpoints
        document = {"models": [model]}
        new = self.endpoints_path.with_suffix(".new")
        new.write_text(yaml.safe_dump(document))
        new.rename(self.endpoints_path)

    def start_router(self) -> None:
        """Start the router and wait until every worker listens and every pod has been polled."""
        self.progress(f"starting the router with {self.workers} workers")
        command = [*_PYTHON, "workers.cli", "serve", "--config", self.config_path]
        self.router = self._start("router", command)
        self.until(lambda: _answers(self.config.admin, "/readyz"), "the router")
        if self.config.endpoints is not None:
            self.progress("polling the pods' metrics")
            self.until(self._all_pods_polled, "the first poll of every pod")

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait for something while everything lives. Raises LabError."""
        deadline = time.monotonic() + READY_SECONDS
        while not happened():
            self.check()
            if time.monotonic() > deadline:
                tail = self.processes[-1].tail()
                raise LabError(f"{what} was not ready within {READY_SECONDS:.0f} s; the end of its log:\n{tail}")
            time.sleep(0.02)

    # How

    def _configuration(self) -> Config:
        """Checked, complete, and written down for the router."""
        ports = [f"127.0.0.1:{port}" for port in free_ports(5 + self.workers + 4)]
        own: dict[str, Any] = {
            "listen": ports[0],
            "admin": ports[1],
            "envoy": {"listen": ports[2], "admin": ports[3]},
            "worker_listen": ports[5],  # and those after it
            "workers": self.workers,
            "endpoints": str(self.endpoints_path),
            "drain_seconds": 5.0,
        }
        for name in ("strategy", "transport"):
            if getattr(self, name) is not None:
                own[name] = getattr(self, name)
        for name in ("destination", "accounting"):
            if getattr(self, name) is not None:
                own["envoy"][name] = getattr(self, name)
        defaults = Config.model_construct().model_dump(mode="json", exclude={"workers"})
        values = _merged(_merged(defaults, own), self.settings)
        config = load(None, values)
        self.workers = config.workers
        written = _merged(config.model_dump(mode="json"), self.settings)  # secrets are not shown in a dump
        self.config_path.write_text(yaml.safe_dump(written, sort_keys=False))
        return config

    def _start_envoy(self, binary: str) -> None:
        self.progress("starting Envoy")
        path = self.folder / "envoy.yaml"
        document = bootstrap(self.config)
        self._add_workers(document)
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        command = [binary, "-c", path, "--concurrency", self.envoy_concurrency]
        self.envoy = self._start("envoy", [*command, "--disable-hot-restart", "--log-level", "warning"])
        self.until(lambda: _answers(self.config.envoy.admin, "/ready"), "Envoy")
        self.until(lambda: _answers(self.config.envoy.listen, "/v1/models"), "Envoy's way to the router")

    def _add_workers(self, document: dict[str, Any]) -> None:
        clusters = document["static_resources"]["clusters"]
        (assignment,) = (each["load_assignment"] for each in clusters if each["name"] == ROUTER_CLUSTER)
        endpoints = assignment["endpoints"][0]["lb_endpoints"]
        for worker in self.other_workers:
            host, _, port = worker.rpartition(":")
            address = {"socket_address": {"address": host, "port_value": int(port)}}
            endpoints.append({**endpoints[0], "endpoint": {**endpoints[0]["endpoint"], "address": address}})

    def _start(self, name: str, command: Sequence[object]) -> Process:
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            popen = _spawn([str(word) for word in command], output)
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def _all_pods_polled(self) -> bool:
        believed = self.believed_pods()
        return len(believed) >= len(self.addresses) and all(pod["sample_age_seconds"] is not None for pod in believed)

    def stop(self) -> None:
        """End everything: Envoy first, so that the router has no streams left to wait for."""
        for process in reversed(self.processes):
            process.popen.terminate()
        for process in list(reversed(self.processes)):
            self.stop_process(process)
        if not self.keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(count: int) -> range:
    """Consecutive ports of 127.0.0.1 on which nobody listens. They are not held: whoever wants one binds it soon."""
    for _ in range(200):
        start = random.randrange(PORTS.start, PORTS.stop - count)
        ports = range(start, start + count)
        if all(_is_free(port) for port in ports):
            return ports
    raise LabError(f"no {count} free ports in a row between {PORTS.start} and {PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def get(address: str, path: str, timeout_seconds: float = 2.0) -> tuple[int, bytes]:
    """GET from host:port: status and body. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection(address, timeout=timeout_seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _answers(address: str, path: str) -> bool:
    try:
        return get(address, path)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _spawn(command: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def before_exec() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(1)

    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    environment["PYTHONUNBUFFERED"] = "1"
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        cwd=Path(__file__).parent.parent, start_new_session=True, preexec_fn=before_exec,
    )  # fmt: skip


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, sections key by key; `above` wins."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged
