"""Limits of all replicas together, in Redis or Valkey, with the records and counters of AIBrix's metadata service.

    aibrix-users/<user>                            JSON {name, rpm, tpm}
    aibrix:<user>_RPM_CURRENT:<bin>                requests of this minute; bin = floor(unix / 60) mod 64, kept 60 s
    aibrix:<user>_TPM_CURRENT:<bin>                tokens of this minute
    aibrix_model:<model>_MODEL_RPS_CURRENT:<bin>   requests of this second; bin = floor(unix) mod 64, kept 1 s
    pointsman-keys/<SHA-256 of an API key>         the user whose key that is
    pointsman-user-keys/<user>                     set of the digests of the user's keys

One script reads and counts everything about a request, in one round trip and one step, so that however many ask at
once no more than the limit is admitted; a request that it refuses is not counted. The clock is the server's, so all
replicas mean the same window.

While Redis cannot be reached, answers are OUTAGE, at once; an API key that was seen before still says whose it is.
"""

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final

from router.limits import Answer, Ask, Outcome, Totals
from workers.redis_link import RedisLink, ReplyError, Script

USER_PREFIX: Final = "aibrix-users/"
KEY_PREFIX: Final = "pointsman-keys/"
USER_KEYS_PREFIX: Final = "pointsman-user-keys/"
MAX_REMEMBERED_KEYS: Final = 10_000

ADMIT: Final = Script("""
local user, key, model, model_rps = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local now = tonumber(ARGV[5]) or tonumber(redis.call('TIME')[1])
if key ~= '' then
  local owner = redis.call('GET', 'pointsman-keys/' .. key)
  if not owner or (user ~= '' and user ~= owner) then return {2, user} end
  user = owner
elseif user ~= '' and redis.call('EXISTS', 'pointsman-user-keys/' .. user) == 1 then
  return {2, user}
end
local requests, tokens, rpm_key, tells_usage = 0, 0, nil, 0
if user ~= '' then
  local record = redis.call('GET', 'aibrix-users/' .. user)
  if not record then return {1, user} end
  local ok, limits = pcall(cjson.decode, record)
  if not ok or type(limits) ~= 'table' then return {6, user} end
  local rpm, tpm = limits['rpm'] or 0, limits['tpm'] or 0
  if rpm == cjson.null then rpm = 0 end
  if tpm == cjson.null then tpm = 0 end
  if type(rpm) ~= 'number' or type(tpm) ~= 'number' then return {6, user} end
  if tpm > 0 then tells_usage = 1 end
  if rpm == 0 then rpm = 100 end
  if tpm == 0 then tpm = rpm * 1000 end
  local bin = math.floor(now / 60) % 64
  local wait = 60 - math.floor(now) % 60
  rpm_key = 'aibrix:' .. user .. '_RPM_CURRENT:' .. bin
  requests = tonumber(redis.call('GET', rpm_key) or 0)
  if requests >= rpm then return {3, user, rpm, wait} end
  tokens = tonumber(redis.call('GET', 'aibrix:' .. user .. '_TPM_CURRENT:' .. bin) or 0)
  if tokens >= tpm then return {4, user, tpm, wait} end
end
local second = math.floor(now)
if model_rps > 0 then
  local model_key = 'aibrix_model:' .. model .. '_MODEL_RPS_CURRENT:' .. second % 64
  if tonumber(redis.call('GET', model_key) or 0) >= model_rps then return {5, user, model_rps, 1} end
  redis.call('INCR', model_key)
  redis.call('EXPIRE', model_key, 1)
end
if rpm_key then
  requests = redis.call('INCR', rpm_key)
  redis.call('EXPIRE', rpm_key, 60)
end
return {0, user, 0, 0, requests, tokens, second, tells_usage}
""")

