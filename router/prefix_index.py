"""Which pods hold which prefixes: one process's view of the prefix log.

The view is a radix tree of *runs*. A run is a piece of one or more prompts, consecutive blocks that the same pods
hold; it stores the block hashes packed, 8 bytes a block, and one bitmap of pods. Since a hash stands for the whole text
before it, a run is found by the hash of its first block alone, and comparing a prompt with a run is one comparison
of memory, however long. A look-up takes as many steps as the prompt has runs (turns of a conversation, say) and gives
the matched length for every pod at once: a pod holds a run only if it holds all runs before it.

Each pod has an order of use over its runs. Whoever uses a run uses all runs before it, and those are moved to the end
after it, so that the least recently used run of a pod never has another one of the same pod behind it and can be
dropped by itself: the order in which engines free blocks, tails first. Runs are dropped
- when the pod's runs hold more than the engine's KV cache (`num_gpu_blocks` times `block_size`),
- when they were not used for `ttl_seconds`,
- all of a pod's when its row belongs to another pod, or its engine has restarted,
- the oldest of the fullest pod, when the view is full: `max_blocks` blocks, and an eighth as many (pod, run) pairs.
  Those that many prompts branched off from are spared once. What is dropped so, its pod still holds: `forgotten` says
  how much there is of that.
So at 1 M blocks a view has 131,072 pairs at most, whatever the traffic. It then takes 14 MB where prompts bring 64 new
blocks each, 30 MB with 16, and 60 MB at most (`python -m bench.decision_cost --memory`).

Cost: 2 to 3 µs to look a prompt up and 4 to 6 µs to remember one, of 2 or 220 KB; 0.2 µs when nobody has written
anything since the last time, 3 µs per record when somebody has.
"""

from collections import OrderedDict, deque
from math import exp, inf
from typing import Final

import numpy as np

from router.cache_turnover import TAIL, Turnover
from router.prefix_hash import NOMINAL_BYTES_PER_TOKEN, Chain
from router.prefix_match import Match, Run, close_group, common_blocks, faded
from state.pods import COLUMN, PodTable
from state.prefix_log import ROUTED, LogReader, PrefixLog, pod_tag

_INCARNATION: Final = COLUMN["incarnation"]
_NUM_BLOCKS: Final = COLUMN["num_gpu_blocks"]
_BLOCK_SIZE: Final = COLUMN["block_size"]

RECORDS_PER_DRAIN: Final = 512
"""Bounds the pause before one decision to about 2 ms. Only a process that starts has more to catch up with."""
MAX_HEARD: Final = 256
BLOCKS_PER_PAIR: Final = 8
MAX_SPARED: Final = 256
"""Runs, each time that room is made."""


