"""`pointsman replay`: the command line of a replay. See `simulation` for what is replayed and how."""

import random
import sys
from dataclasses import replace
from math import inf
from pathlib import Path

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.engine import EngineParams
from bench.engine_presets import PRESETS
from bench.replay.generators import GENERATORS, generate
from bench.replay.report import Report, Slo, plot, plot_problem, report, table
from bench.replay.simulation import Settings, Simulation
from bench.replay.traces import TraceError, TraceRequest, read_mooncake
from router.rates import Prior
from router.strategies import STRATEGIES

_ABOVE_0 = click.FloatRange(0, min_open=True)
DEFAULT_STRATEGIES = (
    "marginal-delay,prefix-cache,least-request,round-robin,aibrix-prefix-cache,dynamo-kv,lmetric,llm-d-default,"
    "sglang-cache-aware,preble,consistent-hash-bounded"
)


@click.command(short_help="Compare routing strategies on a trace.")
@click.argument("trace")
@click.option("--pods", default=8, show_default=True, type=click.IntRange(1, 1024), help="Engines.")
@click.option("--blocks", type=click.IntRange(1), help="KV blocks per engine [default: the preset's memory].")
@click.option("--block-tokens", type=click.IntRange(1), help="Tokens in a KV block [default: the preset's].")
@click.option("--preset", default="round-figures", show_default=True, type=click.Choice(list(PRESETS)))
@click.option(
    "--engine-speed",
    default=1.0,
    show_default=True,
    type=_ABOVE_0,
    help="Engines this many times as fast as the preset.",
)
@click.option(
    "--pod-speeds",
    default="1",
    show_default=True,
    help="And each pod this many times as fast, over and over: 1,2 for every other one.",
)
@click.option(
    "--speed", default=1.0, show_default=True, type=_ABOVE_0, help="Arrivals this many times as fast as the trace."
)
@click.option("--strategies", default=DEFAULT_STRATEGIES, help="Names, separated by commas [default: most].")
@click.option("--seed", default=1, show_default=True, help="Of generators, of strategies' chance and of the spread.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many requests of a trace file [default: all].")
@click.option(
    "--spread",
    default=0.0,
    type=click.FloatRange(0),
    help="Delay each request of a file by up to so many seconds (Mooncake's times are whole 3 s).",
)
@click.option("--requests", type=click.IntRange(1), help="How many requests a generator makes [default: its own].")
@click.option("--rate", type=_ABOVE_0, help="Requests per second of a generator [default: its own].")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Worker processes.")
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(1, 16), help="Routers side by side.")
@click.option(
    "--metrics-interval", default=1.0, show_default=True, type=_ABOVE_0, help="Seconds between polls of a busy pod."
)
@click.option(
    "--metrics-age",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds until a poll's figures are seen.",
)
@click.option(
    "--exchange-interval", default=0.1, show_default=True, type=_ABOVE_0, help="Seconds between exchanges of replicas."
)
@click.option(
    "--index-blocks",
    default=1 << 20,
    show_default=True,
    type=click.IntRange(1),
    help="Blocks that the prefix index holds.",
)
@click.option("--prefill-error", type=_ABOVE_0, help="Do not learn speeds; take prefills for this many times as slow.")
@click.option("--decode-error", type=_ABOVE_0, help="The same for decoding.")
@click.option(
    "--slo-ttft", default=2.0, show_default=True, type=_ABOVE_0, help="Seconds to the first token that count as good."
)
@click.option("--slo-tpot", default=0.05, show_default=True, type=_ABOVE_0, help="Seconds per further token.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list on standard output instead of a table.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Write bars to this file.")
def replay(
    trace: str,
    pods: int,
    blocks: int | None,
    block_tokens: int | None,
    preset: str,
    engine_speed: float,
    pod_speeds: str,
    speed: float,
    strategies: str,
    seed: int,
    limit: int | None,
    spread: float,
    requests: int | None,
    rate: float | None,
    workers: int,
    replicas: int,
    metrics_interval: float,
    metrics_age: float,
    exchange_interval: float,
    index_blocks: int,
    prefill_error: float | None,
    decode_error: float | None,
    slo_ttft: float,
    slo_tpot: float,
    as_json: bool,
    plot_path: Path | None,
) -> None:
    """Replay TRACE through the production strategies on simulated engines, and compare them.

    TRACE is a file in Mooncake's format (JSON lines, plain or gzipped), or a generator: shared-prefix, multi-turn,
    agents, no-prefix, hot-shift, tools, documents, short-answers, bursts, burst-identical, burst-distinct.
    """
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    replayable = [name for name in STRATEGIES if name != "pd"]  # the simulated engines do not hand over
    for name in names:
        if name not in replayable:
            raise click.BadParameter(f"{name!r} is none of {', '.join(replayable)}", param_hint="--strategies")
    if plot_path is not None and (problem := plot_problem(plot_path)):
        raise click.BadParameter(problem, param_hint="--plot")
    params = _engine(preset, engine_speed, blocks, block_tokens)
    prior = None
    if prefill_error is not None or decode_error is not None:
        prior = _wrong(params, prefill_error or 1.0, decode_error or 1.0)
    settings = Settings(
        params,
        pods=pods,
        speed=speed,
        workers=workers,
        replicas=replicas,
        metrics_interval=metrics_interval,
        metrics_age=metrics_age,
        exchange_interval=exchange_interval,
        index_blocks=index_blocks,
        prior=prior,
        learn=prior is None,
        pod_speeds=_speeds(pod_speeds),
        seed=seed,
    )
    loaded = _load(trace, seed, limit or 0, requests or 0, rate or 0.0)
    if trace not in GENERATORS:
        rng = random.Random(seed)
        for request in loaded:
            request.at += rng.random() * spread
    slo = Slo(slo_ttft, slo_tpot)
    reports: list[Report] = []
    console = Console(file=sys.stderr)
    with Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        for name in names:
            task = progress.add_task(name, total=len(loaded))
            run = Simulation(loaded, name, settings).run(lambda done, task=task: progress.update(task, completed=done))  # type: ignore[misc]
            reports.append(report(name, run, slo, pods))
    tokens = params.num_blocks * params.block_tokens
    title = (
        f"{Path(trace).name}, speed {speed:g}, {pods} pods of {tokens:,} KV tokens, {preset}, {len(loaded):,} requests"
    )
    if plot_path is not None:
        plot(reports, title, plot_path)
    if as_json:
        click.echo(orjson.dumps(reports, option=orjson.OPT_INDENT_2))
    else:
        Console(width=130).print(table(reports, title))


