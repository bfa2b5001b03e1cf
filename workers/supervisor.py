"""Starts the processes, watches them, replaces them.

One plain loop, no threads, nothing asynchronous: signals and children's words arrive on file descriptors. Children
are forked from this process, which has imported everything already, so that a dead one is back within some tens of
milliseconds and shares the memory of the code. What a child does is in `ext_proc`, `scraper`, `admin` and `replicator`.

    SIGTERM, SIGINT   drain and end; a second one ends at once
    SIGHUP            read the configuration again and replace every worker, one after the other: the successor
                      listens before its predecessor is told to drain. The configuration is on trial until the first
                      of them is ready; should it end before, or take too long, the one before stays in force
    SIGTTIN, SIGTTOU  add a worker, remove one
"""

import contextlib
import gc
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import structlog

from state.roster import Kind, Phase, Process
from state.tables import ADMIN, FIRST_WORKER, REPLICATOR, SCRAPER, SUPERVISOR, Tables
from workers.admin import run_admin
from workers.compiled import is_compiled, outdated
from workers.config import Config, ConfigError
from workers.ext_proc import run_worker
from workers.jobs import Child, Job, LaunchSettings, launch_settings
from workers.ports import Reservation, clear_stale_socket
from workers.process import raise_file_limit, run_child, set_up_logging
from workers.replicator import run_replicator
from workers.rolling_restart import RollingRestart
from workers.scraper import run_scraper

log = structlog.get_logger()

STEADY_SECONDS = 10.0
"""A child that lived this long was all right: its successor starts at once."""
LOOK_SECONDS = 2.0
"""Between two looks at whether the children's hearts beat, which they do once a second."""
HUNG_LOOKS, KILL_LOOKS = 5, 15
"""Without a beat, before a child is taken to hang, and before it is killed to be replaced. Looks are counted and not
seconds: when everything was frozen for a while, nobody hangs."""
KILL_AFTER_SECONDS = 5.0
"""Beyond the drain time, before a child that was told to end is killed."""

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCHLD)


