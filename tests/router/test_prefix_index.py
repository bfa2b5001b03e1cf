"""The view of who holds which prefix: right for every pod, bounded, and forgotten when it should be."""

import random
import time
from collections.abc import MutableSequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.prefix_hash import Chain, PrefixHasher
from router.prefix_index import MAX_SPARED, PrefixIndex
from router.prefix_match import SlotIndex
from router.prefixes import LookUp
from state.pods import COLUMN, FIELDS, PodTable
from state.prefix_log import PrefixLog
from state.segment import Segment

RING = 256 << 10
HASHER = PrefixHasher(seed=3)
BLOCK = 256
TOKENS_PER_BLOCK = 64


def chain(*parts: tuple[str, int]) -> Chain:
    """A prompt made of named parts, each so many blocks long."""
    text = b"".join((f"{name}{i}".encode() * BLOCK)[:BLOCK] for name, blocks in parts for i in range(blocks))
    return HASHER.chain(text, "m", BLOCK)


class Room:
    """One replica's shared tables, and any number of processes' views of them."""

    def __init__(self, pods: int = 4, tokens: float = 64_000.0, writers: int = 9) -> None:
        self.writers = writers
        self.pods = PodTable(memoryview(bytearray(PodTable.size(64))), 64)
        self.memory = memoryview(bytearray(PrefixLog.size(writers, RING)))
        for slot in range(pods):
            self.appear(slot, 1, tokens)

    def appear(self, slot: int, generation: int, tokens: float = 64_000.0, incarnation: int = 0) -> None:
        if self.pods.generation[slot] != generation:
            self.pods.claim(slot, generation)
        row = np.full(len(FIELDS), np.nan)
        row[: COLUMN["running"]] = 0.0
        row[COLUMN["incarnation"]] = incarnation
        row[COLUMN["num_gpu_blocks"]] = tokens / 16
        row[COLUMN["block_size"]] = 16
        self.pods.write(slot, row)

    def view(self, writer: int | None = 0, **options: float) -> PrefixIndex:
        log = PrefixLog(self.memory, self.writers, RING, writer)
        index = PrefixIndex(log, self.pods, **options)  # type: ignore[arg-type]
        index.follow(0.0, limit=1 << 30)
        return index


def matched(index: PrefixIndex, prompt: Chain, pods: int = 4) -> list[int]:
    slots = SlotIndex(range(pods))
    return index.match(prompt, slots.mask).blocks(slots)


def test_every_pod_is_known_by_how_much_of_the_prompt_it_holds() -> None:
    index = Room().view()
    index.remember(chain(("system", 4), ("alice", 6)), 0, 1.0)
    index.remember(chain(("system", 4), ("bob", 3)), 1, 1.0)
    index.remember(chain(("other", 9)), 2, 1.0)
    assert matched(index, chain(("system", 4), ("alice", 6), ("next", 5))) == [10, 4, 0, 0]
    assert matched(index, chain(("system", 4), ("bob", 2))) == [4, 6, 0, 0]
    assert matched(index, chain(("system", 2), ("carol", 9))) == [2, 2, 0, 0]
    assert matched(index, chain(("other", 9))) == [0, 0, 9, 0]
    assert matched(index, chain(("nobody", 9))) == [0, 0, 0, 0]


def test_the_pod_that_answered_a_prompt_holds_the_answer_too() -> None:
    index = Room().view()
    index.remember(chain(("system", 4), ("alice", 6)), 0, 1.0)
    index.remember(chain(("system", 4)), 1, 1.0)
    slots = SlotIndex(range(4))

    def lengths(prompt: Chain) -> list[int]:
        return index.match(prompt, slots.mask, 3).blocks(slots)

    assert lengths(chain(("system", 4), ("alice", 6), ("answer", 3), ("next", 5))) == [13, 7, 0, 0]
    assert lengths(chain(("system", 4), ("alice", 6), ("answer", 2))) == [12, 7, 0, 0]
    assert lengths(chain(("system", 4), ("alice", 6))) == [10, 7, 0, 0]
    assert lengths(chain(("system", 4), ("bob", 6))) == [4, 7, 0, 0]
    assert lengths(chain(("system", 2), ("carol", 6))) == [2, 2, 0, 0]
    # Once the chat has gone on, what follows its first turn is known.
    index.remember(chain(("system", 4), ("alice", 6), ("answer", 3), ("next", 5)), 0, 2.0)
    assert lengths(chain(("system", 4), ("alice", 6), ("other", 9))) == [10, 7, 0, 0]
    assert lengths(chain(("system", 4), ("alice", 6), ("answer", 3), ("next", 5), ("more", 9))) == [21, 7, 0, 0]
    index.forget(0)
    assert lengths(chain(("system", 4), ("alice", 6), ("answer", 3))) == [0, 7, 0, 0]


