"""What a replay says: the figures of a strategy, as a mapping, as a table and as a plot."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench.replay.simulation import Run

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Slo:
    """What an answer must keep to count as good."""

    ttft_seconds: float = 2.0
    tpot_seconds: float = 0.05


def report(strategy: str, run: Run, slo: Slo, pods: int) -> Report:
    """The figures. Keys:

    hit_ratio    prompt tokens found in the engines' caches / prompt tokens
    goodput      requests per second that kept the SLO, from the first arrival to the last token
    imbalance    standard deviation of requests in flight over the pods / their mean, over time (0: always equal)
    tpot         (last token - first token) / (tokens - 1), mean over requests of more than one token
    expected_hit_ratio   hit_ratio as the router foresaw it
    sent         requests per pod, most first
    """
    requests = [outcome.request for outcome in run.outcomes]
    ttft = np.array([request.ttft_seconds for request in requests])
    e2e = np.array([request.e2e_seconds for request in requests])
    tpot = np.array([request.mean_itl_seconds for request in requests])
    several = np.array([request.output_tokens > 1 for request in requests])
    good = (ttft <= slo.ttft_seconds) & (tpot <= slo.tpot_seconds)
    prompt = sum(request.prompt_tokens for request in requests)
    cached = sum(request.cached_tokens for request in requests)
    expected = sum(outcome.expected_uncached for outcome in run.outcomes)
    mean_load = sum(mean for mean, _ in run.loads)
    counts = Counter(outcome.pod for outcome in run.outcomes)
    return {
        "strategy": strategy,
        "requests": len(requests),
        "hit_ratio": round(cached / prompt, 4),
        "ttft_mean_ms": _ms(ttft.mean()),
        "ttft_p50_ms": _ms(np.percentile(ttft, 50)),
        "ttft_p90_ms": _ms(np.percentile(ttft, 90)),
        "ttft_p99_ms": _ms(np.percentile(ttft, 99)),
        "tpot_mean_ms": _ms(tpot[several].mean()) if several.any() else 0.0,
        "e2e_mean_ms": _ms(e2e.mean()),
        "goodput": round(float(good.sum()) / run.seconds, 3),
        "imbalance": round(sum(deviation for _, deviation in run.loads) / mean_load, 3) if mean_load else 0.0,
        "slo_met": round(float(good.mean()), 4),
        "e2e_p99_ms": _ms(np.percentile(e2e, 99)),
        "expected_hit_ratio": round(1 - expected / prompt, 4),
        "seconds": round(run.seconds, 1),
        "preemptions": run.preemptions,
        "clamped": run.clamped,
        "sent": sorted((counts[pod] for pod in range(pods)), reverse=True),
    }


def _ms(seconds: Any) -> float:
    return round(float(seconds) * 1000, 2)


_COLUMNS = (
    ("hit ratio", "hit_ratio", ".3f"),
    ("TTFT ms", "ttft_mean_ms", ".0f"),
    ("p50", "ttft_p50_ms", ".0f"),
    ("p90", "ttft_p90_ms", ".0f"),
    ("p99", "ttft_p99_ms", ".0f"),
    ("TPOT ms", "tpot_mean_ms", ".1f"),
    ("end-to-end ms", "e2e_mean_ms", ".0f"),
    ("goodput/s", "goodput", ".2f"),
    ("imbalance", "imbalance", ".2f"),
)


def table(reports: Sequence[Report], title: str) -> Table:
    """One row per strategy."""
    out = Table(title=title, title_justify="left")
    out.add_column("strategy")
    for heading, _, _ in _COLUMNS:
        out.add_column(heading, justify="right")
    for row in reports:
        out.add_row(row["strategy"], *(format(row[key], style) for _, key, style in _COLUMNS))
    return out


def plot_problem(path: Path) -> str | None:
    """Why `plot` could not write there, before there is anything to write."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        return "needs the Python package 'matplotlib': pip install '.[bench]' in a clone of pointsman"
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        return f"{path.name!r} must end in one of .{', .'.join(sorted(endings))}"
    return None


def plot(reports: Sequence[Report], title: str, path: Path) -> None:
    """Mean and p99 TTFT, end-to-end mean, and hit ratio, as bars; format by the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("TTFT, mean (s)", "ttft_mean_ms", 1e-3),
        ("TTFT, p99 (s)", "ttft_p99_ms", 1e-3),
        ("end to end, mean (s)", "e2e_mean_ms", 1e-3),
        ("hit ratio", "hit_ratio", 1.0),
    )
    names = [row["strategy"] for row in reports][::-1]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 1.2 + 0.32 * len(names)), sharey=True)
    for axis, (heading, key, unit) in zip(axes, panels, strict=True):
        values = [row[key] * unit for row in reports][::-1]
        colours = ["#b5442c" if name == "marginal-delay" else "#7d8a97" for name in names]
        axis.barh(names, values, color=colours)
        axis.set_title(heading, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.bar_label(axis.containers[0], fmt="%.3g", fontsize=7, padding=2)
        axis.margins(x=0.15)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
