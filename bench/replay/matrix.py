"""All strategies on all cells, and the tables of docs/routing.md:

    python -m bench.replay.matrix run  --trace conversation=FILE [--seeds 1,2,3] [--cells 'agents*'] [--again NAME]
    python -m bench.replay.matrix robustness --trace conversation=FILE
    python -m bench.replay.matrix show
    python -m bench.replay.matrix plot docs

A cell is a load on a fleet. A generator makes another load of it with each seed; figures are means over all seeds that
were replayed. `run` replays what has no result yet, one process at a time, until the time is up, and keeps every result
under results/replay/; called again it goes on. `show` prints Markdown.
"""

import fnmatch
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

import click
import orjson

from bench.replay.report import Report
from bench.replay.report import plot as bars

RESULTS = Path("results/replay")
OWN = "marginal-delay"
YARDSTICKS = (
    "aibrix-prefix-cache",
    "dynamo-kv",
    "lmetric",
    "llm-d-default",
    "sglang-cache-aware",
    "preble",
    "consistent-hash-bounded",
    "least-request",
)
OTHERS = ("prefix-cache", "prefix-cache-preble", "round-robin")
MIDDLE = ("--blocks", "16384", "--block-tokens", "64")
SMALL = ("--blocks", "4096", "--block-tokens", "64")
LARGE = ("--blocks", "65536", "--block-tokens", "64")
_CONVERSATION = "conversation"


def _cells() -> dict[str, tuple[str, ...]]:
    cells: dict[str, tuple[str, ...]] = {}
    for speed in ("1", "2", "3"):
        cells[f"conversation x{speed}"] = (_CONVERSATION, "--speed", speed, *MIDDLE)
    cells["conversation x2, small KV"] = (_CONVERSATION, "--speed", "2", *SMALL)
    cells["conversation x2, large KV"] = (_CONVERSATION, "--speed", "2", *LARGE)
    cells["conversation x0.5, 2 pods"] = (_CONVERSATION, "--speed", "0.5", "--pods", "2", "--limit", "6000", *MIDDLE)
    cells["conversation x16, 64 pods"] = (_CONVERSATION, "--speed", "16", "--pods", "64", *MIDDLE)
    cells["conversation x3, H100 8B"] = (
        _CONVERSATION,
        "--speed",
        "3",
        "--limit",
        "6000",
        "--preset",
        "h100-llama-3.1-8b",
    )
    cells["conversation x2, H100 8B"] = (
        _CONVERSATION,
        "--speed",
        "2",
        "--limit",
        "6000",
        "--preset",
        "h100-llama-3.1-8b",
    )
    cells["conversation x0.4, A100 14B"] = (
        _CONVERSATION,
        "--speed",
        "0.4",
        "--limit",
        "6000",
        "--preset",
        "a100-qwen-2.5-14b",
    )
    loads = {
        "shared-prefix": ("12", "28", ""),  # saturated: up the ladder
        "multi-turn": ("15", "40", "70"),
        "agents": ("10", "30", "60"),
        "no-prefix": ("15", "35", "50"),
    }
    for name, rates in loads.items():
        for load, rate in zip(("light", "near", "saturated"), rates, strict=True):
            cells[f"{name} {load}"] = (name, *(("--rate", rate) if rate else ()), *MIDDLE)
    cells["agents, 2 pods"] = ("agents", "--rate", "8", "--requests", "3000", "--pods", "2", *MIDDLE)
    cells["shared-prefix, 64 pods"] = ("shared-prefix", "--rate", "224", "--requests", "12000", "--pods", "64", *MIDDLE)
    cells["multi-turn, small KV"] = ("multi-turn", "--rate", "40", *SMALL)
    cells["agents, small KV"] = ("agents", "--rate", "30", *SMALL)
    return cells


CELLS = _cells()
HARD = ("conversation x2", "agents near", "shared-prefix near")
"""The cells on which `robustness` tries what can be wrong."""
WRONG = {
    "as it is": (),
    "prefill taken for 2x as slow, nothing learnt": ("--prefill-error", "2"),
    "prefill taken for 2x as fast": ("--prefill-error", "0.5"),
    "decoding taken for 3x as slow": ("--decode-error", "3"),
    "decoding taken for 3x as fast": ("--decode-error", "0.33"),
    "polls every 5 s": ("--metrics-interval", "5"),
    "metrics 5 s old": ("--metrics-age", "5"),
    "index of 20,000 blocks": ("--index-blocks", "20000"),
    "8 workers": ("--workers", "8"),
    "arrivals spread over 3 s": ("--spread", "3"),
    "so, and 8 workers": ("--spread", "3", "--workers", "8"),
    "so, and 4 replicas": ("--spread", "3", "--replicas", "4"),
    "so, and 4 replicas, exchange every second": ("--spread", "3", "--replicas", "4", "--exchange-interval", "1"),
    "so, and 4 replicas without Redis": ("--spread", "3", "--replicas", "4", "--exchange-interval", "1e6"),
}


def _path(cell: str) -> Path:
    return RESULTS / (cell.replace(" ", "_").replace(",", "") + ".json")