def _engine(preset: str, speed: float, blocks: int | None, block_tokens: int | None) -> EngineParams:
    params = PRESETS[preset].faster(speed)
    tokens = params.num_blocks * params.block_tokens
    size = block_tokens or params.block_tokens
    return replace(params, block_tokens=size, num_blocks=blocks or max(tokens // size, 1))


def _speeds(text: str) -> tuple[float, ...]:
    try:
        speeds = tuple([float(part) for part in text.split(",")])
    except ValueError:
        speeds = ()
    if not speeds or not all(0 < speed < inf for speed in speeds):
        raise click.BadParameter(f"{text!r} is not numbers above 0, separated by commas", param_hint="--pod-speeds")
    return speeds


def _wrong(params: EngineParams, prefill: float, decode: float) -> Prior:
    """The engine's true rates, but for the factors."""
    return Prior(
        step_seconds=params.step_seconds * decode,
        prefill_token_seconds=params.prefill_token_seconds * prefill,
        decode_request_seconds=params.decode_request_seconds * decode,
        kv_token_seconds=params.kv_token_seconds * decode,
        step_tokens=float(params.max_num_batched_tokens),
    )


def _load(trace: str, seed: int, limit: int, requests: int, rate: float) -> list[TraceRequest]:
    if trace in GENERATORS:
        return generate(trace, seed, requests, rate)
    path = Path(trace)
    if not path.exists():
        raise click.BadParameter(f"{trace!r} is neither a file nor one of {', '.join(GENERATORS)}", param_hint="TRACE")
    try:
        return read_mooncake(path, limit)
    except TraceError as error:
        raise click.ClickException(str(error)) from None
