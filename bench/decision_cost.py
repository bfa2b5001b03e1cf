"""What a decision costs: CPU µs of hashing, looking up, scoring, and entering the choice.

    python -m bench.decision_cost [--strategy marginal-delay] [--prompts 0.5,2,16,220] [--pods 8,64,256] [--json]
    python -m bench.decision_cost --memory

One process with the real tables. The first 70 % of all prompts are the same, the rest of each is new. Each figure is
the best of many short rounds, so that what else the machine does shows least; `whole` is a request from its text to the
charged ledger and is measured by itself, not added up. `hash_new` is what hashing costs where nothing of the prompt was
met before, `poll` what the first decision after a poll of any pod pays more.

Bars: 2 KB, 64 pods: 30 µs; 220 KB, 64 pods: 600 µs.
"""

import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import orjson

from router.fleet import Candidates, Fleet
from router.prefix_hash import PrefixHasher
from router.prefix_index import PrefixIndex
from router.prefixes import Prefixes
from router.request import RoutingRequest
from router.strategies import STRATEGIES, Context
from state.catalog import CatalogDocument, PodRecord
from state.pods import COLUMN, Health
from state.prefix_log import LogReader, PrefixLog, Routed, pod_tag
from state.tables import FIRST_WORKER, Capacity, Tables

WARM_UP = 400
CALLS = 20
SHARED = 0.7


class Setting:
    """A fleet of `pods` pods with metrics, eight workers' rows in use, and the parts of one worker."""

    def __init__(self, pods: int, strategy: str) -> None:
        self.tables = Tables.create(Capacity(), FIRST_WORKER)
        for worker in range(8):
            self.tables.ledger.admit(FIRST_WORKER + worker)
        for slot in range(pods):
            self.tables.pods.claim(slot, slot + 1)
            self.poll(slot, 1.0)
        self.tables.catalog.publish(
            CatalogDocument(
                tuple(PodRecord(slot, slot + 1, f"pod-{slot}", f"10.0.0.1:{slot + 1}", ("m",)) for slot in range(pods))
            )
        )
        self.fleet = Fleet(self.tables)
        self.prefixes = Prefixes.of(self.tables, seed=1)
        self.context = Context(random.Random(1), prefixes=self.prefixes, user_tokens=self.tables.user_tokens)
        self.strategy = STRATEGIES[strategy](self.context)
        self.now = 2.0

    def poll(self, slot: int, now: float) -> None:
        """Publish a sample of a pod."""
        row = self.tables.pods.row(slot)
        for name, value in {
            "health": Health.READY,
            "sampled_at": now,
            "running": 10.0,
            "waiting": 0.0,
            "kv_usage": 0.3,
            "num_gpu_blocks": 32_768.0,
            "block_size": 16.0,
            "busy_ratio": 0.8,
            "computed_prompt_tokens_per_second": 2000.0,
            "generation_tokens_per_second": 500.0,
            "requests_per_second": 3.0,
            "observed_age_seconds": 0.1,
            "itl_mean_seconds": 0.015,
            "prefill_mean_seconds": 0.1,
            "prompt_tokens_mean": 2000.0,
            "generation_tokens_mean": 200.0,
        }.items():
            row[COLUMN[name]] = value
        self.tables.pods.write(slot, row)

    def tick(self) -> float:
        """The time of the next decision: 5,000 a second."""
        self.now += 0.0002
        return self.now

    def candidates(self) -> Candidates:
        """The pods."""
        found = self.fleet.candidates("m")
        assert found is not None
        return found


def microseconds(
    step: Callable[[], Any], rounds: int, calls: int = CALLS, before: Callable[[], Any] | None = None
) -> float:
    """CPU time of one call: the best round. `before` is called before each round."""
    best = float("inf")
    for _ in range(rounds):
        if before is not None:
            before()
        started = time.thread_time_ns()
        for _ in range(calls):
            step()
        best = min(best, time.thread_time_ns() - started)
    return best / calls / 1000


def measure(kilobytes: float, pods: int, strategy: str, rounds: int) -> dict[str, float]:
    """All figures for one prompt size and fleet."""
    setting = Setting(pods, strategy)
    rng = random.Random(1)
    size = int(kilobytes * 1024)
    head = rng.randbytes(int(size * SHARED))
    noise = rng.randbytes(size + 1_000_003)
    tokens = size // 4
    turn = 0
    texts: list[bytes] = []

    def write() -> None:
        texts.clear()
        for number in range(turn, turn + CALLS):
            start = number * 7919 % 1_000_003
            texts.append(head + noise[start : start + size - len(head)])

    def request() -> RoutingRequest:
        nonlocal turn
        turn += 1
        return RoutingRequest("m", text=texts[turn % CALLS], prompt_tokens=tokens)

    def whole() -> None:
        now = setting.tick()
        candidates = setting.candidates()
        made = request()
        index = setting.strategy.pick(made, candidates, now)
        setting.strategy.chosen(made, candidates, index, now)
        slot = candidates.pods[index].slot
        uncached = made.uncached_tokens if made.uncached_tokens >= 0 else tokens
        charge = setting.tables.ledger.charge(slot, tokens, uncached, held=False)
        if turn > 4 * pods:
            setting.tables.ledger.release(charge, held=False)

    for number in range(WARM_UP):
        if number % CALLS == 0:
            write()
        whole()
    candidates, prefixes = setting.candidates(), setting.prefixes
    known = request()
    found = prefixes.look_up(known, candidates, setting.now)
    block_bytes, slots = found.chain.block_bytes, found.slots
    index = prefixes.index
    hashing = microseconds(lambda: prefixes.hasher.chain(request().text, "m", block_bytes), rounds, before=write)
    forgetful = PrefixHasher(seed=1, keep_blocks=0)
    hashing_new = microseconds(lambda: forgetful.chain(request().text, "m", block_bytes), rounds)

    def look_up() -> None:
        index.follow(setting.tick())
        match = index.match(found.chain, slots.mask)
        match.split(slots)

    def enter() -> None:
        setting.strategy.chosen(known, candidates, turn % pods, setting.now)
        setting.tables.ledger.charge(turn % pods, tokens, 100, held=False)

    looking = microseconds(look_up, rounds)
    picking = microseconds(lambda: setting.strategy.pick(known, candidates, setting.tick()), rounds)
    entering = microseconds(enter, rounds)
    total = microseconds(whole, rounds, before=write)

    def after_poll() -> None:
        setting.poll(turn % pods, setting.now)
        setting.strategy.pick(known, setting.candidates(), setting.tick())

    polling = microseconds(after_poll, rounds, 5) - microseconds(lambda: setting.poll(0, 1.0), rounds, 5) - picking
    return {
        "kilobytes": kilobytes,
        "pods": pods,
        "hash": hashing,
        "hash_new": hashing_new,
        "look_up": looking,
        "pick": picking,
        "enter": entering,
        "whole": total,
        "poll": polling,
    }


