"""The rolling restart: every job gets a child with the configuration read anew, one after the other.

A worker's successor becomes ready before its predecessor is told to drain. The others have one writer row and one
address each: the old one ends, then the new one starts. They come last, since from there on there is no going back.
The configuration is on trial until the first child with it is ready; should that end before, or take too long, the one
before stays in force.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from state.roster import Kind, Phase
from workers.config import Config, ConfigError
from workers.jobs import Child, Job, LaunchSettings, launch_settings

log = structlog.get_logger()

READY_SECONDS = 60.0
"""For a replacement to become ready, before it is killed and the rolling restart ends."""

_FIXED = ("listen", "worker_listen", "admin", "capacity", "workers")
"""Keys that keep their values until a full restart."""


class Processes(Protocol):
    """What a rolling restart needs of the supervisor."""

    @property
    def jobs(self) -> Sequence[Job]:
        """All there are."""

    @property
    def children(self) -> Mapping[int, Child]:
        """All that run, by process id."""

    @property
    def settings(self) -> LaunchSettings:
        """Those in force."""

    def has_room(self, job: Job) -> bool:
        """Whether there is a writer row for another child of this job."""

    def start(self, job: Job, settings: LaunchSettings) -> Child | None:
        """Fork one child; None where that cannot be done now."""

    def retire(self, child: Child) -> None:
        """Tell a child to drain and end."""


class RollingRestart:
    """`reload` gives the configuration anew, or raises ConfigError. `request` asks for one, `step` takes it further."""

    def __init__(self, processes: Processes, reload: Callable[[], Config]) -> None:
        self._processes = processes
        self._reload = reload
        self._jobs: deque[Job] = deque()
        """Those whose turn is still to come; the first one's is now."""
        self._requested = False
        self.trial: LaunchSettings | None = None
        """Read again, and not yet known to work."""
        self.due_at: float | None = None
        """When it goes on, where it has to wait."""

    def request(self) -> None:
        """Begin one, after the one under way, whose successors have the old configuration."""
        self._requested = True

    def cancel(self) -> None:
        """Nothing is replaced any more."""
        self._requested = False
        self._end()

    def accept(self) -> LaunchSettings:
        """A child with the settings on trial is ready: they are those in force from now on."""
        trial, self.trial = self.trial, None
        assert trial is not None
        return trial

    def add(self, job: Job) -> None:
        """A job that is new, and was started with the settings in force."""
        if self.trial is not None:
            self._jobs.append(job)

    def skip(self, job: Job) -> None:
        """The job's child has been replaced already."""
        if job in self._jobs:
            self._jobs.remove(job)

    def fail(self, job: Job) -> None:
        """A replacement came to nothing."""
        log.error(
            "a replacement ended before it was ready; the rolling restart stops here",
            child=job.name, configuration="as before" if self.trial is not None else "the new one",
        )  # fmt: skip
        self._end()

    def step(self) -> None:
        """Take the rolling restart as far as it goes now, if one is under way."""
        if self.due_at is not None:
            if time.monotonic() < self.due_at:
                return
            self.due_at = None
        while self._jobs or self._requested:
            if not self._jobs:
                self._requested = False
                self._begin()
                continue
            job = self._jobs[0]
            if job.closing or (job.child is None and job.kind is not Kind.WORKER):
                self._jobs.popleft()
            elif job.successor is not None:
                if job.successor.phase is not Phase.READY:
                    return
                if job.child is not None:
                    self._processes.retire(job.child)
                    job.retiring.append(job.child)
                job.child, job.successor = job.successor, None
                job.failures_in_a_row = 0
                self._jobs.popleft()
            elif any(child.settings is self.trial for child in self._processes.children.values()):
                return  # one that took its predecessor's place, and is not ready yet
            elif job.kind is not Kind.WORKER:
                # These have one writer row and one address each: the old one ends, then the new one starts.
                self._jobs.popleft()
                assert job.child is not None
                self._processes.retire(job.child)
                job.failures_in_a_row = 0
            elif not self._start_successor(job):
                return

    def _begin(self) -> None:
        try:
            config = self._reload()
        except ConfigError as error:
            log.error("configuration not reloaded", error=str(error))
            return
        before = self._processes.settings
        for name in _FIXED:
            if getattr(config, name) != getattr(before.config, name):
                log.warning("change ignored: it needs a full restart", key=name)
        if config.prefix.ring_bytes != before.config.prefix.ring_bytes:
            log.warning("change ignored: it needs a full restart", key="prefix.ring_bytes")
        keep = {name: getattr(before.config, name) for name in _FIXED}
        self.trial = launch_settings(config.model_copy(update=keep), before)
        log.info("rolling restart")
        # The others come last: their old ones end before the new ones start, so there is no going back.
        jobs = [job for job in self._processes.jobs if not job.closing]
        self._jobs = deque(sorted(jobs, key=lambda job: job.kind is not Kind.WORKER))

    def _end(self) -> None:
        self._jobs.clear()
        self.due_at = self.trial = None

    def _start_successor(self, job: Job) -> bool:
        """Whether there is one now."""
        if not self._processes.has_room(job):
            return False  # those of earlier rounds are still draining: wait for one to end
        successor = self._processes.start(job, self.trial or self._processes.settings)
        if successor is None:
            self.due_at = time.monotonic() + job.delay
            return False
        job.successor, job.start_at = successor, None
        successor.kill_at = successor.started + READY_SECONDS
        return True