def test_only_candidates_count() -> None:
    index = Room().view()
    index.remember(chain(("a", 5)), 0, 1.0)
    index.remember(chain(("a", 5)), 2, 1.0)
    slots = SlotIndex([1, 2, 3])
    assert index.match(chain(("a", 5)), slots.mask).blocks(slots) == [0, 5, 0]


@pytest.mark.parametrize("holders", [1, 9, 31, 32, 48])
def test_a_prefix_on_many_pods_and_one_on_few_are_both_right(holders: int) -> None:
    index = Room(pods=48).view()
    for slot in range(holders):
        index.remember(chain(("system", 8), (f"user{slot}", 4)), slot, 1.0)
    expected = [8] * holders + [0] * (48 - holders)
    expected[holders // 2] = 12
    assert matched(index, chain(("system", 8), (f"user{holders // 2}", 7)), pods=48) == expected


def test_what_one_worker_routes_all_others_see_at_their_next_decision() -> None:
    room = Room()
    views = [room.view(writer) for writer in range(8)]
    for writer, view in enumerate(views):
        view.remember(chain((f"w{writer}", 5)), writer % 4, 1.0)
    for view in views:
        view.follow(1.0)
        for writer in range(8):
            assert matched(view, chain((f"w{writer}", 5)))[writer % 4] == 5


def test_a_worker_that_starts_knows_what_the_others_know() -> None:
    room = Room()
    first = room.view(0)
    for number in range(50):
        first.remember(chain(("system", 3), (f"u{number}", 4)), number % 4, 1.0)
    late = room.view(1)
    for number in range(50):
        prompt = chain(("system", 3), (f"u{number}", 4))
        assert matched(late, prompt) == matched(first, prompt)


def test_a_restarted_engine_is_forgotten_at_once() -> None:
    room = Room()
    index, other = room.view(0), room.view(1)
    prompt = chain(("a", 5))
    index.remember(prompt, 0, 1.0)
    index.remember(prompt, 1, 1.0)
    room.appear(0, 1, incarnation=1)
    other.follow(1.0)  # reads the record of the first life only now
    index.follow(1.0)
    assert matched(index, prompt) == matched(other, prompt) == [0, 5, 0, 0]
    assert index.held_bytes(0) == 0
    index.remember(prompt, 0, 2.0)
    other.follow(2.0)
    assert matched(other, prompt) == [5, 5, 0, 0]


def test_a_row_that_belongs_to_another_pod_has_forgotten_the_first() -> None:
    room = Room()
    index = room.view(0)
    prompt = chain(("a", 5))
    index.remember(prompt, 3, 1.0)
    room.pods.vacate(3)
    index.follow(1.0)
    assert matched(index, prompt) == [0, 0, 0, 0]
    room.appear(3, 2)
    index.follow(1.0)
    assert matched(index, prompt) == [0, 0, 0, 0]
    assert matched(room.view(1), prompt) == [0, 0, 0, 0]


def test_a_pod_never_claims_more_than_its_cache_and_gives_up_what_it_used_longest_ago() -> None:
    room = Room(tokens=20 * TOKENS_PER_BLOCK)
    index = room.view()
    for name in ("a", "b"):
        index.remember(chain((name, 8)), 0, 1.0)
    index.remember(chain(("a", 8)), 0, 2.0)  # used again, so b is older
    index.remember(chain(("c", 10)), 0, 3.0)
    assert index.held_bytes(0) == 20 * BLOCK
    assert index.held_tokens(0) == index.room_tokens(0)
    assert matched(index, chain(("a", 8)))[0] == 8
    assert matched(index, chain(("b", 8)))[0] == 2  # its tail went first
    assert matched(index, chain(("c", 10)))[0] == 10


def test_a_prompt_larger_than_the_cache_is_claimed_as_far_as_it_fits() -> None:
    index = Room(tokens=20 * TOKENS_PER_BLOCK).view()
    index.remember(chain(("long", 90)), 0, 1.0)
    assert matched(index, chain(("long", 90))) == [20, 0, 0, 0]


def test_what_many_prompts_begin_with_outlives_their_ends() -> None:
    index = Room(tokens=30 * TOKENS_PER_BLOCK).view()
    for number in range(40):
        index.remember(chain(("system", 10), (f"u{number}", 5)), 0, float(number))
    assert matched(index, chain(("system", 10), ("u0", 5)))[0] == 10
    assert matched(index, chain(("system", 10), ("u39", 5)))[0] == 15


@pytest.mark.parametrize(("chats", "lost"), [(2, "nothing"), (6, "much"), (14, "nothing")])
def test_what_is_written_costs_most_where_the_cache_just_suffices(chats: int, lost: str) -> None:
    """Chats in turn, each of 100 blocks, on a pod that holds 1000, and prompts of 60 that nobody needs again: two
    chats come back early, six just before they would be pushed out, and of fourteen all are gone by then."""
    room = Room(1)
    view = room.view()
    for turn in range(300):
        view.remember(chain((f"chat {turn % chats} ", 100)), 0, float(turn))
        view.remember(chain((f"other {turn} ", 60)), 0, turn + 0.5)
    if lost == "much":
        assert view.recompute_per_token[0] > 1.0
    else:
        assert view.recompute_per_token[0] == 0.0
    room.appear(0, 2)
    view.follow(301.0)
    assert view.recompute_per_token[0] == 0.0


def test_one_prompt_that_comes_back_late_says_little_of_a_cache() -> None:
    """Of a cache of 1000 blocks, just written for the first time, 100 are used again after nearly all of their stay."""
    view = Room(1).view()
    for number in range(12):
        view.remember(chain((f"chat {number} ", 100)), 0, float(number))
    view.remember(chain(("chat 3 ", 100)), 0, 12.0)
    assert view.recompute_per_token[0] == 0.0


def test_a_pod_that_says_nothing_of_its_cache_has_the_default() -> None:
    room = Room()
    room.pods.claim(0, 5)
    index = room.view(0, default_pod_tokens=10 * TOKENS_PER_BLOCK)
    index.remember(chain(("a", 50)), 0, 1.0)
    assert matched(index, chain(("a", 50)))[0] == 10


def test_entries_expire_when_nobody_uses_them() -> None:
    index = Room().view(0, ttl_seconds=60.0)
    index.remember(chain(("old", 5)), 0, 100.0)
    index.remember(chain(("used", 5)), 0, 100.0)
    index.remember(chain(("used", 5)), 0, 150.0)
    for second in range(4):
        index.follow(170.0 + second)
    assert matched(index, chain(("old", 5)))[0] == 0
    assert matched(index, chain(("used", 5)))[0] == 5


def test_a_full_view_stays_within_its_bounds_and_keeps_the_newest() -> None:
    room = Room(tokens=1e9)
    index = room.view(0, max_blocks=2000)
    for number in range(3000):
        index.remember(chain((f"p{number}", 1 + number % 9)), number % 4, float(number))
        assert index.blocks <= 2000
        assert index.pairs <= 2000 // 8
    assert matched(index, chain(("p2999", 3)))[2999 % 4] == 3


def test_a_full_view_keeps_for_longer_what_many_prompts_begin_with() -> None:
    """A conversation that is over is dropped in its turn, however many turns it had."""
    index = Room(tokens=1e9).view(0, max_blocks=2000)
    for turn in range(1, 6):
        index.remember(chain(("system", 20), (f"user {turn}", 1)), 0, 1.0)
        index.remember(chain(*((f"turn {number}", 4) for number in range(turn))), 0, 1.0)
    for number in range(250):
        index.remember(chain((f"once {number}", 10)), 0, 2.0)
    assert matched(index, chain(("turn 0", 4)))[0] == 0
    assert matched(index, chain(("system", 20)))[0] == 20
    check(index)
    for number in range(250):
        index.remember(chain((f"once more {number}", 10)), 0, 3.0)
    assert matched(index, chain(("system", 20)))[0] == 0


def test_making_room_takes_no_longer_where_everything_is_shared() -> None:
    index = Room(tokens=1e9).view(0)
    for number in range(1000):
        index.remember(chain((f"p{number}", 2)), 0, float(number))
    for run in index._runs.values():
        run.shared = True
    index._max_blocks = 1000
    index.remember(chain(("one more", 2)), 0, 1000.0)
    assert index.blocks <= 1000
    assert sum(not run.shared for run in index._runs.values()) <= MAX_SPARED + 1
    check(index)


def test_what_the_view_had_no_room_for_is_known_to_be_forgotten() -> None:
    room = Room(tokens=1e9)
    index = room.view(0, max_blocks=2000)
    for number in range(400):
        index.remember(chain((f"once {number}", 10)), number % 4, float(number))
    assert index.forgotten() == 0.0, "nobody will ask for it"
    for number in range(400):
        for turns in (1, 2):
            parts = ((f"{number} {turn}", 10) for turn in range(turns))
            index.remember(chain(*parts), number % 4, 1000.0 + number)
    held = sum(index.held_bytes(slot) for slot in range(4))
    assert index.forgotten() == pytest.approx(1 - held / (4000 * BLOCK), abs=0.15)
    for slot in range(4):
        room.appear(slot, 1, tokens=1e9, incarnation=1)
    index.follow(2000.0)
    assert index.forgotten() == 0.0


def test_what_engines_have_dropped_meanwhile_is_not_forgotten() -> None:
    index = Room(pods=1, tokens=64_000.0).view(0, max_blocks=400)  # of the 1000 that the pod holds
    for number in range(200):
        for turns in (1, 2):
            index.remember(chain(*((f"{number} {turn}", 10) for turn in range(turns))), 0, float(number))
            assert index.forgotten() <= 1 - index.held_tokens(0) / 64_000 + 1e-9
    assert index.forgotten() > 0.2
    for number in range(1000):
        index.remember(chain((f"once {number}", 10)), 0, 1000.0 + number)
    assert index.forgotten() < 0.01


def test_a_process_without_a_row_keeps_a_view_of_its_own() -> None:
    room = Room()
    index = room.view(None)
    index.remember(chain(("a", 5)), 1, 1.0)
    assert matched(index, chain(("a", 5))) == [0, 5, 0, 0]
    assert matched(room.view(0), chain(("a", 5))) == [0, 0, 0, 0]


def check(index: PrefixIndex) -> None:
    """Everything the view believes about itself."""
    runs = set(index._runs.values())
    assert index.blocks == sum(run.blocks for run in runs)
    pairs = 0
    for slot, order in enumerate(index._orders):
        assert index.held_bytes(slot) == sum(run.blocks * run.block_bytes for run in order)
        assert index.held_tokens(slot) <= index.room_tokens(slot)
        pairs += len(order)
        place = {run: i for i, run in enumerate(order)}
        for run in order:
            assert run in runs
            assert run.holders >> slot & 1
            if run.parent is not None:
                assert run.parent.start + run.parent.blocks == run.start
                assert place[run.parent] > place[run]  # so that the oldest is always a leaf
    assert index.pairs == pairs == sum(run.holders.bit_count() for run in runs)


def equal_letters(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


words = st.lists(st.integers(0, 2), min_size=1, max_size=12)
steps = st.lists(st.tuples(st.sampled_from("rrrrrf"), words, st.integers(0, 2)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(4, 40), st.sampled_from([8, 24, 1 << 20]))
def test_no_pod_is_ever_said_to_hold_what_it_was_not_sent(
    steps: list[tuple[str, list[int], int]], room: int, most: int
) -> None:
    """Against a plain model: the prompts each pod was sent in this life."""
    tables = Room(pods=3, tokens=room * TOKENS_PER_BLOCK)
    index, follower = tables.view(0, max_blocks=most), tables.view(1)
    sent: list[list[list[int]]] = [[], [], []]
    lives = [0, 0, 0]
    for number, (kind, word, slot) in enumerate(steps):
        prompt = chain(*((f"w{letter}", 1) for letter in word))
        if kind == "f":
            lives[slot] += 1
            tables.appear(slot, 1, room * TOKENS_PER_BLOCK, lives[slot])
            sent[slot] = []
            index.follow(float(number))
        else:
            index.remember(prompt, slot, float(number))
            sent[slot].append(word)
        check(index)
        follower.follow(float(number))
        for view in (index, follower):
            claims = matched(view, prompt, pods=3)
            for pod, claim in enumerate(claims):
                truth = max((equal_letters(word, other) for other in sent[pod]), default=0)
                assert claim <= truth
                large = view is follower or most == 1 << 20
                if large and sum(len(other) for other in sent[pod]) <= room:
                    assert claim == truth  # nothing had to go
    check(follower)


WORKERS = 8
RESTARTS = 4  # of every pod
DECISIONS = 60  # of all workers together between two restarts, at least
OWN_DECISIONS = 200  # of each worker, at least


def work(pods_fd: int, writer: int, made: MutableSequence[int], done: Event, pipe: Connection) -> None:
    """Route random prompts by the view until the pods restart no more. Prompts name the pod they go to, so that a
    claim of another pod is wrong; what was sent before a restart must not be believed after."""
    segment = Segment.attach(pods_fd)
    pods = PodTable(segment.region("pods"), 8)
    log = PrefixLog(segment.region("log"), WORKERS, 64 << 10, writer)
    index = PrefixIndex(log, pods, max_blocks=4000)
    rng = random.Random(writer)
    slots = SlotIndex(range(8))
    wrong = over = decisions = hits = 0
    while not done.is_set() or decisions < OWN_DECISIONS:
        slot = rng.randrange(8)
        index.follow(time.monotonic())
        life = index._tags[slot] & 0xFFFFFFFF
        prompt = chain((f"pod{slot}life{life}", 2), (f"user{rng.randrange(30)}", rng.randrange(1, 6)))
        blocks = index.match(prompt, slots.mask).blocks(slots)
        decisions += 1
        made[writer] = decisions
        hits += blocks[slot] > 2
        wrong += sum(blocks) != blocks[slot]
        over += any(index.held_tokens(s) > index.room_tokens(s) for s in range(8)) or index.blocks > 4000
        index.remember(prompt, slot, time.monotonic())
    index.follow(time.monotonic(), limit=1 << 30)
    index.follow(time.monotonic(), limit=1 << 30)
    # Everybody must believe the last life only.
    late = 0
    for slot in range(8):
        life = index._tags[slot] & 0xFFFFFFFF
        for earlier in range(life):
            for user in range(30):
                prompt = chain((f"pod{slot}life{earlier}", 2), (f"user{user}", 5))
                late += any(index.match(prompt, slots.mask).blocks(slots))
    check(index)
    pipe.send((wrong, over, late, hits))


def test_eight_processes_agree_on_who_holds_what_while_pods_restart() -> None:
    segment = Segment.create({"pods": PodTable.size(8), "log": PrefixLog.size(WORKERS, 64 << 10)})
    room = Room(pods=0)
    room.pods = PodTable(segment.region("pods"), 8)
    for slot in range(8):
        room.appear(slot, 1, 60 * TOKENS_PER_BLOCK)
    context = get_context("fork")
    made, done = context.RawArray("q", WORKERS), context.Event()
    pipes, processes = [], []
    for writer in range(WORKERS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(segment.fd, writer, made, done, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    end = time.monotonic() + 60.0
    for life in range(1, RESTARTS + 1):
        for slot in range(8):
            enough = sum(made) + DECISIONS
            time.sleep(0.05)
            while sum(made) < enough and time.monotonic() < end:
                time.sleep(0.005)
            room.appear(slot, 1, 60 * TOKENS_PER_BLOCK, life)
    done.set()
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [result[:3] for result in results] == [(0, 0, 0)] * WORKERS
    assert all(hits > 5 for *_, hits in results)


def test_what_an_answer_saves_is_never_worth_more_than_what_is_left() -> None:
    """One pod holds a whole prompt that is in demand, another has only answered its first half."""
    index = Room().view()
    half, whole = chain(("system", 8)), chain(("system", 8), ("more", 8))
    for _ in range(20):
        index.remember(whole, 0, 1.0)
    index.remember(half, 1, 1.0)
    slots = SlotIndex(range(4))
    for answer in (3, 8):
        found = LookUp(whole, index.match(whole, slots.mask, answer), slots, 1024.0, 4096)
        uncached, scarce, others = found.uncached_and_scarce(index, 1.0)
        shares = [(uncached, scarce)] * 4
        for places, u, c in others:
            for place in places:
                shares[place] = (u, c)
        assert all(0 <= c <= u for u, c in shares)
        assert shares[0] == (1.0, 0.0)
        assert shares[1][1] >= shares[0][1]
