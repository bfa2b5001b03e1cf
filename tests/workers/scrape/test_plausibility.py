"""What cannot be true of one pod must not decide about the others."""

from collections import Counter, deque
from random import Random

import pytest
from fleet import make_fleet, set_row

from router.prefixes import Prefixes
from router.replies import Destination
from router.request import RoutingRequest
from router.scheduler import Decision, Scheduler
from router.strategies import Context
from state.pods import FIELDS
from workers.scrape.engines import VLLM
from workers.scrape.page import KnownLines, PageReader
from workers.scrape.plausibility import bounds
from workers.scrape.window import Window

PODS = 4
ODD = PODS - 1


def page(seconds: float, changes: dict[str, str]) -> bytes:
    """A pod that does two requests a second, of 500 tokens in and 100 out."""
    numbers = {
        "num_requests_running": 3.0,
        "num_requests_waiting": 0.0,
        "kv_cache_usage_perc": 0.3,
        "prompt_tokens_total": 1000 * seconds,
        "generation_tokens_total": 200 * seconds,
        "request_success_total": 2 * seconds,
        "iteration_tokens_total_sum": 1200 * seconds,
        "iteration_tokens_total_count": 40 * seconds,
        "request_generation_tokens_sum": 200 * seconds,
        "request_generation_tokens_count": 2 * seconds,
        "inter_token_latency_seconds_sum": 4 * seconds,
        "inter_token_latency_seconds_count": 200 * seconds,
    }
    said = {name: repr(number) for name, number in numbers.items()} | changes
    return "".join(f"vllm:{name} {number}\n" for name, number in said.items()).encode()


def routed(changes: dict[str, str]) -> list[int]:
    """Requests by pod, after a while in which the last pod's page had these changes."""
    tables = make_fleet(PODS)
    now = 1000.0
    scheduler = Scheduler(tables, "marginal-delay", lambda: now, Context(Random(1), prefixes=Prefixes.of(tables)))
    readers = [(PageReader(KnownLines(VLLM)), Window()) for _ in range(PODS)]
    running: deque[Decision] = deque()
    picks: Counter[int] = Counter()
    for number in range(200):
        now += 0.1
        if number % 5 == 0:
            for slot, (reader, window) in enumerate(readers):
                sample = reader.read(page(now - 900.0, changes if slot == ODD else {}))
                state = window.add(now, sample)._asdict()
                set_row(tables, slot, sampled_at=now, **{name: state[name] for name in FIELDS if name in state})
        request = RoutingRequest("llama", 500, text=b"prompt %d " % number * 200)
        decision = scheduler.decide(request, "marginal-delay", destination=Destination.HEADER, held=True, duplex=False)
        picks[decision.pod.slot] += 1
        running.append(decision)
        if len(running) > 12:
            scheduler.release(running.popleft())
    return [picks[slot] for slot in range(PODS)]


@pytest.mark.parametrize("number", ["+Inf", "1e300", "-Inf"])
@pytest.mark.parametrize(
    "name",
    [
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "generation_tokens_total",
        "iteration_tokens_total_count",
        "request_generation_tokens_sum",
        "inter_token_latency_seconds_sum",
    ],
)
def test_one_pods_absurd_metric_does_not_steer_the_model(name: str, number: str) -> None:
    assert max(routed({name: number})) <= 80  # of 200 over four pods


def test_a_bound_goes_by_what_the_number_is() -> None:
    assert bounds(["waiting", "prompt_tokens_per_second", "e2e_p99_seconds", "prompt_tokens"]) == (
        100_000.0, 1e7, 86_400.0, 2.0**53,
    )  # fmt: skip
