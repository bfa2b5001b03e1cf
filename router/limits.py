"""Who sends a request, and whether they may: API keys, users' requests and tokens a minute, models' requests a second.

The gate reads two headers, asks the counters once, and either lets the request pass with a `Grant` or raises the
answer. Counters come in two kinds of one shape: `SharedCounters` here, over shared memory, which answers at once, and
one over Redis (`workers/limits_redis.py`), which gives an awaitable. A request that names no user, shows no key and
asks for no limited model costs a few comparisons and no counter.

Who is the user?
    the static token   everybody's; it proves nothing about the `user` header, which is believed as without it
    an API key         says who; a `user` header may repeat the name and nothing else
    a `user` header    believed, unless that user has API keys: then it takes one of them
With `require_key` only an API key will do.

When the counters cannot answer, the policy says whether requests pass unlimited (open) or are refused (closed). It
governs limits, not identity: where a key or token is required, one that cannot be looked up does not pass.

Keys and the static token are compared as SHA-256 digests in constant time. A fast hash is right for the keys: they
are 256 random bits, made by us, which no dictionary and no amount of guessing finds; slow hashes protect passwords.

Cost per request: 0.4 µs where there is nothing to look up, 6 µs for a user in shared memory, 7 µs by API key (`pytest
tests/router/test_limits_gate.py --benchmark-enable`).
"""

import hmac
from collections.abc import Awaitable, Callable
from enum import IntEnum
from hashlib import sha256
from typing import Final, Literal, NamedTuple, Protocol

from router.errors import (
    RETRY_AFTER,
    SERVICE_UNAVAILABLE,
    TRUE,
    X_ERROR_USER,
    RequestError,
    over_model_rps,
    over_rpm,
    over_tpm,
    unknown_user,
    wrong_api_key,
)
from state.limits import NoRoom, Verdict, Windows
from state.series import Series

DEFAULT_RPM: Final = 100
"""Of a user whose record says 0."""
TOKENS_PER_REQUEST: Final = 1000
"""A record whose tpm is 0 means so many times its rpm."""
KEY_PREFIX: Final = "pm-"
"""Every API key begins so. Other bearer tokens are the pods' business, unless a key is required."""
MAX_USER_LENGTH: Final = 256
"""Characters of a user's name."""

_PREFIX: Final = KEY_PREFIX.encode()


class Limits(NamedTuple):
    """What a user may send in a minute. A negative number refuses everything."""

    rpm: int
    tpm: int


class TokenLimits(Limits):
    """The same of a user whose record says its tokens itself: the chats it streams must tell their usage."""

    __slots__ = ()


def effective(rpm: int, tpm: int) -> Limits:
    """The limits that a user record means."""
    rpm = rpm or DEFAULT_RPM
    return TokenLimits(rpm, tpm) if tpm > 0 else Limits(rpm, tpm or rpm * TOKENS_PER_REQUEST)


def digest_of(key: str | bytes) -> str:
    """SHA-256 of an API key, in hex: what is stored of it."""
    return sha256(key.encode() if isinstance(key, str) else key).hexdigest()


class Outcome(IntEnum):
    """What the counters say to a request. The numbers are those of the Redis script."""

    ADMITTED = 0
    UNKNOWN_USER = 1
    WRONG_KEY = 2
    """No such key; or the key of another than the `user` header names; or none, and the user has keys."""
    OVER_RPM = 3
    OVER_TPM = 4
    OVER_MODEL_RPS = 5
    BROKEN_RECORD = 6
    OUTAGE = 7
    """The counters cannot be reached, or have no room."""


class Ask(NamedTuple):
    """One request, as the counters need to know it. Empty strings for what it does not have."""

    user: str
    key: str
    """Digest of the API key."""
    model: str = ""
    model_rps: int = 0
    """Requests per second of the model, 0 for no limit."""


class Answer(NamedTuple):
    """What the counters say."""

    outcome: Outcome
    user: str = ""
    limit: int = 0
    """The one that was exceeded."""
    retry_after_seconds: int = 1
    requests: int = 0
    tokens: int = 0
    """Of the user in this minute, the request included."""
    model_window: int = 0
    """The second in which the model's request was counted, for `give_back_model`."""
    tells_usage: int = 0
    """1 where the user's record has a limit of tokens, so that the chats it streams must tell their usage."""


class Totals(NamedTuple):
    """A user's requests and tokens of this minute, for `x-update-rpm` and `x-update-tpm`."""

    requests: int
    tokens: int


