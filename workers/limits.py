"""The gate of a worker, over Redis where the configuration names one, else over shared memory and the users file."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from router.limits import Counters, Gate, SharedCounters
from state.series import Series
from state.tables import Tables
from workers.config import Config
from workers.last_users import LastUsers
from workers.limits_redis import RedisCounters
from workers.users import UserBook


@contextlib.asynccontextmanager
async def open_gate(
    config: Config, tables: Tables, series: Series, last_users: LastUsers | None = None
) -> AsyncIterator[Gate]:
    """Also follows the users file, or stays connected to Redis, as long as it is open. Raises UsersError where neither
    the users file nor `last_users` can be used."""
    limits = config.limits
    counters: Counters
    async with contextlib.AsyncExitStack() as stack:
        if config.redis:
            counters = shared = RedisCounters(config.redis, limits.timeout_seconds)
            stack.push_async_callback(shared.close)
            await shared.start()
        else:
            book = None
            if limits.users_file is not None:
                book = UserBook(limits.users_file, tables.capacity.limited_users, last_users)
                watching = asyncio.create_task(book.watch())
                stack.push_async_callback(_end, watching)
            counters = SharedCounters(tables.user_minutes, tables.model_seconds, book, time.monotonic)
        yield Gate(
            counters,
            series,
            static_token=limits.bearer_token.get_secret_value(),
            require_key=limits.require_key,
            on_outage=limits.on_outage,
        )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