ADD_TOKENS: Final = Script("""
local user = ARGV[1]
local now = tonumber(ARGV[3]) or tonumber(redis.call('TIME')[1])
local bin = math.floor(now / 60) % 64
local key = 'aibrix:' .. user .. '_TPM_CURRENT:' .. bin
local tokens = redis.call('INCRBY', key, ARGV[2])
redis.call('EXPIRE', key, 60)
return {tonumber(redis.call('GET', 'aibrix:' .. user .. '_RPM_CURRENT:' .. bin) or 0), tokens}
""")

GIVE_BACK_MODEL: Final = Script("""
local key = 'aibrix_model:' .. ARGV[1] .. '_MODEL_RPS_CURRENT:' .. tonumber(ARGV[2]) % 64
if tonumber(redis.call('GET', key) or 0) > 0 then return redis.call('DECR', key) end
return 0
""")


class RedisCounters:
    """`router.limits.Counters` over Redis. `now` gives unix seconds in place of the server's clock, for tests."""

    has_users = True

    def __init__(self, url: str, timeout_seconds: float, now: Callable[[], float] | None = None) -> None:
        """Raises ValueError for a URL that is none."""
        self.link = RedisLink(url, timeout_seconds, (ADMIT, ADD_TOKENS, GIVE_BACK_MODEL))
        self._now = now
        self._owners: dict[str, str] = {}

    def ask(self, ask: Ask) -> Answer | Awaitable[Answer]:
        """See `router.limits.Counters.ask`. An Answer only while Redis cannot be reached."""
        reply = self.link.call(
            ADMIT, _text(ask.user), ask.key.encode(), _text(ask.model), b"%d" % ask.model_rps, self._time()
        )
        if reply is None:
            return self._outage(ask)
        return self._answer(ask, reply)

    def add_tokens(self, user: str, tokens: int) -> Awaitable[Totals | None] | None:
        """See `router.limits.Counters.add_tokens`. The tokens are counted whether or not somebody waits."""
        amount = min(max(tokens, 0), (1 << 53) - 1)
        reply = self.link.call(ADD_TOKENS, _text(user), b"%d" % amount, self._time())
        return None if reply is None else _Totals(reply)

    def give_back_model(self, model: str, window: int) -> None:
        """See `router.limits.Counters.give_back_model`."""
        self.link.call(GIVE_BACK_MODEL, _text(model), b"%d" % window)

    async def start(self) -> None:
        """Connect; see `RedisLink.start`."""
        await self.link.start()

    async def close(self) -> None:
        """See `RedisLink.close`."""
        await self.link.close()

    async def _answer(self, ask: Ask, reply: Awaitable[Any]) -> Answer:
        values = await reply
        if isinstance(values, ReplyError):
            return self._outage(ask)
        user = values[1].decode("utf-8", "replace")
        if ask.key:
            self._remember(ask.key, values[0], user)
        return Answer(Outcome(values[0]), user, *values[2:])

    def _remember(self, key: str, outcome: int, user: str) -> None:
        if outcome == Outcome.WRONG_KEY:
            self._owners.pop(key, None)
        elif self._owners.get(key) != user:
            if len(self._owners) >= MAX_REMEMBERED_KEYS:
                del self._owners[next(iter(self._owners))]
            self._owners[key] = user

    def _outage(self, ask: Ask) -> Answer:
        return Answer(Outcome.OUTAGE, self._owners.get(ask.key, "") if ask.key else "")

    def _time(self) -> bytes:
        return b"" if self._now is None else b"%d" % int(self._now())


class _Totals(Awaitable[Totals | None]):
    """The reply to ADD_TOKENS, for those who want it; a coroutine that nobody awaits would be complained of."""

    __slots__ = ("_reply",)

    def __init__(self, reply: Awaitable[Any]) -> None:
        self._reply = reply

    def __await__(self) -> Generator[Any, None, Totals | None]:
        values = yield from self._reply.__await__()
        return None if isinstance(values, ReplyError) else Totals(*values)


def _text(text: str) -> bytes:
    return text.encode("utf-8", "replace")