class Counters(Protocol):
    """Users' records and what has been used. All of it in one step: a request that is refused is not counted."""

    has_users: bool
    """False where there are no user records at all: then a `user` header is a name and nothing more."""

    def ask(self, ask: Ask, /) -> Answer | Awaitable[Answer]:
        """Check and count a request."""

    def add_tokens(self, user: str, tokens: int, /) -> Totals | Awaitable[Totals | None] | None:
        """Count what a request has used. None where it cannot be counted."""

    def give_back_model(self, model: str, window: int, /) -> None:
        """Take back a model's request that was not sent after all."""


class Users(Protocol):
    """User records that are at hand."""

    def limits_of(self, user: str, /) -> Limits | None:
        """None for an unknown user."""

    def user_of(self, key_digest: str, /) -> str | None:
        """Whose API key that is."""

    def has_keys(self, user: str, /) -> bool:
        """Whether the user has any."""


class SharedCounters:
    """Limits of one replica, in shared memory. `users` is None where no users are configured.

    `clock` gives monotonic seconds.
    """

    def __init__(
        self, user_minutes: Windows, model_seconds: Windows, users: Users | None, clock: Callable[[], float]
    ) -> None:
        self.has_users = users is not None
        self._minutes = user_minutes
        self._seconds = model_seconds
        self._users = users
        self._clock = clock

    def ask(self, ask: Ask) -> Answer:
        """See `Counters.ask`."""
        users = self._users
        user, key, model, model_rps = ask
        limits = None
        if users is not None:
            if key:
                owner = users.user_of(key)
                if owner is None or (user and user != owner):
                    return Answer(Outcome.WRONG_KEY)
                user = owner
            elif user and users.has_keys(user):
                return Answer(Outcome.WRONG_KEY)
            if user:
                limits = users.limits_of(user)
                if limits is None:
                    return Answer(Outcome.UNKNOWN_USER, user)
        try:
            return self._count(user, limits, model, model_rps)
        except NoRoom:
            return Answer(Outcome.OUTAGE, user)

    def _count(self, user: str, limits: Limits | None, model: str, model_rps: int) -> Answer:
        now = self._clock()
        requests = tokens = period = 0
        if limits is not None:
            verdict, requests, tokens, period = self._minutes.take(user, now, limits.rpm, limits.tpm)
            if verdict is not Verdict.TAKEN:
                wait = 60 - int(now) % 60
                if verdict is Verdict.OVER_REQUESTS:
                    return Answer(Outcome.OVER_RPM, user, limits.rpm, wait)
                return Answer(Outcome.OVER_TPM, user, limits.tpm, wait)
        if model_rps <= 0:
            return Answer(Outcome.ADMITTED, user, 0, 0, requests, tokens, 0, int(isinstance(limits, TokenLimits)))
        try:
            verdict, _, _, window = self._seconds.take(model, now, model_rps)
        except NoRoom:
            self._minutes.give_back(user, period)
            raise
        if verdict is not Verdict.TAKEN:
            self._minutes.give_back(user, period)
            return Answer(Outcome.OVER_MODEL_RPS, user, model_rps)
        tells_usage = int(isinstance(limits, TokenLimits))
        return Answer(Outcome.ADMITTED, user, 0, 0, requests, tokens, window, tells_usage)

    def add_tokens(self, user: str, tokens: int) -> Totals | None:
        """See `Counters.add_tokens`."""
        if self._users is None or self._users.limits_of(user) is None:
            return Totals(0, 0)
        try:
            return Totals(*self._minutes.add_tokens(user, self._clock(), tokens))
        except NoRoom:
            return None

    def give_back_model(self, model: str, window: int) -> None:
        """See `Counters.give_back_model`."""
        self._seconds.give_back(model, window)


class Grant(NamedTuple):
    """A request that may pass."""

    user: str = ""
    """Who sends it, as far as that is known; empty for nobody in particular."""
    limited: bool = False
    """Whether tokens are to be counted for the user."""
    requests: int = 0
    tokens: int = 0
    model: str = ""
    model_window: int = 0
    tells_usage: bool = False
    """Whether the chats it streams must tell their usage."""


NOBODY: Final = Grant()


