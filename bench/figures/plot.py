"""The comparison as a picture: CPU of a stream, ours and others', by the size of the body."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.figures.bars import BODY_KILOBYTES, PEER_STREAM_MICROSECONDS
from bench.figures.figure import Figure

OURS = {
    "least-request": "pointsman least-request",
    "marginal-delay": "pointsman marginal-delay (prefix-aware)",
    "grpcio transport": "pointsman least-request on grpcio",
    "grpc.aio, no routing": "grpc.aio, no routing at all",
}


def bars(figures: Sequence[Figure]) -> dict[str, tuple[float, ...]]:
    """Microseconds at each size, by name: ours as measured, then the others'. Raises KeyError if one is missing."""
    values = {figure.key: figure.value for figure in figures}
    ours = {name: tuple(values[f"streams/{kind}/{size}"] for size in BODY_KILOBYTES) for kind, name in OURS.items()}
    return {**ours, **PEER_STREAM_MICROSECONDS}


def draw(named: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write the picture; the file's ending says in which format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "pointsman", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(BODY_KILOBYTES), figsize=(13, 3.6), sharey=True, layout="constrained")
    names = list(named)[::-1]
    colours = ["#1f6f8b" if name.startswith("pointsman") else "#b9c0c7" for name in names]
    for place, (panel, size) in enumerate(zip(panels, BODY_KILOBYTES, strict=True)):
        drawn = panel.barh(names, [named[name][place] for name in names], color=colours)
        panel.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
        panel.set_xscale("log")
        panel.set_xlim(10, 200_000)
        panel.set_title(f"{size} KB body", fontsize=10)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("CPU per two-message stream, µs (logarithmic; less is better)", fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
