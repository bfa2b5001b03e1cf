"""Two replicas, each with tables of its own, that hear of each other: what the one sends counts at the other."""

import numpy as np
import pytest
from fleet import MODEL, loads, make_record, make_tables, set_row

from router.mirror import MAX_WAIT_SECONDS, Mirror
from router.prefix_hash import PrefixHasher
from router.prefix_index import PrefixIndex
from router.prefix_match import SlotIndex
from router.rates import Prior
from state.catalog import CatalogDocument
from state.ledger import Entry
from state.pods import COLUMN, Health
from state.tables import FIRST_WORKER, REPLICATOR, Tables
from state.updates import LOADS, PromptUpdate, UpdateError, pod_key, write_routed

STARTED = 1.7e9
TEXT = b"You are a helpful assistant. " * 40


class Replica:
    """One replica with one worker. `places` are the rows of its pods, which are known by their addresses."""

    def __init__(self, name: str, places: dict[str, int], now: float = 1000.0, **metrics: float) -> None:
        self.name = name
        self.tables = make_tables(writer=FIRST_WORKER)
        self.places = places
        self.generation = 0
        for address, slot in places.items():
            self.claim(address, slot, **metrics)
        self.publish()
        self.index = PrefixIndex(self.tables.prefix_log, self.tables.pods)
        self.now = now
        self.start_mirror()

    def start_mirror(self) -> None:
        self.mirror = Mirror(Tables.attach(self.tables.segment.fd, REPLICATOR))

    def claim(self, address: str, slot: int, **metrics: float) -> None:
        self.generation += 1
        self.places[address] = slot
        self.tables.pods.claim(slot, self.generation)
        set_row(self.tables, slot, **{"start_time_seconds": STARTED, **metrics})

    def publish(self) -> None:
        generations = self.tables.pods.generation
        records = [
            make_record(slot, generation=int(generations[slot]), address=address)
            for address, slot in self.places.items()
        ]
        self.tables.catalog.publish(CatalogDocument(tuple(records)))

    def restart(self, address: str, **metrics: float) -> None:
        """The pod's engine is another now, and the scraper has seen it."""
        slot = self.places[address]
        incarnation = self.tables.pods.row(slot)[COLUMN["incarnation"]] + 1
        set_row(self.tables, slot, incarnation=incarnation, **metrics)

    def send(self, address: str, text: bytes = TEXT) -> None:
        self.index.follow(self.now)
        chain = PrefixHasher(0).chain(text, MODEL, 64)
        self.index.remember(chain, self.places[address], self.now)

    def holds(self, address: str, text: bytes = TEXT) -> int:
        """Blocks of the text that the pod is believed to hold."""
        self.index.follow(self.now)
        slots = SlotIndex([self.places[address]])
        match = self.index.match(PrefixHasher(0).chain(text, MODEL, 64), slots.mask)
        return match.blocks(slots)[0]

    def tell(self, *others: "Replica", age: float = 0.0) -> None:
        news = self.mirror.loads(self.now), self.mirror.routed(self.now, 1 << 20)
        for other in others:
            other.mirror.apply_loads(self.name, news[0], other.now)
            other.mirror.apply_routed(news[1], age, other.now)
            other.mirror.enter(other.now)

    def load(self, address: str) -> tuple[int, int]:
        return self.tables.ledger.load(self.places[address])

    def own(self, address: str) -> list[int]:
        high = self.tables.pods.high
        own: list[int] = self.tables.ledger.of_this_replica(high, REPLICATOR)[:, self.places[address]].tolist()
        return own


@pytest.fixture
def pair() -> tuple[Replica, Replica]:
    """The same pods in other rows, and one each that the other does not know. Clocks that have nothing in common."""
    one = Replica("one", {"a:1": 0, "b:1": 1, "c:1": 2})
    two = Replica("two", {"d:1": 0, "b:1": 2, "a:1": 5}, now=77.0)
    return one, two