def load(cell: str) -> dict[str, Report]:
    """What is known of a cell, by strategy: means over the seeds that all of them have."""
    known = _load(cell)
    seeds = set.intersection(*map(set, known.values())) if known else set()
    return {name: _mean([reports[seed] for seed in sorted(seeds)]) for name, reports in known.items() if seeds}


def _load(cell: str) -> dict[str, dict[str, Report]]:
    """By strategy and seed."""
    path = _path(cell)
    found: dict[str, dict[str, Report]] = orjson.loads(path.read_bytes()) if path.exists() else {}
    return found


def _mean(reports: Sequence[Report]) -> Report:
    """Of every figure; what is none is that of the first."""
    return {
        key: mean(report[key] for report in reports) if isinstance(value, int | float) else value
        for key, value in reports[0].items()
    }


def seeds_of(cell: str, seeds: Sequence[str]) -> Sequence[str]:
    """The seeds worth a replay: a trace is the same with each."""
    return seeds[:1] if CELLS[cell][0] == _CONVERSATION else seeds


@click.group()
def main() -> None:
    """The cells of docs/routing.md."""


@main.command()
@click.option("--trace", default="", help="conversation=FILE: where that trace lies; its cells are left out without.")
@click.option("--minutes", default=30.0)
@click.option("--cells", default="*")
@click.option("--strategies", default=",".join((OWN, *YARDSTICKS, *OTHERS)))
@click.option("--seeds", default="1", help="For generators, separated by commas.")
@click.option("--again", default="", help="Strategies to replay although there are results.")
def run(trace: str, minutes: float, cells: str, strategies: str, seeds: str, again: str) -> None:
    """Replay what is missing."""
    replays = _Replays(trace, minutes)
    for cell in fnmatch.filter(CELLS, cells):
        known = _load(cell)
        for name in strategies.split(","):
            reports = known.get(name, {})
            for seed in seeds_of(cell, seeds.split(",")):
                if seed not in reports or name in again.split(","):
                    found = replays.one((*CELLS[cell], "--seed", seed), name)
                    if found is not None:
                        known.setdefault(name, reports)[seed] = found
                        _path(cell).write_bytes(orjson.dumps(known, option=orjson.OPT_INDENT_2))
        print(_line(cell, load(cell)), flush=True)


@main.command()
@click.option("--trace", default="", help="As for `run`.")
@click.option("--minutes", default=30.0)
@click.option("--again", is_flag=True)
def robustness(trace: str, minutes: float, again: bool) -> None:
    """Our own strategy with wrong rates, old metrics, a truncated index, and many workers and replicas."""
    replays = _Replays(trace, minutes)
    path = RESULTS / "robustness.json"
    known: dict[str, Report] = orjson.loads(path.read_bytes()) if path.exists() and not again else {}
    for wrong, options in WRONG.items():
        for cell in HARD:
            key = f"{cell}: {wrong}"
            if key not in known:
                found = replays.one((*CELLS[cell], *options), OWN)
                if found is not None:
                    known[key] = found
                    path.write_bytes(orjson.dumps(known, option=orjson.OPT_INDENT_2))
    print("| | " + " | ".join(HARD) + " |")
    print("|---|" + "---|" * len(HARD))
    for wrong in WRONG:
        parts = []
        for cell in HARD:
            row, base = known.get(f"{cell}: {wrong}"), known.get(f"{cell}: as it is")
            if row is None or base is None:
                parts.append("-")
                continue
            ttft, e2e = (row[key] / base[key] for key in ("ttft_mean_ms", "e2e_mean_ms"))
            parts.append(f"{ttft:.2f} / {e2e:.2f} / {row['hit_ratio'] - base['hit_ratio']:+.3f}")
        print(f"| {wrong} | " + " | ".join(parts) + " |")


class _Replays:
    """Replays in processes of their own, one at a time, until the time is up."""

    def __init__(self, trace: str, minutes: float) -> None:
        self._deadline = time.monotonic() + minutes * 60
        self._traces = dict([trace.split("=", 1)]) if trace else {}
        RESULTS.mkdir(parents=True, exist_ok=True)

    def one(self, cell: Sequence[str], strategy: str) -> Report | None:
        """None: there is no time, no trace, or the replay failed."""
        source, *options = cell
        left = self._deadline - time.monotonic()
        if left <= 0 or (source == _CONVERSATION and source not in self._traces):
            return None
        command = [sys.executable, "-m", "bench.replay", self._traces.get(source, source), *options]
        try:
            done = subprocess.run(
                [*command, "--strategies", strategy, "--json"], capture_output=True, timeout=left + 60, check=True
            )
        except subprocess.TimeoutExpired:
            print(f"{' '.join(cell)}: {strategy} took too long", file=sys.stderr)
            return None
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(cell)}: {strategy}: {error.stderr.decode()[-500:]}", file=sys.stderr)
            return None
        found: Report = orjson.loads(done.stdout)[0]
        return found


def best(known: dict[str, Report], key: str) -> tuple[str, float]:
    """The yardstick with the lowest figure, and the figure."""
    name = min((name for name in YARDSTICKS if name in known), key=lambda name: known[name][key])
    return name, known[name][key]


