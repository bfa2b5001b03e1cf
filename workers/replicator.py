"""The replicator process: the replicas of a router tell each other, through Redis, what they have in flight and where
prompts went.

Nobody waits for it. Workers write and read shared memory as ever; this process carries what is there to Redis and what
the others told into shared memory (`router.mirror`). Every `replicas.interval_seconds` it makes one call, a script
that does all of it in one step on the server:

    pointsman:replicas:<format>:<seed>:<group>:loads    hash: replica -> time, what it has in flight
    pointsman:replicas:<format>:<seed>:<group>:routed   stream of what was routed, the newest `prefix.ring_bytes` of it
    pointsman:replicas:<format>:<seed>:<group>:bytes    how much that is
    pointsman:replicas:<format>:<seed>:<group>:users    hash: replica -> time, what its users have used, once a second
    pointsman:replicas:<format>:<seed>:<group>:ended:<replica>
        list: ends of requests that this replica routed, which Envoy's access log told another; fetched by it

- A replica that has told nothing for GONE_SECONDS, by the server's clock, has nothing in flight. Its prompts stay
  known: the pods have them still.
- A replica that starts reads the whole stream first, once its pods have been polled: it knows at once where the
  others' prompts went. One that was cut off for a while, or whose replicator was replaced, goes on where it was.
- While Redis cannot be reached, what others have in flight is forgotten after GONE_SECONDS, and engines' own counts
  tell of it as they do without Redis. What was routed here meanwhile is told later, as far as the prefix log holds it.
- What a call without an answer told is told again with the next one, so perhaps twice: loads are whole, and a prompt
  that went where it went changes nothing.
- The end of a request is brought to the replica that routed it at most once: what is lost with a call is settled
  there against the engines' counts, as an entry is that Envoy lost.
- All of it vanishes an hour after the last replica.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import structlog
from google.protobuf.message import DecodeError

from protos.access_log_pb2 import HTTPAccessLogEntry
from router.access_log import AccessLog
from router.mirror import Mirror
from router.scheduler import Scheduler
from router.strategies import Context
from state.tables import REPLICATOR, Tables
from state.updates import FORMAT, UpdateError, read_users, write_users
from state.user_tokens import CELLS, ROWS
from workers.config import Config
from workers.process import Stop, until_stopped
from workers.redis_link import LOST, RedisLink, ReplyError, Script

log = structlog.get_logger()

GONE_SECONDS: Final = 3.0
TIMEOUT_SECONDS: Final = 1.0
ALONE_SECONDS: Final = 0.5
"""Between two calls while no other replica is heard of."""
PATIENCE_SECONDS: Final = 10.0
"""For the first polls of all pods, before the stream is read."""
NICENESS: Final = 5
MAX_TOLD_BYTES: Final = 256 << 10
"""In one call. More waits in the prefix log for the next."""
MAX_HEARD: Final = 64
"""Entries of the stream in one call."""
MAX_ENDS: Final = 2000
USERS_SECONDS: Final = 1.0
"""Between two times that it is told what users have used."""
USERS_GONE_SECONDS: Final = 60.0
"""What the users of a replica have used counts for so long after it was last heard of."""
COMPLAIN_SECONDS: Final = 60.0

EXCHANGE: Final = Script("""
local loads, routed, bytes, ends = ARGV[1] .. 'loads', ARGV[1] .. 'routed', ARGV[1] .. 'bytes', ARGV[1] .. 'ended:'
local replica, in_flight, news, from = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local most, room, gone = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', loads, replica, string.format('%.0f ', now) .. in_flight)
if news ~= '' then
  local held = tonumber(redis.call('GET', bytes) or '')
  if not held then redis.call('DEL', routed) end
  held = (held or 0) + #news
  local newest = redis.call('XADD', routed, '*', 'replica', replica, 'news', news)
  for _ = 1, 100 do
    if held <= room then break end
    local oldest = redis.call('XRANGE', routed, '-', '+', 'COUNT', 1)[1]
    if oldest[1] == newest then held = #news break end
    redis.call('XDEL', routed, oldest[1])
    held = held - #(oldest[2][4] or '')
  end
  redis.call('SET', bytes, string.format('%.0f', held))
end
for _, key in ipairs({loads, routed, bytes}) do redis.call('PEXPIRE', key, 3600000) end
for i = 9, #ARGV, 2 do
  if redis.call('HEXISTS', loads, ARGV[i]) == 1 then
    local list = ends .. ARGV[i]
    if redis.call('RPUSH', list, ARGV[i + 1]) > 10000 then redis.call('LPOP', list) end
    redis.call('PEXPIRE', list, 60000)
  end
