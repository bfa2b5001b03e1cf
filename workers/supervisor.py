"""Starts the processes, watches them, replaces them.

One plain loop, no threads, nothing asynchronous: signals and children's words arrive on file descriptors. Children
are forked from this process, which has imported everything already, so that a dead one is back within some tens of
milliseconds and shares the memory of the code. What a child does is in `ext_proc`, `scraper`, `admin` and `replicator`.

    SIGTERM, SIGINT   drain and end; a second one ends at once
    SIGHUP            read the configuration again and replace every worker, one after the other: the successor
                      listens before its predecessor is told to drain. The configuration is on trial until the first
                      of them is ready; should it end before, or take too long, the one before stays in force
    SIGTTIN, SIGTTOU  one worker more, one less
"""

import contextlib
import gc
import os
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

import structlog

from state.roster import Kind, Phase, Process
from state.tables import ADMIN, FIRST_WORKER, REPLICATOR, SCRAPER, SUPERVISOR, Tables
from workers.admin import run_admin
from workers.compiled import is_compiled, outdated
from workers.config import Config, ConfigError
from workers.ext_proc import run_worker
from workers.last_users import LastUsers
from workers.ports import Reservation, clear_stale_socket
from workers.process import run_child, set_up_logging
from workers.replicator import run_replicator
from workers.scraper import run_scraper
from workers.users import UsersError, read_text

log = structlog.get_logger()

BACK_OFF_SECONDS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Before the first, second, ... restart in a row; the last one repeats."""
STEADY_SECONDS = 10.0
"""A child that lived this long was all right: its successor starts at once."""
READY_SECONDS = 60.0
"""For a replacement to become ready, before it is killed and the rolling restart ends."""
LOOK_SECONDS = 2.0
"""Between two looks at whether the children's hearts beat, which they do once a second."""
HUNG_LOOKS, KILL_LOOKS = 5, 15
"""Without a beat, before a child is taken to hang, and before it is killed to be replaced. Looks are counted and not
seconds: when everything was frozen for a while, nobody hangs."""
KILL_AFTER_SECONDS = 5.0
"""Beyond the drain time, before a child that was told to end is killed."""

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCHLD)


@dataclass(eq=False)
class LaunchSettings:
    """What children are started with."""

    config: Config
    last_users: LastUsers | None


@dataclass(eq=False)
class Child:
    """One running process."""

    job: "Job"
    settings: LaunchSettings
    pid: int
    writer: int
    started: float
    ready_fd: int
    phase: Phase = Phase.STARTING
    kill_at: float | None = None
    beats: int = -1
    silent_looks: int = 0


@dataclass(eq=False)
class Job:
    """A job that somebody must be doing: worker 0, the scraper, ..."""

    kind: Kind
    number: int
    child: Child | None = None
    retiring: list[Child] = field(default_factory=list)
    successor: Child | None = None
    restarts: int = 0
    failures_in_a_row: int = 0
    start_at: float | None = None
    kept_writer: int | None = None
    """A dead worker's row, for its successor: until then it says that the worker is down."""
    closing: bool = False

    @property
    def name(self) -> str:
        """For titles and logs."""
        return f"worker {self.number}" if self.kind is Kind.WORKER else self.kind.name.lower()