class Supervisor:
    """See the head of this file. `reload` gives the configuration anew, or raises ConfigError."""

    def __init__(self, config: Config, reload: Callable[[], Config]) -> None:
        self.settings = launch_settings(config)
        self._restart = RollingRestart(self, reload)
        try:
            self._tables = Tables.create(config.table_capacity(), writer=SUPERVISOR)
        except OSError as error:
            raise ConfigError(
                f"the shared tables cannot be made: {error.strerror}; lower `capacity` or prefix.ring_bytes"
            ) from None
        for writer in (SUPERVISOR, SCRAPER, ADMIN, REPLICATOR):
            self._tables.ledger.admit(writer)
        self._series = self._tables.series()
        self._free_writers = list(range(FIRST_WORKER, self._tables.capacity.writers))
        self.jobs: list[Job] = [Job(Kind.SCRAPER, 0), Job(Kind.ADMIN, 0)]
        if config.has_replicas:
            self.jobs.append(Job(Kind.REPLICATOR, 0))
        self.jobs += [Job(Kind.WORKER, number) for number in range(config.workers)]
        self.children: dict[int, Child] = {}
        self._reservations: list[Reservation] = []
        self._stopping = False
        self._check_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def _config(self) -> Config:
        return self.settings.config

    def run(self) -> int:
        """Until everything has ended. Returns the exit code."""
        set_up_logging(self._config.log, "supervisor")
        raise_file_limit()
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
        for job in self.jobs:
            self._start_job(job)
        while self.children or not self._stopping:
            self._wait_for_events()
            self._reap()
            now = time.monotonic()
            self._restart_due(now)
            self._kill_due(now)
            self._check_heartbeats(now)
            self._restart.step()
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def _wait_for_events(self) -> None:
        """Sleep until a signal, a word from a child, or the next thing that is due."""
        now = time.monotonic()
        due = [job.start_at for job in self.jobs if job.start_at is not None]
        due += [child.kill_at for child in self.children.values() if child.kill_at is not None]
        due += [self._restart.due_at] if self._restart.due_at is not None else []
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
                for child in self.children.values():
                    self._signal(child, signal.SIGKILL)
            else:
                self._stop()
        elif self._stopping:
            return
        elif number is signal.SIGHUP:
            self._restart.request()
        elif number is signal.SIGTTIN:
            self._add_worker()
        elif number is signal.SIGTTOU:
            self._remove_worker()

    def _stop(self) -> None:
        log.info("draining", seconds=self._config.drain_seconds)
        self._stopping = True
        self._restart.cancel()
        for job in self.jobs:
            job.start_at = None
            if job.kind is Kind.WORKER:
                for child in (job.child, job.successor):
                    if child is not None:
                        self.retire(child)

    def _end_services(self) -> None:
        """All but the workers go last: until then there are workers that need them, and people who watch."""
        if any(child.job.kind is Kind.WORKER for child in self.children.values()):
            return
        for child in self.children.values():
            if child.phase is not Phase.DRAINING:
                self.retire(child)

    # -- children

    def _start_job(self, job: Job) -> None:
        job.start_at = None
        job.child = self.start(job, self.settings)
        if job.child is None:
            job.start_at = time.monotonic() + job.delay

    def start(self, job: Job, settings: LaunchSettings) -> Child | None:
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
            log.error("a child cannot be started", child=job.name, error=error.strerror, again_in=job.delay)
            return None
        child = Child(job, settings, pid, writer, time.monotonic(), ready_fd)
        self.children[pid] = child
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
        for child in self.children.values():
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
            if child.settings is self._restart.trial:
                self.settings = self._restart.accept()
                set_up_logging(self._config.log, "supervisor")
                self._add_replicator()

    def _add_replicator(self) -> None:
        """The configuration may speak of replicas since it was read again. Where it does no more, the one that there
        is has nothing to do."""
        if self._config.has_replicas and not any(job.kind is Kind.REPLICATOR for job in self.jobs):
            self.jobs.append(Job(Kind.REPLICATOR, 0))
            self._start_job(self.jobs[-1])

    def retire(self, child: Child) -> None:
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
        for child in self.children.values():
            if child.kill_at is not None and now >= child.kill_at:
                what = "did not become ready" if child.phase is Phase.STARTING else "did not exit"
                log.warning(f"killing a child that {what}", child=child.job.name, child_pid=child.pid)
                child.kill_at = None
                self._signal(child, signal.SIGKILL)

    def _check_heartbeats(self, now: float) -> None:
        """Look after the children that should be at work."""
        if now < self._check_at:
            return
        self._check_at = now + LOOK_SECONDS
        for child in self.children.values():
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
            log.info("a hung child has recovered", child=child.job.name, child_pid=child.pid)

    def _reap(self) -> None:
        while self.children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.children.pop(pid, None)
            if child is not None:
                self._on_end(child, os.waitstatus_to_exitcode(status))

    def _on_end(self, child: Child, code: int) -> None:
        """A child has ended: give back what it held, and decide who comes next."""
        job = child.job
        if child.ready_fd >= 0:
            self._selector.unregister(child.ready_fd)
            os.close(child.ready_fd)
        given_back = self._tables.ledger.forfeit(child.writer)
        self._tables.series(child.writer).clear_levels()
        if child in job.retiring:
            job.retiring.remove(child)
            self._release_writer(child.writer)
            if job.closing and not job.retiring:
                self._drop(job)
            return
        if child is job.successor:
            job.successor = None
            if self._stopping or job.child is not None:
                self._release_writer(child.writer)
            else:  # there was nobody to replace
                self._keep_down(job, child.writer)
                job.start_at = time.monotonic() + job.delay
            if not self._stopping:
                self._restart.fail(job)
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
        delay = job.delay
        job.restarts += 1
        if child.settings is self._restart.trial:  # it had taken its predecessor's place before it was ready
            self._restart.fail(job)
        if job.successor is not None:  # it was about to be replaced anyway
            self._release_writer(child.writer)
            job.child, job.successor = job.successor, None
            self._restart.skip(job)
            delay = 0.0
        else:
            job.start_at = now + delay
            self._keep_down(job, child.writer)
        self._series.add(1.0, "restarts", job.name)
        log.error(
            "a child ended unexpectedly",
            child=job.name, child_pid=child.pid, exit_code=code, requests_given_back=given_back, restart_in=delay,
        )  # fmt: skip

    def has_room(self, job: Job) -> bool:
        """Whether there is a writer row for another child of this job."""
        return bool(self._free_writers) or job.kept_writer is not None

    def _release_writer(self, writer: int) -> None:
        """Nobody writes this row anymore."""
        self._tables.roster.clear(writer)
        if writer >= FIRST_WORKER:
            self._free_writers.append(writer)
            self._free_writers.sort()

    def _restart_due(self, now: float) -> None:
        for job in self.jobs:
            if job.start_at is not None and now >= job.start_at:
                self._start_job(job)

    def _record(self, child: Child) -> None:
        job = child.job
        self._tables.roster.put(child.writer, Process(job.kind, job.number, child.pid, child.phase, job.restarts))

    # -- more and fewer workers

    def _add_worker(self) -> None:
        jobs = {job.number: job for job in self.jobs if job.kind is Kind.WORKER}
        # The number of one that was removed is free at once, though its last child may still drain: Envoy knows workers
        # by number.
        numbers = {number for number, job in jobs.items() if not job.closing}
        number = next(number for number in range(len(numbers) + 1) if number not in numbers)
        if self._config.listen.startswith("unix:"):
            log.error("no room for another worker: the unix path of `listen` serves one", workers=len(numbers))
            return
        if number >= self._config.max_workers:
            log.error("no room for another worker: raise capacity.workers", workers=len(numbers))
            return
        if not self._free_writers:
            log.error("no room for another worker while so many are draining", workers=len(numbers))
            return
        job = jobs.get(number)
        if job is not None:
            job.closing = False
        else:
            try:
                self._reservations.append(Reservation(self._config.worker_address(number), shared=True))
            except ConfigError as error:
                log.error("no address for another worker", error=str(error))
                return
            job = Job(Kind.WORKER, number)
            self.jobs.append(job)
        self._start_job(job)
        self._restart.add(job)
        log.info("worker added", workers=len(numbers) + 1)

    def _remove_worker(self) -> None:
        workers = [job for job in self.jobs if job.kind is Kind.WORKER and not job.closing]
        if len(workers) <= 1:
            log.error("the last worker cannot be removed")
            return
        job = max(workers, key=lambda job: job.number)
        job.closing = True
        job.start_at = None
        if job.kept_writer is not None:
            self._release_writer(job.kept_writer)
            job.kept_writer = None
        for child in (job.child, job.successor):
            if child is not None:
                self.retire(child)
                job.retiring.append(child)
        job.child = job.successor = None
        if not job.retiring:
            self._drop(job)
        log.info("worker removed", workers=len(workers) - 1)

    def _drop(self, job: Job) -> None:
        """A worker is no more: its address, too, is given up."""
        self.jobs.remove(job)
        address = self._config.worker_address(job.number)
        for reservation in [held for held in self._reservations if held.address == address]:
            reservation.release()
            self._reservations.remove(reservation)


def serve(config: Config, reload: Callable[[], Config]) -> int:
    """Run until stopped. Raises ConfigError when an address is taken, or there is no memory for the tables."""
    for number in range(config.max_workers):
        clear_stale_socket(config.worker_address(number))
    clear_stale_socket(config.listen)
    clear_stale_socket(config.admin)
    return Supervisor(config, reload).run()
