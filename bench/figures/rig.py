"""What benchmarks stand on: servers on one core, load on another, and the CPU that each used.

    core 0   whatever is measured: the router with all its processes, or a yardstick
    core 1   load generator, stub pods, Envoy

A cell (one server under one load) is measured for `seconds` in all, in several rounds; the cells of a comparison take
turns, so that what the machine does besides hits all of them. CPU is what the kernel charged, all threads, user and
system; extload reads it to 10 ms, 1 % of a second on a busy core.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from bench.lab import Lab, free_ports

ROOT = Path(__file__).parents[2]
BIN = ROOT / "bin"
GENERATOR = ROOT / "bench" / "extload"
METRICS_PAGE = ROOT / "tests" / "fixtures" / "vllm-0.32" / "metrics-after-evictions.txt"
MODEL = "llama-3-8b"
"""The one that the load generator asks for."""
WARM_SECONDS = 0.4
START_SECONDS = 20.0
_SCHEDULER_CLOCK = 2  # CPUCLOCK_SCHED: of all threads, in nanoseconds

Key = TypeVar("Key", bound=Hashable)


class Missing(Exception):
    """A program that a benchmark needs is not there. The message says how to get it."""


class BenchError(Exception):
    """Something failed that a benchmark relies on: its figures would be lies."""


@dataclass(frozen=True)
class Server:
    """An ext_proc server to be driven, and the processes that are charged."""

    address: str
    pids: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """What the load generator says of a run."""

    seconds: float
    streams: int
    chunks: int
    cpu_seconds: float
    latency_microseconds: Mapping[str, float]
    targets: Mapping[str, int]

    @property
    def cpu_microseconds(self) -> float:
        """Per stream."""
        return self.cpu_seconds / self.streams * 1e6

    @property
    def streams_per_second(self) -> float:
        return self.streams / self.seconds


@dataclass
class Rig:
    """Start things with it and they end with it. `seconds` is for each cell, `rounds` is how often it has its turn."""

    seconds: float = 3.0
    rounds: int = 3
    progress: Callable[[str], None] = lambda _: None
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)
    _folder: Path = field(init=False)
    _files: int = field(default=0, init=False)

    def __enter__(self) -> Self:
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="pointsman-bench-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # Programs

    def pods(self, count: int, *options: object) -> list[str]:
        """Start stub pods that serve a captured vLLM page and answer chats at once, streamed ones in chunks with
        pauses between them: host:port of each. More options are those of `extload pods`."""
        port = 8000 if _is_free("127.0.1.1", 8000) else free_ports(1)[0]
        self._spawn(
            [generator(), "pods", "-n", count, "-port", port, "-metrics", METRICS_PAGE, *options],
            load_core(),
            "listening",
        )
        return [f"127.0.1.{number}:{port}" for number in range(1, count + 1)]

    def router(
        self,
        pods: Sequence[str],
        *,
        scrape_seconds: float = 5.0,
        pinned: bool = True,
        more: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Lab:
        """Start a router that knows these pods and polls each every `scrape_seconds`. `more` is configuration, too,
        more arguments are `Lab`'s."""
        settings = {**self.settings(pods, scrape_seconds), **(more or {})}
        lab = Lab(pods=0, with_envoy=False, settings=settings, **arguments)
        self._open.enter_context(lab)
        if pinned:
            pin(all_pids(lab), {server_core()})
        return lab

    def settings(self, pods: Sequence[str], scrape_seconds: float) -> dict[str, Any]:
        """Configuration for a router with these pods."""
        file = self.new_file(".yaml")
        file.write_text(yaml.safe_dump({"models": [{"name": MODEL, "endpoints": list(pods)}]}))
        scrape = {"interval_min_seconds": scrape_seconds, "interval_max_seconds": scrape_seconds}
        return {"endpoints": str(file), "scrape": scrape}

    def users(self, *names: str) -> Path:
        """A file of users whose tokens are counted and never run out."""
        file = self.new_file(".yaml")
        file.write_text(yaml.safe_dump({"users": [{"name": name, "rpm": 10**8, "tpm": 10**12} for name in names]}))
        return file

    def program(self, module: str) -> Server:
        """Start one of our own servers that route nothing, as `python -m module ADDRESS`."""
        address = f"127.0.0.1:{free_ports(1)[0]}"
        pid = self._spawn([sys.executable, "-m", module, address], server_core(), "listening")
        return Server(address, (pid,))

    def envoy(self, binary: str, bootstrap: Mapping[str, Any]) -> None:
        """Start Envoy with one thread on the core of the load; returns when its listeners are up."""
        path = self.new_file(".yaml")
        path.write_text(yaml.safe_dump(dict(bootstrap), sort_keys=False))
        command = [binary, "-c", path, "--concurrency", 1, "--disable-hot-restart", "--log-level", "info"]
        self._spawn(command, load_core(), "all dependencies initialized. starting workers")

    def hold(self, address: str, streams: int) -> None:
        """Have so many routed streams open until the rig ends."""
        self._spawn([generator(), "hold", "-addr", address, "-n", streams], load_core(), "open")

    def new_file(self, suffix: str) -> Path:
        """A path that nothing has been written to yet."""
        self._files += 1
        return self._folder / f"{self._files}{suffix}"

    def _spawn(self, command: Sequence[object], core: int, ready: str) -> int:
        """Start a program on a core and wait for a line with `ready` in it. Returns its process id."""
        # Not through `taskset` and a fork of it: exec keeps the process id.
        words = ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", str(core), *(str(word) for word in command)]
        log = self.new_file(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT)
        self._open.callback(_end, process)
        deadline = time.monotonic() + START_SECONDS
        while ready not in (said := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{Path(str(command[0])).name} did not start: {said.strip()[-500:]}")
            time.sleep(0.02)
        return process.pid

    # Loads

    def load(self, server: Server, *options: object, seconds: float | None = None) -> Load:
        """Drive a server for `seconds`, by default one round of a cell. Raises BenchError if a stream fails."""
        duration = self.seconds / self.rounds if seconds is None else seconds
        warm = min(WARM_SECONDS, duration)
        command = [
            generator(),
            "load",
            "-json",
            "-addr",
            server.address,
            "-d",
            f"{duration:.3f}s",
            "-warm",
            f"{warm:.3f}s",
        ]
        command += ["-pids", ",".join(map(str, server.pids)), *(str(option) for option in options)]
        done = run(command, timeout=duration + 60)
        found = json.loads(done)
        if found["errors"] or found["first_error"] or not found["streams"]:
            raise BenchError(
                f"{found['errors']} of {found['errors'] + found['streams']} streams failed: {found['first_error']}"
            )
        return Load(
            found["seconds"], found["streams"], found["chunks"],
            found["cpu_user_seconds"] + found["cpu_system_seconds"], found["latency_microseconds"], found["targets"],
        )  # fmt: skip

    def take_turns(self, cells: Mapping[Key, Callable[[], float]]) -> dict[Key, list[float]]:
        """Run each cell once per round, every other round backwards. The values of each."""
        values: dict[Key, list[float]] = {key: [] for key in cells}
        for round_number in range(self.rounds):
            keys = list(cells)
            for key in keys if round_number % 2 == 0 else reversed(keys):
                self.progress(f"round {round_number + 1} of {self.rounds}: {key}")
                values[key].append(cells[key]())
        return values

    def busy_cores(self, pids: Iterable[int], seconds: float) -> float:
        """How much of a core these processes need while nothing but time passes."""
        pids = list(pids)
        before, began = cpu_seconds(pids), time.monotonic()
        time.sleep(seconds)
        return (cpu_seconds(pids) - before) / (time.monotonic() - began)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run(command: Sequence[str], timeout: float) -> str:
    """Run a load generator on its core: its output. Raises BenchError."""
    try:
        done = subprocess.run(
            ["taskset", "-c", str(load_core()), *command], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{Path(command[0]).name} did not end within {timeout:.0f} s") from None
    if done.returncode:
        raise BenchError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


# Cores and processes


def server_core() -> int:
    """The first core that we may use."""
    return min(os.sched_getaffinity(0))


def load_core() -> int:
    """Another one. Raises Missing when there is none."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Missing("two cores: one for the server and one for the load")
    return cores[1]


def pin(pids: Iterable[int], cores: Collection[int]) -> None:
    """Keep these processes, all their threads and what they start from now on, on these cores."""
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), cores)


def all_pids(lab: Lab) -> tuple[int, ...]:
    """The router's processes: supervisor, workers, scraper, admin."""
    return (lab.router.pid, *lab.router_children().values())


def cpu_seconds(pids: Iterable[int]) -> float:
    """What they have used so far, their ended threads too; ended processes count for nothing."""
    seconds = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            # clock_getcpuclockid(3), which Python has for threads only; /proc/PID/stat counts in hundredths of a second
            seconds += time.clock_gettime((~pid << 3) | _SCHEDULER_CLOCK)
    return seconds


def task_switches(pids: Iterable[int]) -> int:
    """How often the kernel has taken the core from one of their threads, because it slept or because of another."""
    count = 0
    for pid in pids:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            count += sum(int(each) for each in re.findall(r"ctxt_switches:\s+(\d+)", status.read_text()))
    return count


def memory_mib(pid: int, field: str = "Rss") -> float:
    """Rss, Pss or another line of smaps_rollup, in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise BenchError(f"/proc/{pid}/smaps_rollup has no {field}")
    return int(found[1]) / 1024


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


# Tools


def generator() -> str:
    """The load generator, built anew when its sources are newer. Raises Missing without Go."""
    binary = BIN / "extload"
    if not GENERATOR.is_dir():
        raise Missing("a clone of pointsman to be run in: the load generator's sources are not installed")
    newest = max(source.stat().st_mtime for source in GENERATOR.iterdir())
    if binary.exists() and binary.stat().st_mtime >= newest:
        return str(binary)
    go = shutil.which("go")
    if go is None:
        raise Missing("Go (1.26 or newer), to build the load generator in bench/extload")
    BIN.mkdir(exist_ok=True)
    done = subprocess.run(
        [go, "build", "-buildvcs=false", "-o", str(binary), "."],
        cwd=GENERATOR, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Missing(f"a load generator: `go build` in bench/extload failed: {done.stderr.strip()[-300:]}")
    return str(binary)


def tool(name: str, package: str) -> str:
    """A program of the system. Raises Missing with the Debian package that has it."""
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} (apt-get install {package})")
    return found
