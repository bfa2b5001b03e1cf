"""Waiting until something has happened, and failing where it does not."""

import asyncio
import time
from collections.abc import Callable


def wait_until(happened: Callable[[], object], seconds: float = 30.0) -> None:
    """For tests without an event loop."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


async def until(happened: Callable[[], object], seconds: float = 20.0) -> None:
    """For what can be told at once, in a test whose event loop does the work that is waited for."""
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.005)


async def until_told(happened: Callable[[], object], seconds: float = 10.0) -> None:
    """For what another process has to be asked: the event loop, and the load it may drive, goes on meanwhile."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(happened):
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)
