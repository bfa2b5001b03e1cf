"""What every child process does first: a name, a way to die, a log, an event loop."""

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TextIO, cast

import setproctitle
import structlog
import uvloop

from workers.config import LogConfig

_PR_SET_PDEATHSIG = 1
BEAT_SECONDS = 1.0
"""Between two signs of life."""


def die_with_parent(parent: int, how: signal.Signals) -> None:
    """Have the kernel send `how` to this process when its parent is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(how), 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        os.kill(os.getpid(), how)


def raise_file_limit() -> None:
    """Let this process and its children open as many files as they may: a connection to a pod is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Lossy:
    """A file that loses what cannot be written: a full disk, or a log collector that died or reads no more, ends no
    request and stops no process."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._room: select.poll | None = select.poll()
        try:
            self._room.register(file.fileno(), select.POLLOUT)
        except (OSError, ValueError):  # no file
            self._room = None

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._room is None:
                self._file.write(text)
                return
            # A pipe is ready when it takes 4096 bytes at once. What is not written now would be waited for.
            data = text.encode("utf-8", "replace")
            for start in range(0, len(data), 4096):
                if not self._room.poll(0):
                    return
                os.write(self._file.fileno(), data[start : start + 4096])

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


def set_up_logging(config: LogConfig, name: str) -> None:
    """Structured lines on standard error: readable on a terminal, JSON elsewhere. Colours are for terminals alone."""
    terminal = sys.stderr.isatty()
    as_json = config.format == "json" or (config.format == "auto" and not terminal)
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(pad_event_to=0, colors=terminal)
    )
    levels = {"debug": 10, "info": 20, "warning": 30, "error": 40}
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(levels[config.level]),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, _Lossy(sys.stderr))),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(process=name, pid=os.getpid())


class Stop:
    """SIGTERM and SIGINT, as something to wait for."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._event.set)

    async def wait(self) -> None:
        """Until the first of them."""
        await self._event.wait()


async def until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, which has no end of its own, until told to stop, and cancel it then. Raises what it raises."""
    stop = Stop()
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _beat(beat: Callable[[], None]) -> None:
    while True:
        beat()
        await asyncio.sleep(BEAT_SECONDS)


def run_child(
    name: str, parent: int, log: LogConfig, main: Callable[[], Awaitable[None]], beat: Callable[[], None] | None = None
) -> int:
    """The life of a child, from right after the fork to its exit code. `beat` is called once a second, for as long as
    the child does not hang."""
    for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    setproctitle.setproctitle(f"pointsman: {name}")
    set_up_logging(log, name)
    die_with_parent(parent, signal.SIGTERM)
    gc.enable()

    async def body() -> None:
        beating = asyncio.ensure_future(_beat(beat)) if beat is not None else None
        try:
            await main()
        finally:
            if beating is not None:
                beating.cancel()

    try:
        uvloop.run(body())
    except (KeyboardInterrupt, SystemExit):
        return 0
    except Exception:
        structlog.get_logger().exception("process ended with an error")
        return 1
    return 0