end
local ended = redis.call('LRANGE', ends .. replica, 0, 1999)
redis.call('LTRIM', ends .. replica, 2000, -1)
local others = {}
local all = redis.call('HGETALL', loads)
for i = 1, #all, 2 do
  if all[i] ~= replica then
    local space = string.find(all[i + 1], ' ', 1, true)
    local told = space and tonumber(string.sub(all[i + 1], 1, space - 1))
    if not told or now - told > 20 * gone or told - now > gone then
      redis.call('HDEL', loads, all[i])
    elseif now - told <= gone then
      others[#others + 1] = {all[i], string.sub(all[i + 1], space + 1)}
    end
  end
end
local heard, last, more = {}, '', #ended == 2000 and 1 or 0
if most > 0 then
  local entries, size = redis.call('XRANGE', routed, from, '+', 'COUNT', most), 0
  for i, entry in ipairs(entries) do
    last = entry[1]
    if entry[2][2] ~= replica and entry[2][4] then
      heard[#heard + 1] = {entry[1], entry[2][4]}
      size = size + #entry[2][4]
    end
    if i == most or (size > 524288 and i < #entries) then more = 1 break end
  end
end
local newest = redis.call('XREVRANGE', routed, '+', '-', 'COUNT', 1)[1]
return {string.format('%.0f', now), others, heard, last, more, ended, newest and newest[1] or ''}
""")

USERS: Final = Script("""
local users, replica, used, gone = ARGV[1] .. 'users', ARGV[2], ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', users, replica, string.format('%.0f ', now) .. used)
redis.call('PEXPIRE', users, 3600000)
local others, all = {}, redis.call('HGETALL', users)
for i = 1, #all, 2 do
  if all[i] ~= replica then
    local space = string.find(all[i + 1], ' ', 1, true)
    local told = space and tonumber(string.sub(all[i + 1], 1, space - 1))
    if told and now - told <= gone then
      others[#others + 1] = string.sub(all[i + 1], space + 1)
    else
      redis.call('HDEL', users, all[i])
    end
  end
end
return others
""")

LEAVE: Final = Script("return redis.call('HDEL', ARGV[1] .. 'loads', ARGV[2])")


class Replicator:
    """See the head of this file."""

    def __init__(self, config: Config, tables: Tables, clock: Callable[[], float] = time.monotonic) -> None:
        assert config.redis
        self._mirror = Mirror(tables)
        self._replica = tables.replica
        self._ended_log = tables.ended_log
        self._ended_log.skip()
        self._scheduler = Scheduler(tables, "random", clock, Context())
        self._access_log = AccessLog(self._scheduler)
        self._series = self._scheduler.series
        self._user_tokens = tables.user_tokens
        self._clock = clock
        self._interval = config.replicas.interval_seconds
        self._room = config.prefix.ring_bytes
        self._names = f"pointsman:replicas:{FORMAT}:{config.prefix.seed}:{config.replicas.group}:".encode()
        self._link = RedisLink(config.redis, TIMEOUT_SECONDS, (EXCHANGE, USERS, LEAVE))
        self._place = tables.place
        self._series.put(0.0, "replicas")
        self._waits_until: float | None = clock() + PATIENCE_SECONDS
        self._heard_at = clock()
        self._complained_at = -COMPLAIN_SECONDS
        self._users_at = -USERS_SECONDS
        self._counted: dict[str, int] = {}

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Until cancelled."""
        ready()
        await self.connect()
        while True:
            began = self._clock()
            more = await self.exchange()
            if began - self._users_at >= USERS_SECONDS:
                self._users_at = began
                await self.exchange_users()
            if not more:
                interval = self._interval if self._mirror.others else max(self._interval, ALONE_SECONDS)
                await asyncio.sleep(max(interval - (self._clock() - began), 0.0))

    async def connect(self) -> None:
        """Connect to Redis, and stay connected. Returns after the first attempt."""
        await self._link.start()

    async def exchange(self) -> bool:
        """Tell and hear once, if there is a connection. Returns whether there is more to be told or heard."""
        mirror, now = self._mirror, self._clock()
        if self._waits_until is not None and (now >= self._waits_until or mirror.ready(now)):
            self._waits_until = None
        most = MAX_HEARD if self._waits_until is None else 0
        call = self._link.call(
            EXCHANGE,
            self._names,
            self._replica.encode(),
            mirror.loads(now),
            mirror.routed(now, MAX_TOLD_BYTES),
            self._place.following(),
            b"%d" % most,
            b"%d" % self._room,
            b"%d" % round(GONE_SECONDS * 1000),
            *(self._ends() if self._link.up else ()),
        )
        answer = await call if call is not None else LOST
        if isinstance(answer, ReplyError):
            mirror.take_back()  # it is older when it is told again
            self._miss()
            return False
        time_ms, others, heard, last, more, ended, newest = answer
        now = self._heard_at = self._clock()
        gone = set(mirror.others)
        for name, update in others:
            replica = name.decode("ascii", "replace")
            gone.discard(replica)
            self._take(mirror.apply_loads, replica, update, now)
        for replica in gone:
            mirror.forget(replica)
        mirror.enter(now)
        for place, update in heard:
            told_ms, _, _ = place.partition(b"-")
            self._take(mirror.apply_routed, update, max(int(time_ms) - int(told_ms), 0) / 1000, now)
        if last:
            self._place.put(last)
        elif self._place.beyond(newest):
            self._place.clear()  # another stream: the server has lost that one, or is another
        for entry in ended:
            self._end(entry)
        self._series.add(1.0, "exchanges", "ok")
        self._count()
        return bool(more) or mirror.more

    async def exchange_users(self) -> None:
        """Tell what the users of this replica have used, and hear what those of the others have."""
        users = self._user_tokens
        call = self._link.call(
            USERS,
            self._names,
            self._replica.encode(),
            write_users(users.totals(self._clock(), without=REPLICATOR)),
            b"%d" % round(USERS_GONE_SECONDS * 1000),
        )
        answer = await call if call is not None else LOST
        if isinstance(answer, ReplyError):
            return  # what was heard is forgotten with its window
        heard = []
        for update in answer:
            self._take(lambda update: heard.append(read_users(update)), update)
        users.mirror(np.sum(heard, axis=0) if heard else np.zeros((ROWS, CELLS)), self._clock())

    def _ends(self) -> Iterator[bytes]:
        """Replica, entry, replica, entry ...: what Envoy told workers here of others' requests."""
        for replica, entry in self._ended_log.read(MAX_ENDS):
            yield replica.encode()
            yield entry

    def _end(self, entry: bytes) -> None:
        """A request of this replica has ended."""
        try:
            self._access_log.take(HTTPAccessLogEntry.FromString(entry))
        except DecodeError:
            self._series.add(1.0, "exchanges", "not-understood")

    def _take(self, apply: Callable[..., None], *update: Any) -> None:
        try:
            apply(*update)
        except UpdateError as error:
            self._series.add(1.0, "exchanges", "not-understood")
            if self._clock() - self._complained_at >= COMPLAIN_SECONDS:
                self._complained_at = self._clock()
                log.warning("an update from another replica could not be decoded", reason=str(error))

    def _miss(self) -> None:
        """An exchange has failed: what others have in flight will not be known for much longer."""
        self._series.add(1.0, "exchanges", "failed")
        now, mirror = self._clock(), self._mirror
        if now - self._heard_at > GONE_SECONDS and mirror.others:
            for replica in mirror.others:
                mirror.forget(replica)
            mirror.enter(now)
        self._count()

    def _count(self) -> None:
        series, mirror, fleet = self._series, self._mirror, self._scheduler.fleet
        before = fleet.version
        fleet.refresh()
        if fleet.version != before:
            series.reclaim(fleet.pod_names())
        series.put(float(len(mirror.others)), "replicas")
        for name, total in (("told", mirror.told), ("heard", mirror.heard), ("unknown", mirror.unknown)):
            if total != self._counted.get(name, 0):
                series.add(float(total - self._counted.get(name, 0)), "prompts", name)
                self._counted[name] = total

    async def close(self) -> None:
        """Tell the others that nothing is in flight here, and end the connection."""
        call = self._link.call(LEAVE, self._names, self._replica.encode())
        if call is not None:
            await call
        await self._link.close()


async def run_replicator(config: Config, tables: Tables, ready: Callable[[], None]) -> None:
    """The replicator process, until told to stop."""
    os.nice(NICENESS)
    if not config.has_replicas:  # no more: the configuration was read again
        stop = Stop()
        tables.series().put(0.0, "replicas")
        ready()
        await stop.wait()
        return
    replicator = Replicator(config, tables)
    await until_stopped(replicator.run(ready))
    await replicator.close()
