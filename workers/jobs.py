"""What the supervisor starts and watches: jobs, the children that do them, and what children are started with."""

import contextlib
from dataclasses import dataclass, field

from state.roster import Kind, Phase
from workers.config import Config
from workers.last_users import LastUsers
from workers.users import UsersError, read_text

BACK_OFF_SECONDS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Before the first, second, ... restart in a row; the last one repeats."""


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

    @property
    def delay(self) -> float:
        """Seconds before the next attempt to start it."""
        failures = min(self.failures_in_a_row, len(BACK_OFF_SECONDS))
        return BACK_OFF_SECONDS[failures - 1] if failures else 0.0


def launch_settings(config: Config, before: LaunchSettings | None = None) -> LaunchSettings:
    """Those of a configuration; `before` are the ones in force."""
    path = config.limits.users_file
    if path is None:
        return LaunchSettings(config, None)
    if before is not None and before.config.limits.users_file == path:
        return LaunchSettings(config, before.last_users)  # what the workers have seen of it since
    last_users = LastUsers()
    with contextlib.suppress(UsersError):  # it could be read a moment ago; else the workers will say what is wrong
        last_users.keep(read_text(path))
    return LaunchSettings(config, last_users)