class Supervisor:
    """See the head of this file. `reload` gives the configuration anew, or raises ConfigError."""

    def __init__(self, config: Config, reload: Callable[[], Config]) -> None:
        self._settings = _launch_settings(config)
        self._trial: LaunchSettings | None = None
        """Read again, and not yet known to work."""
        self._reload = reload
        self._tables = Tables.create(config.table_capacity(), writer=SUPERVISOR)
        for writer in (SUPERVISOR, SCRAPER, ADMIN, REPLICATOR):
            self._tables.ledger.admit(writer)
        self._series = self._tables.series()
        self._free_writers = list(range(FIRST_WORKER, self._tables.capacity.writers))
        self._jobs: list[Job] = [Job(Kind.SCRAPER, 0), Job(Kind.ADMIN, 0)]
        if config.has_replicas:
            self._jobs.append(Job(Kind.REPLICATOR, 0))
        self._jobs += [Job(Kind.WORKER, number) for number in range(config.workers)]
        self._children: dict[int, Child] = {}
        self._rolling: deque[Job] = deque()
        self._roll_again = False
        self._roll_at: float | None = None
        """When the rolling restart goes on, where it has to wait."""
        self._reservations: list[Reservation] = []
        self._stopping = False
        self._check_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def _config(self) -> Config:
        return self._settings.config

    def run(self) -> int:
        """Until everything has ended. Returns the exit code."""
        set_up_logging(self._config.log, "supervisor")
        self._reserve()
        self._install_signals()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        gc.collect()
        gc.freeze()
        log.info(
            "starting",
            version=version("pointsman"),
            strategy=self._config.strategy,
            endpoints=str(self._config.endpoints or ""),
            workers=self._config.workers,
            listen=self._config.listen,
            admin=self._config.admin,
            hot_path="compiled" if is_compiled() else "interpreted",
        )
        if changed := outdated():
            log.warning("sources were changed after they were compiled: run `make install`", sources=changed)
        for job in self._jobs:
            self._start_job(job)
        while self._children or not self._stopping:
            self._wait_for_events()
            self._reap()
            now = time.monotonic()
            self._restart_due(now)
            self._kill_due(now)
            self._check_heartbeats(now)
            self._roll()
            if self._stopping:
                self._end_services()
        log.info("ended")
        return 0

    # -- addresses

    def _reserve(self) -> None:
        """Make sure that nobody else has our addresses, and that nobody takes them while we live."""
        config = self._config
        addresses = [config.listen] + [config.worker_address(number) for number in range(config.workers)]
        for address in addresses:
            self._reservations.append(Reservation(address, shared=True))
        Reservation(config.admin, shared=False).release()

    # -- signals

    def _install_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, lambda *_: None)

    def _wait_for_events(self) -> None:
        """Sleep until a signal, a word from a child, or the next thing that is due."""
        now = time.monotonic()
        due = [job.start_at for job in self._jobs if job.start_at is not None]
        due += [child.kill_at for child in self._children.values() if child.kill_at is not None]
        due += [self._roll_at] if self._roll_at is not None else []
        timeout = max(0.0, min([*due, self._check_at]) - now)
        for key, _ in self._selector.select(timeout):
            if key.fd == self._wake_read:
                for number in os.read(self._wake_read, 4096):
                    self._on_signal(signal.Signals(number))
            else:
                self._on_ready(key.data)

    def _on_signal(self, number: signal.Signals) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            if self._stopping:
                for child in self._children.values():
                    self._signal(child, signal.SIGKILL)
            else:
                self._stop()
        elif self._stopping:
            return
        elif number is signal.SIGHUP:
            self._roll_again = True  # after the one under way, whose successors have the old configuration
        elif number is signal.SIGTTIN:
            self._add_worker()
        elif number is signal.SIGTTOU:
            self._remove_worker()

    def _stop(self) -> None:
        log.info("draining", seconds=self._config.drain_seconds)
        self._stopping = True
        self._roll_again = False
        self._end_roll()
        for job in self._jobs:
            job.start_at = None
            if job.kind is Kind.WORKER:
                for child in (job.child, job.successor):
                    if child is not None:
                        self._retire(child)

    def _end_services(self) -> None:
        """All but the workers go last: until then there are workers that need them, and people who watch."""
        if any(child.job.kind is Kind.WORKER for child in self._children.values()):
            return
        for child in self._children.values():
            if child.phase is not Phase.DRAINING:
                self._retire(child)

    # -- children

    def _start_job(self, job: Job) -> None:
        job.start_at = None
        job.child = self._start(job, self._settings)
        if job.child is None:
            job.start_at = time.monotonic() + _delay(job)

    def _start(self, job: Job, settings: LaunchSettings) -> Child | None:
        """Fork one child; None where that cannot be done now, which has been logged, and is to be tried again."""
        writer = {Kind.SCRAPER: SCRAPER, Kind.ADMIN: ADMIN, Kind.REPLICATOR: REPLICATOR}.get(job.kind)
        if writer is None:
            writer = job.kept_writer if job.kept_writer is not None else self._free_writers.pop(0)
            job.kept_writer = None
        self._tables.ledger.admit(writer)
        try:
            pid, ready_fd = self._fork(job, settings, writer)
        except OSError as error:
            if job.child is not None:  # whose successor it would have been
                self._release_writer(writer)
            else:
                self._keep_down(job, writer)
            job.failures_in_a_row += 1
            log.error("a child cannot be started", child=job.name, error=error.strerror, again_in=_delay(job))
            return None
        child = Child(job, settings, pid, writer, time.monotonic(), ready_fd)
        self._children[pid] = child
        self._selector.register(ready_fd, selectors.EVENT_READ, child)
        self._record(child)
        return child

    def _fork(self, job: Job, settings: LaunchSettings, writer: int) -> tuple[int, int]:
        """The child's process id, and where it will say that it is ready. Raises OSError."""
        sys.stderr.flush()
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        parent = os.getpid()
        # Until the child has let go of our handlers, a signal to it would count as one to us.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = self._be_child(job, settings, writer, write, parent)
                finally:
                    os._exit(code)
        except OSError:
            os.close(read)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            os.close(write)
        return pid, read

    def _keep_down(self, job: Job, writer: int) -> None:
        """Nobody does this job for the moment: its row says so."""
        self._tables.roster.put(writer, Process(job.kind, job.number, 0, Phase.DOWN, job.restarts))
        if job.kind is Kind.WORKER:
            job.kept_writer = writer

    def _be_child(self, job: Job, settings: LaunchSettings, writer: int, ready_fd: int, parent: int) -> int:
        signal.set_wakeup_fd(-1)
        for number in _HANDLED:
            ends = number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
            signal.signal(number, signal.SIG_DFL if ends else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        for child in self._children.values():
            if child.ready_fd >= 0:
                os.close(child.ready_fd)
        for reservation in self._reservations:
            reservation.release()
        config = settings.config
        tables = Tables.attach(self._tables.segment.fd, writer)

        def ready() -> None:
            os.write(ready_fd, b"R")
            os.close(ready_fd)

        async def main() -> None:
            if job.kind is Kind.WORKER:
                await run_worker(config, tables, job.number, ready, settings.last_users)
            elif job.kind is Kind.SCRAPER:
                await run_scraper(config, tables, ready)
            elif job.kind is Kind.REPLICATOR:
                await run_replicator(config, tables, ready)
            else:
                await run_admin(config, tables, ready)

        return run_child(job.name, parent, config.log, main, partial(tables.roster.beat, writer))

    def _on_ready(self, child: Child) -> None:
        """A child spoke (it is ready) or its pipe closed (it died before)."""
        try:
            word = os.read(child.ready_fd, 1)
        except BlockingIOError:
            return
        self._selector.unregister(child.ready_fd)
        os.close(child.ready_fd)
        child.ready_fd = -1
        if word and child.phase is Phase.STARTING:
            child.phase = Phase.READY
            child.kill_at = None
            self._record(child)
            log.info("ready", child=child.job.name, child_pid=child.pid)
            if child.settings is self._trial:
                self._settings, self._trial = self._trial, None
                self._add_replicator()

    def _add_replicator(self) -> None:
        """The configuration may speak of replicas since it was read again. Where it does no more, the one that there
        is has nothing to do."""
        if self._config.has_replicas and not any(job.kind is Kind.REPLICATOR for job in self._jobs):
            self._jobs.append(Job(Kind.REPLICATOR, 0))
            self._start_job(self._jobs[-1])

    def _retire(self, child: Child) -> None:
        """Tell a child to drain and end."""
        if child.phase is Phase.DRAINING:
            return
        patience = 0.0 if child.phase is Phase.HUNG else child.settings.config.drain_seconds
        child.phase = Phase.DRAINING
        child.kill_at = time.monotonic() + patience + KILL_AFTER_SECONDS
        self._record(child)
        self._signal(child, signal.SIGTERM)

    @staticmethod
    def _signal(child: Child, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended; `_reap` will see
            os.kill(child.pid, number)

    def _kill_due(self, now: float) -> None:
        for child in self._children.values():
            if child.kill_at is not None and now >= child.kill_at:
                what = "does not become ready" if child.phase is Phase.STARTING else "would not end"
                log.warning(f"killing a child that {what}", child=child.job.name, child_pid=child.pid)
                child.kill_at = None
                self._signal(child, signal.SIGKILL)

    def _check_heartbeats(self, now: float) -> None:
        """Look after the children that should be at work."""
        if now < self._check_at:
            return
        self._check_at = now + LOOK_SECONDS
        for child in self._children.values():
            if child.phase is Phase.DRAINING:
                continue
            beats = self._tables.roster.beats(child.writer)
            if beats != child.beats:
                child.beats, child.silent_looks = beats, 0
                self._set_hung(child, hung=False)
                continue
            child.silent_looks += 1
            if child.silent_looks >= HUNG_LOOKS:
                self._set_hung(child, hung=True)
            if child.silent_looks == KILL_LOOKS:
                log.error("killing a child that hangs", child=child.job.name, child_pid=child.pid)
                self._signal(child, signal.SIGKILL)

    def _set_hung(self, child: Child, *, hung: bool) -> None:
        phase = Phase.HUNG if hung else Phase.READY
        if child.phase in (phase, Phase.STARTING):
            return
        child.phase = phase
        self._record(child)
        if hung:
            seconds = round(child.silent_looks * LOOK_SECONDS)
            log.warning("a child hangs", child=child.job.name, child_pid=child.pid, seconds=seconds)
        else:
            log.info("a child that hung goes on", child=child.job.name, child_pid=child.pid)

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self._children.pop(pid, None)
            if child is not None:
                self._on_end(child, os.waitstatus_to_exitcode(status))

    def _on_end(self, child: Child, code: int) -> None:
        """A child has ended: give back what it held, and decide who comes next."""
        job = child.job
        if child.ready_fd >= 0:
            self._selector.unregister(child.ready_fd)
            os.close(child.ready_fd)
        given_back = self._tables.ledger.forfeit(child.writer)
        if child in job.retiring:
            job.retiring.remove(child)
            self._release_writer(child.writer)
            if job.closing and not job.retiring:
                self._jobs.remove(job)
            return
        if child is job.successor:
            job.successor = None
            if self._stopping or job.child is not None:
                self._release_writer(child.writer)
            else:  # there was nobody to replace
                self._keep_down(job, child.writer)
                job.start_at = time.monotonic() + _delay(job)
            if not self._stopping:
                self._stop_rolling(job)
            return
        job.child = None
        if self._stopping:
            self._release_writer(child.writer)
            return
        now = time.monotonic()
        if child.phase is Phase.DRAINING:  # told to, to be replaced
            self._release_writer(child.writer)
            job.start_at = now
            return
        steady = now - child.started >= STEADY_SECONDS
        job.failures_in_a_row = 0 if steady else job.failures_in_a_row + 1
        delay = _delay(job)
        job.restarts += 1
        if child.settings is self._trial:  # it had taken its predecessor's place before it was ready
            self._stop_rolling(job)
        if job.successor is not None:  # it was about to be replaced anyway
            self._release_writer(child.writer)
            job.child, job.successor = job.successor, None
            with contextlib.suppress(ValueError):
                self._rolling.remove(job)
            delay = 0.0
        else:
            job.start_at = now + delay
            self._keep_down(job, child.writer)
        self._series.add(1.0, "restarts", job.name)
        log.error(
            "a child ended unexpectedly",
            child=job.name, child_pid=child.pid, exit_code=code, requests_given_back=given_back, restart_in=delay,
        )  # fmt: skip

    def _release_writer(self, writer: int) -> None:
        """Nobody writes this row anymore."""
        self._tables.roster.clear(writer)
        if writer >= FIRST_WORKER:
            self._free_writers.append(writer)
            self._free_writers.sort()

    def _restart_due(self, now: float) -> None:
        for job in self._jobs:
            if job.start_at is not None and now >= job.start_at:
                self._start_job(job)

    def _record(self, child: Child) -> None:
        job = child.job
        self._tables.roster.put(child.writer, Process(job.kind, job.number, child.pid, child.phase, job.restarts))

    # -- rolling restart, more and fewer workers

    def _start_rolling(self) -> None:
        try:
            config = self._reload()
        except ConfigError as error:
            log.error("configuration not reloaded", error=str(error))
            return
        fixed = ("listen", "worker_listen", "admin", "capacity", "workers")
        for name in fixed:
            if getattr(config, name) != getattr(self._config, name):
                log.warning("a change that needs a full restart is left out", key=name)
        if config.prefix.ring_bytes != self._config.prefix.ring_bytes:
            log.warning("a change that needs a full restart is left out", key="prefix.ring_bytes")
        keep = {name: getattr(self._config, name) for name in fixed}
        self._trial = _launch_settings(config.model_copy(update=keep), self._settings)
        log.info("rolling restart")
        # The others come last: their old ones end before the new ones start, so there is no going back.
        jobs = [job for job in self._jobs if not job.closing]
        self._rolling = deque(sorted(jobs, key=lambda job: job.kind is not Kind.WORKER))

    def _stop_rolling(self, job: Job) -> None:
        """A replacement came to nothing."""
        log.error(
            "a replacement ended before it was ready; the rolling restart stops here",
            child=job.name, configuration="as before" if self._trial is not None else "the new one",
        )  # fmt: skip
        self._end_roll()

    def _end_roll(self) -> None:
        self._rolling.clear()
        self._roll_at = self._trial = None

    def _roll(self) -> None:
        """Take the rolling restart one step further, if one is under way."""
        if self._roll_at is not None:
            if time.monotonic() < self._roll_at:
                return
            self._roll_at = None
        while self._rolling or self._roll_again:
            if not self._rolling:
                self._roll_again = False
                self._start_rolling()
                continue
            job = self._rolling[0]
            if job.closing or (job.child is None and job.kind is not Kind.WORKER):
                self._rolling.popleft()
            elif job.successor is not None:
                if job.successor.phase is not Phase.READY:
                    return
                if job.child is not None:
                    self._retire(job.child)
                    job.retiring.append(job.child)
                job.child, job.successor = job.successor, None
                job.failures_in_a_row = 0
                self._rolling.popleft()
            elif any(child.settings is self._trial for child in self._children.values()):
                return  # one that took its predecessor's place, and is not ready yet
            elif job.kind is not Kind.WORKER:
                # These have one writer row and one address each: the old one ends, then the new one starts.
                self._rolling.popleft()
                assert job.child is not None
                self._retire(job.child)
                job.failures_in_a_row = 0
            elif not self._start_successor(job):
                return

    def _start_successor(self, job: Job) -> bool:
        """Whether there is one now."""
        if not self._free_writers and job.kept_writer is None:
            return False  # those of earlier rounds are still draining: wait for one to end
        successor = self._start(job, self._trial or self._settings)
        if successor is None:
            self._roll_at = time.monotonic() + _delay(job)
            return False
        job.successor, job.start_at = successor, None
        successor.kill_at = successor.started + READY_SECONDS
        return True

    def _add_worker(self) -> None:
        numbers = {job.number for job in self._jobs if job.kind is Kind.WORKER}
        number = next(number for number in range(len(numbers) + 1) if number not in numbers)
        if number >= self._config.max_workers:
            log.error("no room for another worker: raise capacity.workers", workers=len(numbers))
            return
        if not self._free_writers:
            log.error("no room for another worker while so many are draining", workers=len(numbers))
            return
        try:
            self._reservations.append(Reservation(self._config.worker_address(number), shared=True))
        except ConfigError as error:
            log.error("no address for another worker", error=str(error))
            return
        job = Job(Kind.WORKER, number)
        self._jobs.append(job)
        self._start_job(job)
        if self._trial is not None:
            self._rolling.append(job)
        log.info("one worker more", workers=len(numbers) + 1)

    def _remove_worker(self) -> None:
        workers = [job for job in self._jobs if job.kind is Kind.WORKER and not job.closing]
        if len(workers) <= 1:
            log.error("the last worker stays")
            return
        job = max(workers, key=lambda job: job.number)
        job.closing = True
        job.start_at = None
        if job.kept_writer is not None:
            self._release_writer(job.kept_writer)
            job.kept_writer = None
        address = self._config.worker_address(job.number)
        for reservation in [held for held in self._reservations if held.address == address]:
            reservation.release()
            self._reservations.remove(reservation)
        for child in (job.child, job.successor):
            if child is not None:
                self._retire(child)
                job.retiring.append(child)
        job.child = job.successor = None
        if not job.retiring:
            self._jobs.remove(job)
        log.info("one worker less", workers=len(workers) - 1)


def _launch_settings(config: Config, before: LaunchSettings | None = None) -> LaunchSettings:
    path = config.limits.users_file
    if path is None:
        return LaunchSettings(config, None)
    if before is not None and before.config.limits.users_file == path:
        return LaunchSettings(config, before.last_users)  # what the workers have seen of it since
    last_users = LastUsers()
    with contextlib.suppress(UsersError):  # it could be read a moment ago; else the workers will say what is wrong
        last_users.keep(read_text(path))
    return LaunchSettings(config, last_users)


def _delay(job: Job) -> float:
    """Before the next attempt to start it."""
    failures = min(job.failures_in_a_row, len(BACK_OFF_SECONDS))
    return BACK_OFF_SECONDS[failures - 1] if failures else 0.0


def serve(config: Config, reload: Callable[[], Config]) -> int:
    """Run until stopped. Raises ConfigError when an address is taken."""
    for number in range(config.max_workers):
        clear_stale_socket(config.worker_address(number))
    clear_stale_socket(config.listen)
    clear_stale_socket(config.admin)
    return Supervisor(config, reload).run()