def test_what_one_has_in_flight_counts_at_the_other(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    ledger = one.tables.ledger
    charges = [ledger.charge(0, 100, 40, held=True), ledger.charge(0, 10, 0, held=False)]
    ledger.charge(1, 7, 7, held=True)
    two.tables.ledger.charge(5, 1, 1, held=True)
    one.tell(two)
    assert (two.load("a:1"), two.load("b:1"), two.load("d:1")) == ((3, 111), (1, 7), (0, 0))
    assert two.own("a:1") == [1, 1, 1], "what is its own is known apart"
    assert two.tables.ledger.held_by(REPLICATOR, 5) == (2, 110)
    two.tell(one)
    one.tell(two)
    assert one.load("a:1") == (3, 111)
    assert two.load("a:1") == (3, 111), "and what one hears it does not tell"
    for charge, held in zip(charges, (True, False), strict=True):
        ledger.release(charge, held=held)
    one.tell(two)
    assert two.load("a:1") == (1, 1)


def test_news_may_be_lost_or_told_twice(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.tell(two)
    for _ in range(3):
        one.tables.ledger.charge(0, 10, 10, held=True)
        one.mirror.loads(one.now)
    one.tell(two)
    one.tell(two)
    assert two.load("a:1") == (3, 30)
    assert two.tables.ledger.total(Entry.PROMISED, 5) == 30


def test_what_a_replica_had_that_is_gone_is_taken_off(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    third = Replica("three", {"a:1": 3})
    one.tables.ledger.charge(0, 10, 10, held=True)
    third.tables.ledger.charge(3, 5, 5, held=True)
    one.tell(two)
    third.tell(two)
    assert two.load("a:1") == (2, 15)
    two.mirror.forget("one")
    two.mirror.enter(two.now)
    assert two.load("a:1") == (1, 5)
    assert two.mirror.others == ["three"]


def test_a_mirror_that_died_leaves_nothing(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.tables.ledger.charge(0, 10, 10, held=True)
    one.tell(two)
    assert two.tables.ledger.forfeit(REPLICATOR) == 1
    assert two.load("a:1") == (0, 0)
    two.start_mirror()
    one.tell(two)
    assert two.load("a:1") == (1, 10)
    two.start_mirror()  # of which nobody has taken off what its predecessor held
    assert two.load("a:1") == (0, 0)


def test_a_row_that_another_pod_gets_begins_at_what_others_have_on_that(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    for slot in (0, 0, 2):
        one.tables.ledger.charge(slot, 10, 10, held=True)
    one.tell(two)
    assert two.load("a:1") == (2, 20)
    requests, tokens = two.load("a:1")
    two.tables.ledger.settle(5, -requests, -tokens)  # as the registry does
    del two.places["a:1"]
    two.claim("c:1", 5)
    two.publish()
    assert two.load("c:1") == (0, 0)
    one.tell(two)
    assert two.load("c:1") == (1, 10)
    two.mirror.forget("one")
    two.mirror.enter(two.now)
    assert two.load("c:1") == (0, 0)


def test_a_pod_that_appears_later_has_what_was_told_before(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.tables.ledger.charge(2, 10, 10, held=True)
    one.tell(two)
    two.claim("c:1", 7)
    two.publish()
    two.mirror.enter(two.now)
    assert two.load("c:1") == (1, 10)


def test_what_one_promises_lengthens_the_wait_at_the_other(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.tell(two)
    one.tables.ledger.charge(0, 5000, 4000, held=True)
    one.tell(two)
    assert two.tables.ledger.total(Entry.PROMISED, 5) == 4000
    wait = two.tables.ledger.busy_until(16)[5] - two.now
    assert wait == pytest.approx(4000 * Prior().prefill_token_seconds, rel=0.2)
    one.tell(two)
    assert two.tables.ledger.busy_until(16)[5] - two.now == wait
    two.tables.ledger.occupy(5, two.now + 10.0)
    one.tables.ledger.charge(0, 5000, 4000, held=True)
    one.tell(two)
    assert two.tables.ledger.busy_until(16)[5] - two.now == pytest.approx(10.0 + wait), "it comes after the others"


def test_a_replica_that_is_heard_of_first_tells_the_waits(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.tables.ledger.charge(0, 5000, 4000, held=True)
    one.tables.ledger.occupy(0, one.now + 3.0)
    one.tell(two)
    assert two.tables.ledger.busy_until(16)[5] - two.now == pytest.approx(3.0)
    assert two.tables.ledger.total(Entry.PROMISED, 5) == 0, "when that was promised is not known"


def test_prompts_of_the_one_are_found_by_the_other(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.send("a:1")
    one.send("c:1")
    one.tell(two)
    assert two.holds("a:1") == one.holds("a:1") == len(TEXT) // 64
    assert two.holds("b:1") == 0
    assert (one.mirror.told, two.mirror.heard, two.mirror.unknown) == (2, 1, 1)
    two.tell(one)
    assert two.mirror.told == 0, "what is heard is not told on"


def test_a_prompt_is_as_old_as_it_is(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    two.index = PrefixIndex(two.tables.prefix_log, two.tables.pods, ttl_seconds=60.0)
    one.send("a:1")
    one.now += 30.0
    one.tell(two, age=25.0)
    assert two.holds("a:1")
    for _ in range(200):
        two.now += 0.06
        two.index.follow(two.now)
    assert not two.holds("a:1")


def test_only_so_much_is_told_at_once_and_the_rest_next_time(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    texts = [bytes([n]) * 640 for n in range(10)]
    for text in texts:
        one.send("a:1", text)
    one_prompt = len(write_routed(PromptUpdate(0, 0, 0.0, 64, bytes(80))))
    news = one.mirror.routed(one.now, 3 * one_prompt)
    assert len(news) == 3 * one_prompt
    two.mirror.apply_routed(news, 0.0, two.now)
    assert [two.holds("a:1", text) for text in texts] == [10] * 3 + [0] * 7
    two.mirror.apply_routed(one.mirror.routed(one.now, 1 << 20), 0.0, two.now)
    assert [two.holds("a:1", text) for text in texts] == [10] * 10


def test_what_a_life_held_that_is_over_is_not_believed(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.send("a:1")
    two.restart("a:1", start_time_seconds=STARTED + 500.0)
    one.tell(two)
    assert two.holds("a:1") == 0
    assert two.mirror.unknown == 1
    one.restart("a:1", start_time_seconds=STARTED + 500.0)
    one.send("a:1")
    one.tell(two)
    assert two.holds("a:1")


def test_what_was_sent_to_a_life_that_is_over_is_not_told(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.send("a:1")
    one.restart("a:1")
    one.tell(two)
    assert two.holds("a:1") == 0
    assert one.mirror.told == 0


def test_without_start_times_only_what_came_since_the_life_was_seen_is_believed() -> None:
    one = Replica("one", {"a:1": 0}, start_time_seconds=float("nan"))
    two = Replica("two", {"a:1": 1}, start_time_seconds=float("nan"))
    assert two.mirror.ready(two.now)
    one.send("a:1")
    one.tell(two, age=1.0)
    assert two.holds("a:1") == 0, "that may have been before a restart that nobody told of"
    two.now += 10.0
    one.send("a:1")
    one.tell(two, age=1.0)
    assert two.holds("a:1")
    two.restart("a:1")
    assert two.holds("a:1") == 0
    two.mirror.enter(two.now)
    one.send("a:1")
    one.tell(two, age=0.1)
    assert two.holds("a:1") == 0
    two.now += 1.0
    one.send("a:1")
    one.tell(two, age=0.1)
    assert two.holds("a:1")


def test_ready_once_every_pod_is_polled() -> None:
    tables = make_tables(writer=FIRST_WORKER)
    mirror = Mirror(Tables.attach(tables.segment.fd, REPLICATOR))
    assert not mirror.ready(1.0), "discovery has not loaded"
    for slot in range(2):
        tables.pods.claim(slot, slot + 1)
    tables.catalog.publish(CatalogDocument(tuple(make_record(slot) for slot in range(2))))
    set_row(tables, 0)
    assert not mirror.ready(1.0)
    set_row(tables, 1, Health.FAILED)
    assert mirror.ready(1.0)


def test_news_that_are_none_change_nothing(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.tables.ledger.charge(0, 10, 10, held=True)
    one.tell(two)
    with pytest.raises(UpdateError):
        two.mirror.apply_loads("one", b"x" * (LOADS.itemsize + 1), two.now)
    with pytest.raises(UpdateError):
        two.mirror.apply_routed(b"x", 0.0, two.now)
    two.mirror.enter(two.now)
    assert two.load("a:1") == (1, 10)


def test_absurd_news_are_bounded(pair: tuple[Replica, Replica]) -> None:
    _, two = pair
    rows = np.zeros(2, LOADS)
    rows["pod"] = [pod_key("a:1"), pod_key("b:1")]
    for value in (np.iinfo("<i8").max, np.iinfo("<i8").min):
        rows["requests"] = max(min(value, 2**31 - 1), -(2**31))
        rows["tokens"] = rows["promised"] = value
        rows["wait"] = 3e38
        for name in ("mad", "madder"):
            two.mirror.apply_loads(name, rows.tobytes(), two.now)
        two.mirror.enter(two.now)
        requests, tokens = two.load("a:1")
        assert 0 <= requests < 1 << 26
        assert 0 <= tokens < 1 << 42
        assert two.tables.ledger.busy_until(16)[5] <= two.now + MAX_WAIT_SECONDS + 1.0


def test_rows_out_of_reach_and_pods_twice(pair: tuple[Replica, Replica]) -> None:
    _, two = pair
    rows = np.zeros(2, LOADS)
    rows["pod"] = [pod_key("a:1"), pod_key("nobody:1")]
    rows["requests"] = 1
    two.mirror.apply_loads("x", rows.tobytes(), two.now)
    two.mirror.enter(two.now)
    assert loads(two.tables) == [0, 0, 0, 0, 0, 1] + [0] * 10
    rows["pod"] = pod_key("a:1")
    with pytest.raises(UpdateError):
        two.mirror.apply_loads("x", rows.tobytes(), two.now)


def test_a_pod_in_a_row_of_another_begins_with_nothing_promised(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.tell(two)
    one.tables.ledger.charge(0, 3_000_000, 3_000_000, held=False)
    one.tell(two)
    promised = two.tables.ledger.total(Entry.PROMISED, 0)
    del one.places["a:1"]
    one.claim("d:1", 0)
    one.publish()
    one.tell(two)
    assert two.tables.ledger.total(Entry.PROMISED, 0) == promised
    assert two.tables.ledger.busy_until(16)[0] == 0
    one.tables.ledger.charge(0, 50, 50, held=False)
    one.tell(two)
    assert two.tables.ledger.total(Entry.PROMISED, 0) == promised + 50


def test_own_prompts_are_told_however_many_others_tell(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    news = b"".join(
        write_routed(PromptUpdate(pod_key("a:1"), 0, 0.0, 64, bytes([n % 256, n // 256] * 4))) for n in range(400)
    )
    for number in range(5):
        one.mirror.apply_routed(news, 0.0, one.now + 1)
        one.send("a:1", b"%d" % number * 640)
        one.tell(two)
    assert one.mirror.told == 5
    assert not one.mirror.more


def test_a_prompt_that_is_told_late_makes_no_newer_one_older(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    one.send("a:1")
    late = one.mirror.routed(one.now, 1 << 20)
    two.now += 100.0
    two.send("a:1")
    two.mirror.apply_routed(late, 90.0, two.now)
    assert two.holds("a:1")
    (times,) = [order.values() for order in two.index._orders if order]
    assert set(times) == {two.now}