def log_costs(rounds: int) -> dict[str, float]:
    """The shared log by itself: append, nothing new, and reading a record (8 and 880 blocks)."""
    tables = Tables.create(Capacity(), FIRST_WORKER)
    log = tables.prefix_log
    reader = LogReader(tables.prefix_log)
    out: dict[str, float] = {}
    for blocks in (8, 880):
        record = Routed(1, pod_tag(1, 0), 1.0, 256, random.Random(1).randbytes(8 * blocks))
        out[f"append_{blocks}"] = microseconds(lambda record=record: log.append(*record), rounds)  # type: ignore[misc]
        reader.read()
        times = []
        for _ in range(rounds // 4):
            for _ in range(50):
                log.append(*record)
            started = time.thread_time_ns()
            reader.read()
            times.append(time.thread_time_ns() - started)
        out[f"read_{blocks}"] = min(times) / 50 / 1000
    out["nothing_new"] = microseconds(reader.news, rounds)
    return out


def memory(blocks: int, per_prompt: int) -> dict[str, float]:
    """Bytes of Python heap for a full view of `blocks` blocks in runs of `per_prompt` new ones, and the time to build
    it from the log."""
    pods = 64
    setting = Setting(pods, "marginal-delay")
    writer = PrefixLog(memoryview(bytearray(PrefixLog.size(1, 64 << 20))), 1, 64 << 20, 0)
    rng = random.Random(1)
    for number in range(blocks // per_prompt):
        slot = number % pods
        writer.append(*Routed(slot, pod_tag(slot + 1, 0), 1.0, 256, rng.randbytes(8 * per_prompt)))
    setting_pods = setting.tables.pods
    tracemalloc.start()
    index = PrefixIndex(PrefixLog(writer.region, 1, 64 << 20), setting_pods, max_blocks=blocks, default_pod_tokens=1e9)
    for slot in range(pods):
        row = setting_pods.row(slot)
        row[COLUMN["num_gpu_blocks"]] = np.nan
        setting_pods.write(slot, row)
    index.follow(1.0, limit=1 << 40)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    index = PrefixIndex(PrefixLog(writer.region, 1, 64 << 20), setting_pods, max_blocks=blocks, default_pod_tokens=1e9)
    started = time.thread_time()
    index.follow(1.0, limit=1 << 40)
    return {
        "blocks_per_prompt": per_prompt,
        "blocks": index.blocks,
        "runs": index.runs,
        "pairs": index.pairs,
        "megabytes": used / 1e6,
        "rebuild_seconds": time.thread_time() - started,
    }


def _numbers(_: click.Context, __: click.Parameter, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: numbers separated by commas, such as 0.5,2,16") from None


def _table(rows: list[dict[str, float]]) -> None:
    print("  ".join(f"{name:>17}" if len(name) > 9 else f"{name:>9}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>17.5g}" if len(name) > 9 else f"{value:>9.4g}" for name, value in row.items()))


@click.command()
@click.option(
    "--strategy", default="marginal-delay", show_default=True, type=click.Choice(sorted(STRATEGIES.keys() - {"pd"}))
)
@click.option("--prompts", default="0.5,2,16,220", show_default=True, callback=_numbers, help="Kilobytes.")
@click.option("--pods", default="8,64,256", show_default=True, callback=_numbers)
@click.option("--rounds", default=100, show_default=True, type=click.IntRange(4, 10_000))
@click.option("--memory", "only_memory", is_flag=True, help="Measure the memory of a full index instead.")
@click.option("--blocks", default=1 << 20, show_default=True, help="Blocks of the index, for --memory.")
@click.option("--json", "as_json", is_flag=True)
def main(
    strategy: str, prompts: list[float], pods: list[float], rounds: int, only_memory: bool, blocks: int, as_json: bool
) -> None:
    """CPU cost of a routing decision, in microseconds."""
    if only_memory:
        rows = [memory(blocks, per_prompt) for per_prompt in (4, 16, 64)]
        print(orjson.dumps({"memory": rows}).decode()) if as_json else _table(rows)
        return
    rows = [measure(size, int(count), strategy, rounds) for count in pods for size in prompts]
    log = log_costs(rounds)
    if as_json:
        print(orjson.dumps({"strategy": strategy, "decisions": rows, "log": log}).decode())
        return
    print(f"{strategy}, µs of CPU")
    _table(rows)
    print("\nprefix log, µs of CPU (the number is that of the blocks)")
    _table([log])


if __name__ == "__main__":
    main()
