"""Replays: schedules worked out by hand, the same again for the same seed, and who sees what when."""

from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from bench.engine import EngineParams
from bench.replay.command import replay
from bench.replay.generators import generate
from bench.replay.report import Slo, report
from bench.replay.simulation import Run, Settings, Simulation
from bench.replay.traces import TraceRequest
from router.strategies import STRATEGIES

PLAIN = EngineParams(
    step_seconds=0.01,
    prefill_token_seconds=0.001,
    decode_request_seconds=0.0,
    kv_token_seconds=0.0,
    num_blocks=1000,
    block_tokens=16,
)
FAST = EngineParams(0.008, 1 / 14000, 0.00006, 2.2e-8, num_blocks=4096, block_tokens=64)
KEYS = [
    *("strategy", "requests", "hit_ratio", "ttft_mean_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms"),
    *("tpot_mean_ms", "e2e_mean_ms", "goodput", "imbalance"),
]


def run(trace: list[TraceRequest], strategy: str = "marginal-delay", params: EngineParams = PLAIN, **more: Any) -> Run:
    return Simulation(trace, strategy, Settings(params, **{"pods": 1, **more})).run()


def milliseconds(result: Run) -> list[tuple[int, int]]:
    """(time to first token, end to end) in the order of their ends."""
    return [(round(o.request.ttft_seconds * 1000), round(o.request.e2e_seconds * 1000)) for o in result.outcomes]


def test_one_prompt_and_the_same_again() -> None:
    """100 tokens take a step of 10 + 100 ms, two further tokens 10 ms each. The second time 6 blocks of 16 are there,
    and 4 tokens are computed."""
    result = run([TraceRequest(0, 100, 3, [1]), TraceRequest(1, 100, 3, [1])])
    assert milliseconds(result) == [(110, 130), (14, 34)]
    figures = report("x", result, Slo(), 1)
    assert figures["hit_ratio"] == 0.48
    assert figures["expected_hit_ratio"] == pytest.approx(0.32)  # by the router's blocks, of 64 tokens
    assert (figures["ttft_mean_ms"], figures["e2e_mean_ms"], figures["tpot_mean_ms"]) == (62, 82, 10)
    assert figures["seconds"] == 1.0
    assert figures["goodput"] == pytest.approx(2 / 1.034, abs=0.001)


def test_a_second_prompt_waits_for_the_step_under_way_unless_it_goes_to_another_pod() -> None:
    """160 ms for the first, then 60 for the second; apart each its own."""
    trace = [TraceRequest(0, 150, 1, [1]), TraceRequest(0, 50, 1, [2])]
    assert milliseconds(run(trace)) == [(160, 160), (220, 220)]
    assert sorted(milliseconds(run(trace, pods=2))) == [(60, 60), (160, 160)]


def test_pods_may_be_of_different_speeds() -> None:
    trace = [TraceRequest(0, 100, 1, [1]), TraceRequest(0, 100, 1, [2])]
    assert milliseconds(run(trace, "round-robin", pods=2, pod_speeds=(1.0, 2.0))) == [(55, 55), (110, 110)]


def test_speed_and_what_waits_for_an_answer() -> None:
    """At speed 2 the second comes at 0.5 s; the third 0.2 s after the first was answered, whatever the speed."""
    trace = [
        TraceRequest(0, 100, 1, [1]),
        TraceRequest(1, 100, 1, [2]),
        TraceRequest(0.2, 100, 1, [3], after=0),
    ]
    result = run(trace, params=PLAIN, speed=2.0)
    arrived = sorted(round(o.request.arrived / 1e9) - 1_000_000 for o in result.outcomes)
    assert arrived == [0, 310, 500]


def test_what_an_engine_cannot_take_is_cut() -> None:
    """16,000 tokens fit."""
    result = run([TraceRequest(0, 20_000, 5, range(40)), TraceRequest(0, 15_999, 9, range(40))])
    assert result.clamped == 2
    assert [(o.request.prompt_tokens, o.request.output_tokens) for o in result.outcomes] == [(15_999, 1)] * 2


def test_a_seed_gives_one_result() -> None:
    trace = generate("multi-turn", 1, 150, 40)
    figures = [report("x", run(trace, params=FAST, pods=4, workers=2, seed=seed), Slo(), 4) for seed in (1, 1, 2)]
    assert figures[0] == figures[1] != figures[2]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - {"pd"}))  # which the command refuses
def test_every_strategy_answers_everything(strategy: str) -> None:
    trace = generate("agents", 1, 60, 20)
    result = run(trace, strategy, FAST, pods=3)
    assert len(result.outcomes) == 60


def hits(**more: Any) -> float:
    """Of 24 equal prompts, half a second apart."""
    trace = [TraceRequest(i * 0.5, 4096, 2, range(8)) for i in range(24)]
    found: float = report("x", run(trace, "prefix-cache", FAST, pods=8, **more), Slo(), 8)["hit_ratio"]
    return found


def test_all_workers_know_at_once_what_one_has_routed() -> None:
    assert hits(workers=8) == hits() > 0.9


def test_replicas_know_after_the_next_exchange() -> None:
    assert hits(replicas=4) == hits()
    assert hits(replicas=4, exchange_interval=60.0) < hits() - 0.05


def test_replicas_count_each_others_load() -> None:
    trace = [TraceRequest(0.3 * i, 64, 2000, [i]) for i in range(16)]
    for replicas in (1, 2):
        result = run(trace, "least-request", FAST, pods=16, replicas=replicas)
        assert report("x", result, Slo(), 16)["sent"] == [1] * 16
    blind = run(trace, "least-request", FAST, pods=16, replicas=2, exchange_interval=60.0)
    assert report("x", blind, Slo(), 16)["sent"] != [1] * 16


def test_a_burst_does_not_pile_up() -> None:
    for name in ("burst-identical", "burst-distinct"):
        for workers in (1, 8):
            result = run(generate(name, 1), params=FAST, pods=8, workers=workers)
            assert max(report("x", result, Slo(), 8)["sent"]) <= 25


def command(*options: str) -> Any:
    return CliRunner().invoke(replay, ["no-prefix", "--requests", "40", *options])


def test_the_command_prints_one_object_per_strategy() -> None:
    done = command("--json", "--strategies", "least-request,lmetric", "--pods", "2")
    assert done.exit_code == 0
    rows = orjson.loads(done.stdout)
    assert [row["strategy"] for row in rows] == ["least-request", "lmetric"]
    for row in rows:
        assert list(row)[: len(KEYS)] == KEYS
        assert row["requests"] == 40


def test_the_command_prints_a_table_and_draws(tmp_path: Any) -> None:
    picture = tmp_path / "bars.png"
    done = command("--strategies", "least-request", "--plot", str(picture))
    assert done.exit_code == 0
    assert "least-request" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strategies", "nonsense"], "'nonsense' is none of"),
        (["--speed", "0"], "0.0 is not in the range x>0"),
        (["--pod-speeds", "1,0"], "'1,0' is not numbers above 0"),
        (["--pod-speeds", "1,fast"], "'1,fast' is not numbers above 0"),
    ],
)
def test_mistakes_are_named(options: list[str], words: str) -> None:
    done = command(*options)
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_trace_that_is_not_there() -> None:
    done = CliRunner().invoke(replay, ["nowhere.jsonl"])
    assert done.exit_code == 2
    assert "neither a file nor one of shared-prefix" in done.stderr