class Gate:
    """See the head of this file. `series` counts outages as `limits_outage`."""

    def __init__(
        self,
        counters: Counters,
        series: Series,
        *,
        static_token: str = "",
        require_key: bool = False,
        on_outage: Literal["open", "closed"] = "open",
    ) -> None:
        self._counters = counters
        self._series = series
        token = static_token.strip().encode()
        self._token = sha256(token).digest() if token else b""
        self._require_key = require_key
        self._open = on_outage == "open"
        self._policy = on_outage
        self.needed = bool(token) or require_key or counters.has_users
        """False where no request without a model's limit can be refused: then nobody need be asked."""

    def admit(self, user: bytes, authorization: bytes) -> Grant | Awaitable[Grant]:
        """Check and count a request by its `user` and `authorization` headers (empty where it has none). Raises
        RequestError, at once or when awaited."""
        key = ""
        if authorization or self._token or self._require_key:
            key = self._key(authorization)
        if not user and not key:
            return NOBODY
        name = user.decode("utf-8", "replace")
        if not self._counters.has_users:
            return Grant(name)
        if len(name) > MAX_USER_LENGTH:
            raise unknown_user(name)
        ask = Ask(name, key)
        answer = self._counters.ask(ask)
        return self._settle(ask, answer) if isinstance(answer, Answer) else self._later(ask, answer)

    def admit_model(self, model: str, model_rps: int) -> Grant | Awaitable[Grant]:
        """Check and count a request against its model's limit alone, where the user has been dealt with before. The
        grant is for `give_back_model`. Raises RequestError, at once or when awaited."""
        if model_rps <= 0:
            return NOBODY
        ask = Ask("", "", model, model_rps)
        answer = self._counters.ask(ask)
        return self._settle(ask, answer) if isinstance(answer, Answer) else self._later(ask, answer)

    def give_back_model(self, grant: Grant) -> None:
        """The request was not sent to a pod: take it back from its model's limit."""
        if grant.model:
            self._counters.give_back_model(grant.model, grant.model_window)

    def add_tokens(self, user: str, tokens: int) -> Totals | Awaitable[Totals | None] | None:
        """Count the tokens that a user's request has used. None where they could not be counted."""
        return self._counters.add_tokens(user, tokens)

    def _key(self, authorization: bytes) -> str:
        """The digest of the API key to be looked up, or empty. Raises RequestError where what is there will not do."""
        scheme, _, token = authorization.strip().partition(b" ")
        token = token.strip() if scheme.lower() == b"bearer" else b""
        if not self._require_key:
            if self._token:
                if hmac.compare_digest(sha256(token).digest(), self._token):
                    return ""
            elif not token.startswith(_PREFIX):
                return ""
        if not self._counters.has_users or not token.startswith(_PREFIX):
            if not self._token and not self._require_key:
                return ""
            raise wrong_api_key()
        return digest_of(token)

    async def _later(self, ask: Ask, answer: Awaitable[Answer]) -> Grant:
        return self._settle(ask, await answer)

    def _settle(self, ask: Ask, answer: Answer) -> Grant:
        outcome, user = answer.outcome, answer.user
        if outcome is Outcome.ADMITTED:
            limited = self._counters.has_users and user != ""
            model = ask.model if ask.model_rps > 0 else ""
            tells_usage = bool(answer.tells_usage)
            return Grant(user, limited, answer.requests, answer.tokens, model, answer.model_window, tells_usage)
        if outcome is Outcome.OVER_RPM:
            raise over_rpm(user, answer.limit, answer.retry_after_seconds)
        if outcome is Outcome.OVER_TPM:
            raise over_tpm(user, answer.limit, answer.retry_after_seconds)
        if outcome is Outcome.OVER_MODEL_RPS:
            raise over_model_rps(ask.model, answer.limit)
        if outcome is Outcome.UNKNOWN_USER:
            raise unknown_user(user)
        if outcome is Outcome.WRONG_KEY:
            raise wrong_api_key()
        if outcome is Outcome.BROKEN_RECORD:
            raise RequestError(500, "the record of this user cannot be read", headers=((X_ERROR_USER, TRUE),))
        return self._without_counters(ask, user)

    def _without_counters(self, ask: Ask, key_owner: str) -> Grant:
        """`key_owner` is whose key it was when it was seen last, empty where that is not known."""
        self._series.add(1.0, "limits_outage", self._policy)
        if not self._open or (ask.key and not key_owner and (self._require_key or self._token)):
            raise RequestError(
                503,
                "users and limits cannot be checked at the moment; retry shortly",
                code=SERVICE_UNAVAILABLE,
                headers=((X_ERROR_USER, TRUE), (RETRY_AFTER, b"1")),
            )
        if not ask.key:
            return Grant(ask.user, ask.user != "")
        if key_owner and ask.user and ask.user != key_owner:
            raise wrong_api_key()
        return Grant(key_owner, key_owner != "")