class PrefixIndex:
    """The view. `follow` before a decision, `match` for it, `remember` after it."""

    def __init__(
        self,
        log: PrefixLog,
        pods: PodTable,
        *,
        max_blocks: int = 1 << 20,
        ttl_seconds: float = 1200.0,
        default_pod_tokens: float = 500_000.0,
        bytes_per_token: float = NOMINAL_BYTES_PER_TOKEN,
    ) -> None:
        self._log = log
        self._reader = LogReader(log, own=log.writer)
        self._pods = pods
        self._epoch = -1
        self._max_blocks = max_blocks
        self._max_pairs = max(max_blocks // BLOCKS_PER_PAIR, 1)
        self._ttl = ttl_seconds
        self._default_tokens = default_pod_tokens
        self._bytes_per_token = bytes_per_token
        self._runs: dict[bytes, Run] = {}  # by the hash of the first block, packed
        self._orders: list[OrderedDict[Run, float]] = []
        self._turnovers: list[Turnover] = []
        self.recompute_per_token: list[float] = []
        """By row of the pod: tokens that must be computed again for each one that is computed there."""
        self._used: list[int] = []
        self._room: list[float] = []  # tokens
        self._forgotten: list[float] = []  # bytes
        self._overfull = False
        self._rows = b""
        self._tags: list[int] = []
        self._swept = 0
        self._sweep_at = 0.0
        self._uses = 0.0
        self._used_at = 0.0
        self._prompts = self._unfound = 0.0
        """Of the uses, those by prompts of a block and more, and of these those of which no pod held anything."""
        self.heard: deque[tuple[int, int, int, float]] = deque(maxlen=MAX_HEARD)
        """What other processes of this replica have routed, the newest last: the row of the pod, the bytes of the
        prompt, how many of them are new to the pod, and when."""
        self.heard_count = 0
        """How much was ever heard."""
        self.blocks = 0
        """Distinct blocks in the view."""
        self.pairs = 0
        """(pod, run) pairs in the view."""

    @property
    def runs(self) -> int:
        """Runs in the view."""
        return len(self._runs)

    @property
    def lost_bytes(self) -> int:
        """Bytes of the log that were overwritten before this process read them."""
        return self._reader.lost_bytes

    def held_bytes(self, slot: int) -> int:
        """Bytes of text that the view believes to be in the cache of the pod in row `slot`."""
        return self._used[slot] if slot < len(self._used) else 0

    def held_tokens(self, slot: int) -> float:
        """The same in tokens."""
        return self.held_bytes(slot) / self._bytes_per_token

    def room_tokens(self, slot: int) -> float:
        """Tokens that the pod's KV cache holds."""
        return self._room[slot] if slot < len(self._room) else 0.0

    @property
    def bytes_per_token(self) -> float:
        """What the view takes for the text bytes in a token."""
        return self._bytes_per_token

    def follow(self, now: float, limit: int = RECORDS_PER_DRAIN) -> None:
        """Take in what changed: pods that went or restarted, and what other processes have routed."""
        if self._pods.epoch != self._epoch:
            self._refresh()
        if self._reader.news():
            tags = self._tags
            for slot, pod, at, block_bytes, hashes, kind in self._reader.records(limit):
                known = slot < len(tags) and pod == tags[slot]
                if not known and self._pods.epoch != self._epoch:
                    self._refresh()
                    known = slot < len(tags) and pod == tags[slot]
                if known:
                    new = self._note(slot, hashes, block_bytes, at)
                    if kind == ROUTED:
                        self.heard.append((slot, (len(hashes) >> 3) * block_bytes, new, at))
                        self.heard_count += 1
        if now >= self._sweep_at:
            self._sweep(now)

    def match(self, chain: Chain, mask: int, answer_blocks: int = 0) -> Match:
        """How much of the prompt each pod of the bitmap `mask` holds. Where a prompt goes on after the end of one that
        a pod has answered, its next `answer_blocks` blocks are taken to be that answer, which the pod holds as well."""
        answers: dict[int, int] = {}
        answered = 0
        groups: list[tuple[int, int]] = []
        runs: list[tuple[int, Run]] = []
        packed = chain.packed
        n = len(packed) >> 3
        place = 0
        left = mask
        while place < n:
            run = self._runs.get(packed[place << 3 : (place + 1) << 3])
            if run is None or run.start != place:
                break
            holding = left & run.holders
            if holding != left:
                if place:
                    close_group(groups, answers, place, left ^ holding, answered, min(answer_blocks, n - place))
                left = holding
                if not left:
                    break
            if packed[place << 3 : (place + run.blocks) << 3] == run.hashes:
                place += run.blocks
                answered = run.answered
                runs.append((place, run))
            else:
                answered = 0
                place += common_blocks(run.hashes, packed, place)
                runs.append((place, run))
                break
        if left and place:
            close_group(groups, answers, place, left, answered, min(answer_blocks, n - place))
        return Match(chain, groups, runs, answers)

    def found_beyond(self, run: Run | None) -> float:
        """Of the prompts of late that went on beyond this run, the share of which some pod held more; of all prompts,
        the share of which some pod held anything, where there is no run or nothing has gone on beyond it."""
        if run is not None and run.passed > 0.0:
            return max(1.0 - run.branched / run.passed, 0.0)
        return max(1.0 - self._unfound / self._prompts, 0.0) if self._prompts else 0.0

    def forgotten(self) -> float:
        """Of what pods hold, the share for which the view had no room. Only what prompts went on from counts: the last
        turn of a conversation that is over will not be asked for."""
        if not self._overfull:
            return 0.0
        size = sum(self._forgotten)
        return size / max(size + sum(self._used), 1.0)

    def recent_prompts(self, now: float) -> float:
        """How many prompts were routed of late, at least 1: a run's share of them is the demand for it."""
        return max(faded(self._uses, self._used_at, now), 1.0)

    def remember(self, chain: Chain, slot: int, now: float) -> None:
        """The prompt goes to the pod in row `slot`: tell everybody."""
        if slot >= len(self._tags):
            self._refresh()
            if slot >= len(self._tags):
                return
        packed = chain.packed
        if self._log.writer is not None:
            self._log.append(slot, self._tags[slot], now, chain.block_bytes, packed)
        self._note(slot, packed, chain.block_bytes, now)

    def forget(self, slot: int) -> None:
        """Drop everything the view believes of a pod."""
        if slot < len(self._orders):
            order = self._orders[slot]
            while order:
                self._drop(slot, order.popitem(last=False)[0])
            self._forgotten[slot] = 0.0

    def _refresh(self) -> None:
        """Follow the pod rows: who has each, since when, and how many tokens its cache holds."""
        self._epoch, values = self._pods.snapshot()
        high = len(values)
        rows = np.empty((3, high))
        rows[0] = self._pods.generation[:high]
        rows[1] = values[:, _INCARNATION]
        np.multiply(values[:, _NUM_BLOCKS], values[:, _BLOCK_SIZE], out=rows[2])
        if rows.tobytes() == self._rows:
            return
        self._rows = rows.tobytes()
        while len(self._tags) < high:
            self._tags.append(0)
            self._used.append(0)
            self._room.append(0.0)
            self._forgotten.append(0.0)
            self.recompute_per_token.append(0.0)
            self._orders.append(OrderedDict())
            self._turnovers.append(Turnover())
        for slot, (generation, incarnation, tokens) in enumerate(rows.T.tolist()):
            tag = pod_tag(int(generation), int(incarnation)) if generation else 0
            known = self._tags[slot]
            # A lower incarnation of the same pod is a row that could not be read: its writer died inside it.
            if tag != known and not (tag < known and tag >> 32 == known >> 32):
                self.forget(slot)
                self._tags[slot] = tag
                self._turnovers[slot] = Turnover()
                self.recompute_per_token[slot] = 0.0
            self._room[slot] = tokens if tokens > 0 else self._default_tokens

    def _note(self, slot: int, packed: bytes, block_bytes: int, at: float) -> int:
        """Enter that the pod in row `slot` was sent this prompt. Returns how many bytes of it the pod did not hold."""
        runs, bit = self._runs, 1 << slot
        order = self._orders[slot]
        used = self._used[slot]
        size = len(packed)
        byte = 0
        parent: Run | None = None
        path: list[Run] = []
        new: Run | None = None
        run: Run | None
        while byte < size:
            place = byte >> 3
            key = packed[byte : byte + 8]
            run = runs.get(key)
            if run is None:
                new = parent = runs[key] = Run(key, parent, place, packed[byte:] if byte else packed, block_bytes)
                new.used_at, new.uses, new.holders = at, 1.0, bit
                new.before, new.born = faded(self._uses, self._used_at, at), at
                self.blocks += new.blocks
                self._used[slot] += new.blocks * block_bytes
                self.pairs += 1
                order[new] = at
                break
            if run.start != place or run.parent is not parent:
                break  # another text with the same hash: believe nothing from here on
            elif packed[byte : byte + len(run.hashes)] == run.hashes:
                byte += len(run.hashes)
            elif run.holders & bit and run.hashes.startswith(packed[byte:]):
                byte = size  # used in part: no reason to cut it
            else:
                common = common_blocks(run.hashes, packed, place)
                run = self._split(run, common)
                byte += common << 3
            if not run.holders & bit:
                run.holders |= bit
                self._used[slot] += run.blocks * block_bytes
                self.pairs += 1
            elif run.answered:
                run.answered &= ~bit
            path.append(run)
            parent = run
        if parent is not None and (parent is new or (byte == size and (parent.start + parent.blocks) << 3 == size)):
            parent.answered |= bit
        more = self._used[slot] - used
        if self._overfull:
            room = self._room[slot] * self._bytes_per_token
            left = self._forgotten[slot] * exp(-more / room)  # the engine drops it in its turn
            self._forgotten[slot] = min(left, max(room - self._used[slot], 0.0))
        turnover = self._turnovers[slot]
        if turnover.stay < inf:
            again, before = 0, at - TAIL * turnover.stay
            for run in path:
                if order.get(run, at) < before:
                    again += run.blocks
            self.recompute_per_token[slot] = turnover.add(more, again * block_bytes)
        self._touch(order, path, at, new is not None)
        if size:
            self._prompts += 1.0
            if new is not None and not path:
                self._unfound += 1.0
        self._evict_beyond_room(slot, order, at)
        if self.blocks > self._max_blocks or self.pairs > self._max_pairs:
            self._make_room()
        return more

    def _touch(self, order: "OrderedDict[Run, float]", path: list[Run], at: float, branched: bool) -> None:
        """These runs were used: the last ones go to the end of the pod's order first, and all count as demand.
        `branched`: by a prompt that goes on with what nobody held."""
        passed = 1.0 if branched else 0.0
        late = at < self._used_at  # told by another replica, perhaps long after
        for run in reversed(path):
            order[run] = at if not late else max(at, order.get(run, at))
            order.move_to_end(run)
            since = run.used_at
            if since < at:
                run.used_at = at
                left = faded(1.0, since, at)
                run.uses = run.uses * left + 1.0
                run.passed *= left
                run.branched *= left
            else:
                run.uses += 1.0
            run.passed += passed
            passed = 1.0
        if branched and path:
            last = path[-1]
            last.shared = last.shared or last.branched > 0.0
            last.branched += 1.0
        since = self._used_at
        if since < at:
            self._used_at = at
            left = faded(1.0, since, at)
            self._uses = self._uses * left + 1.0
            self._prompts *= left
            self._unfound *= left
        else:
            self._uses += 1.0

    def _evict_beyond_room(self, slot: int, order: "OrderedDict[Run, float]", at: float) -> None:
        """Bring the pod back to what its KV cache holds."""
        while self._used[slot] > self._room[slot] * self._bytes_per_token and order:
            self._drop_or_cut(slot, order, at)

    def _split(self, run: Run, blocks: int) -> Run:
        """Cut a run after its first `blocks` blocks. Returns the new head; the tail keeps the identity, since what
        comes after it refers to it."""
        head = Run(run.key, run.parent, run.start, run.hashes[: blocks << 3], run.block_bytes)
        head.holders = run.holders
        head.uses = run.uses
        head.passed, head.branched = run.uses, min(run.uses, 1.0)
        head.used_at = run.used_at
        head.before, head.born = run.before, run.born
        run.hashes = run.hashes[blocks << 3 :]
        run.blocks -= blocks
        run.start += blocks
        run.parent = head
        run.key = run.hashes[:8]
        self._runs[head.key] = head
        self._runs[run.key] = run
        holders = run.holders
        while holders:
            low = holders & -holders
            holders ^= low
            order = self._orders[low.bit_length() - 1]
            at = order[run]
            self.pairs += 1
            ancestor: Run | None = head
            while ancestor is not None:
                order.setdefault(ancestor, at)
                order.move_to_end(ancestor)
                ancestor = ancestor.parent
        return head

    def _drop_or_cut(self, slot: int, order: "OrderedDict[Run, float]", now: float) -> None:
        """Bring a pod back to what it can hold: drop its least recently used run, or of a run that it alone holds
        only as much of the tail as is too much."""
        run, at = order.popitem(last=False)
        turnover = self._turnovers[slot]
        turnover.drop(now - at, self._room[slot] * self._bytes_per_token)
        over = self._used[slot] - self._room[slot] * self._bytes_per_token
        blocks = -int(-over // run.block_bytes)
        if blocks >= run.blocks or run.holders != 1 << slot:
            self._drop(slot, run)
            return
        self._used[slot] -= blocks * run.block_bytes
        self.blocks -= blocks
        run.blocks -= blocks
        run.answered = 0
        run.hashes = run.hashes[: run.blocks << 3]
        order[run] = at
        order.move_to_end(run, last=False)

    def _drop(self, slot: int, run: Run) -> None:
        """The pod no longer holds a run, which has left its order of use."""
        run.holders &= ~(1 << slot)
        run.answered &= ~(1 << slot)
        self._used[slot] -= run.blocks * run.block_bytes
        self.pairs -= 1
        if not run.holders:
            del self._runs[run.key]
            self.blocks -= run.blocks

    def _make_room(self) -> None:
        """The view is full: take a hundredth from the pods that have most in it, the least recently used first, but
        what is shared only the second time (CLOCK)."""
        blocks = self._max_blocks - self._max_blocks // 100
        pairs = self._max_pairs - self._max_pairs // 100
        orders, used = self._orders, self._used
        spared = 0
        while self.blocks > blocks or self.pairs > pairs:
            if self.pairs > pairs:
                slot = max(range(len(orders)), key=lambda slot: len(orders[slot]))
            else:
                slot = used.index(max(used))
            order = orders[slot]
            for _ in range(min(16, len(order))):
                run = next(iter(order))
                if run.shared and spared < MAX_SPARED:
                    spared += 1
                    run.shared = False
                    spare: Run | None = run
                    while spare is not None:
                        order.move_to_end(spare)
                        spare = spare.parent
                    continue
                del order[run]
                if run.passed > 0.0:
                    self._forgotten[slot] += run.blocks * run.block_bytes
                    self._overfull = True
                self._drop(slot, run)

    def _sweep(self, now: float) -> None:
        """Drop what one pod, in turn, has not used for long."""
        self._sweep_at = now + 0.05
        orders = self._orders
        if not orders:
            return
        self._swept = slot = (self._swept + 1) % len(orders)
        order = orders[slot]
        oldest = now - self._ttl
        for _ in range(16):
            if not order:
                return
            run = next(iter(order))
            if order[run] > oldest:
                return
            del order[run]
            self._drop(slot, run)