def _line(cell: str, known: dict[str, Report]) -> str:
    if OWN not in known or not any(name in known for name in YARDSTICKS):
        return cell
    own = known[OWN]
    parts = [f"{cell:28}"]
    for key in ("ttft_mean_ms", "ttft_p99_ms", "e2e_mean_ms"):
        name, figure = best(known, key)
        parts.append(f"{key[:-3]} {own[key]:8.0f} / {figure:8.0f} = {own[key] / figure:.3f} ({name})")
    return " | ".join(parts)


def _geometric(values: Iterable[float]) -> float:
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs))


@main.command()
@click.option("--brief", is_flag=True, help="Only the ratios.")
def show(brief: bool) -> None:
    """The tables, as Markdown."""
    results = _results()
    print(_ratios(results))
    if not brief:
        for cell, known in results.items():
            print(f"\n{_details(cell, known)}")


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def plot(folder: Path) -> None:
    """The ratios of all cells, and the strategies side by side on one of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = _results()
    cells = list(results)[::-1]
    figure, axis = pyplot.subplots(figsize=(9, 0.8 + 0.27 * len(cells)))
    rows = range(len(cells))
    for key, label, colour in (
        ("ttft_mean_ms", "mean time to first token", "#b5442c"),
        ("e2e_mean_ms", "mean end to end", "#3b6ea5"),
    ):
        ratios = [results[cell][OWN][key] / best(results[cell], key)[1] for cell in cells]
        axis.plot(ratios, rows, "o", color=colour, label=label, markersize=5)
    axis.axvline(1.0, color="#555555", linewidth=0.8)
    axis.set_yticks(rows, cells, fontsize=8)
    axis.set_xlabel("marginal-delay / the best yardstick of the cell, found in hindsight", fontsize=9)
    axis.grid(axis="x", linewidth=0.3)
    axis.legend(fontsize=8, loc="best")
    figure.tight_layout()
    figure.savefig(folder / "routing-ratios.svg")
    for cell in ("conversation x2", "agents near", "shared-prefix near"):
        if cell in results:
            known = results[cell]
            names = [name for name in (OWN, *YARDSTICKS, *OTHERS) if name in known]
            bars([known[name] for name in names], cell, folder / f"routing-{cell.replace(' ', '-')}.svg")


def _results() -> dict[str, dict[str, Report]]:
    results = {cell: load(cell) for cell in CELLS}
    found = {
        cell: known for cell, known in results.items() if OWN in known and any(name in known for name in YARDSTICKS)
    }
    if not found:
        raise click.ClickException(
            f"{RESULTS}: there are no results; make some with `python -m bench.replay.matrix run`"
        )
    return found


def _ratios(results: dict[str, dict[str, Report]]) -> str:
    keys = ("ttft_mean_ms", "ttft_p99_ms", "e2e_mean_ms")
    lines = [
        "| cell | TTFT mean ms | best yardstick | ratio | p99 ratio | end-to-end mean ms | best yardstick | ratio |",
        "|---|---:|---|---:|---:|---:|---|---:|",
    ]
    ratios: dict[str, list[float]] = {key: [] for key in keys}
    for cell, known in results.items():
        own: Any = known[OWN]
        found = {key: best(known, key) for key in keys}
        for key in keys:
            ratios[key].append(own[key] / found[key][1])
        (ttft_name, ttft), _, (e2e_name, e2e) = (found[key] for key in keys)
        lines.append(
            f"| {cell} | {own['ttft_mean_ms']:.0f} | {ttft_name} {ttft:.0f} | {ratios[keys[0]][-1]:.3f} "
            f"| {ratios[keys[1]][-1]:.2f} | {own['e2e_mean_ms']:.0f} | {e2e_name} {e2e:.0f} "
            f"| {ratios[keys[2]][-1]:.3f} |"
        )
    if ratios[keys[0]]:
        means, worst = ([round(of(ratios[key]), 3) for key in keys] for of in (_geometric, max))
        lines.append(f"| geometric mean | | | **{means[0]}** | {means[1]} | | | **{means[2]}** |")
        lines.append(f"| worst | | | {worst[0]} | {worst[1]} | | | {worst[2]} |")
    return "\n".join(lines)


def _details(cell: str, known: dict[str, Report]) -> str:
    lines = [
        f"#### {cell}: `{' '.join(CELLS[cell])}`",
        "",
        "| strategy | hit ratio | TTFT mean | p50 | p90 | p99 | TPOT | end-to-end mean | goodput/s | imbalance |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (OWN, *YARDSTICKS, *OTHERS):
        if name in known:
            row = known[name]
            times = " | ".join(f"{row[f'ttft_{key}_ms']:.0f}" for key in ("mean", "p50", "p90", "p99"))
            lines.append(
                f"| {name} | {row['hit_ratio']:.3f} | {times} | {row['tpot_mean_ms']:.1f} | {row['e2e_mean_ms']:.0f} "
                f"| {row['goodput']:.2f} | {row['imbalance']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
