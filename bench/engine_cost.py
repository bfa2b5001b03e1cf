"""What the engine model costs: `python -m bench.engine_cost [--requests 12000] [--engines 8] [--block-tokens 512]`.

Conversations in the proportions of Mooncake's conversation trace (12,000 prompt tokens of which some 40 % are shared
with earlier turns, 340 answer tokens), sent round robin at a rate that keeps the engines near saturation.
"""

import heapq
import random
from time import process_time

import click

from bench.engine import Engine, EngineParams, EngineRequest


@click.command()
@click.option("--requests", default=12_000)
@click.option("--engines", default=8)
@click.option("--block-tokens", default=512)
@click.option("--rate", default=5.0, help="Requests per second, all engines together.")
@click.option("--kv-tokens", default=400_000, help="KV cache of one engine.")
@click.option("--step-by-step", is_flag=True, help="Without runs, for comparison.")
def main(requests: int, engines: int, block_tokens: int, rate: float, kv_tokens: int, step_by_step: bool) -> None:
    rng = random.Random(1)
    params = EngineParams(
        step_seconds=0.008,
        prefill_token_seconds=1 / 14000,
        decode_request_seconds=0.00006,
        kv_token_seconds=2.2e-8,
        num_blocks=kv_tokens // block_tokens,
        block_tokens=block_tokens,
    )
    fleet = [Engine(params, step_by_step=step_by_step) for _ in range(engines)]
    sessions: list[list[int]] = []
    fresh = 0
    now = spent = 0.0
    wakes: list[tuple[float, int]] = []  # one pending wake per engine, as the newest in `planned` says
    planned: list[float | None] = [None] * engines
    done: list[EngineRequest] = []
    events = 0

    def run_until(until: float) -> None:
        nonlocal events
        while wakes and wakes[0][0] <= until:
            at, i = heapq.heappop(wakes)
            if planned[i] != at:
                continue
            happened = fleet[i].advance(at)
            events += 1
            done.extend(e.request for e in happened if e.request.finished >= 0)
            plan(i)

    def plan(i: int) -> None:
        at = planned[i] = fleet[i].next_event()
        if at is not None:
            heapq.heappush(wakes, (at, i))

    began = process_time()
    for k in range(requests):
        now += rng.expovariate(rate)
        if sessions and rng.random() < 0.55:
            hashes = sessions[rng.randrange(max(0, len(sessions) - 50), len(sessions))]
        else:
            hashes = []
        length = min(110_000, max(100, int(rng.lognormvariate(8.9, 1.0)), len(hashes) * block_tokens + 200))
        grown = length // block_tokens - len(hashes)
        hashes = [*hashes, *range(fresh, fresh + grown)]
        fresh += grown
        sessions.append(hashes)
        request = EngineRequest(length, min(2000, 1 + int(rng.expovariate(1 / 340))), hashes)
        engine = k % engines
        started = process_time()
        run_until(now)
        fleet[engine].submit(request, now)
        plan(engine)
        spent += process_time() - started
    started = process_time()
    run_until(float("inf"))
    spent += process_time() - started
    stats = [engine.stats for engine in fleet]
    finished = {id(r): r for r in done}.values()
    steps = sum(s.steps for s in stats)
    prompt = sum(s.prefix_queries_tokens for s in stats)
    print(
        f"{len(finished)} requests, {prompt / requests:.0f} prompt tokens each,"
        f" hits {sum(s.prefix_hits_tokens for s in stats) / prompt:.2f},"
        f" mean TTFT {sum(r.ttft_seconds for r in finished) / len(finished):.3f} s,"
        f" preemptions {sum(s.preemptions for s in stats)}"
    )
    print(
        f"{spent:.2f} CPU seconds in the engines ({process_time() - began:.2f} in all): {spent / requests * 1e6:.0f} µs"
        f" a request, {steps} steps in {events} events, {spent / steps * 1e6:.2f} µs a step"
    )


if __name__ == "__main__":
    main()
