"""What each figure is held against: our own bar, and what other routers need for the same.

The others were measured on another machine of two shared cores, driven by the same load generator: AIBrix (HEAD
of August 2026) and llm-d's endpoint picker, built from source, in their standalone modes, scraping every 5 seconds
where nothing else is said. They are constants here: nothing of them runs during our benchmarks.
"""

from dataclasses import dataclass

BODY_KILOBYTES = (1, 4, 64)

PEER_STREAM_MICROSECONDS: dict[str, tuple[float, float, float]] = {
    "AIBrix random": (198, 183, 628),
    "AIBrix least-request": (256, 248, 819),
    "AIBrix prefix-cache": (657, 2881, 40080),
    "llm-d prefix + load": (608, 697, 2650),
}
"""CPU of a two-message stream with bodies of so many kilobytes."""


@dataclass(frozen=True)
class Bar:
    """A limit, by default from above, in the unit of its figure. `peers`: what others reach."""

    limit: float | None = None
    at_least: bool = False
    peers: str = ""

    def met(self, value: float) -> bool | None:
        """None where there is nothing to meet."""
        if self.limit is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit


def _streams(size: int, *names: str) -> str:
    place = BODY_KILOBYTES.index(size)
    return ", ".join(f"{name} {PEER_STREAM_MICROSECONDS[name][place]:,.0f}" for name in names)


def _lockstep() -> dict[str, Bar]:
    bars = {}
    by_load = zip(BODY_KILOBYTES, (45, 55, 220), (1 / 9, 1 / 8, 0.45), strict=True)
    for size, limit, share in by_load:
        bars[f"streams/least-request/{size}"] = Bar(
            limit, peers=_streams(size, "AIBrix random", "AIBrix least-request")
        )
        bars[f"streams/least-request/{size}/share"] = Bar(share)
    by_prefix = zip(BODY_KILOBYTES, (70, 90, 450), (1 / 6, 1 / 6, None), strict=True)
    for size, limit, at_most in by_prefix:
        bars[f"streams/marginal-delay/{size}"] = Bar(
            limit, peers=_streams(size, "AIBrix prefix-cache", "llm-d prefix + load")
        )
        bars[f"streams/marginal-delay/{size}/share"] = Bar(at_most)
    return bars


BARS: dict[str, Bar] = {
    **_lockstep(),
    "saturation/h2": Bar(20_000, at_least=True),
    "saturation/ratio": Bar(8, at_least=True),
    "chunks/h2": Bar(15, peers="AIBrix 17.4, llm-d 29-37"),
    "bodies/least-request": Bar(1200, at_least=True),
    "bodies/marginal-delay": Bar(700, at_least=True),
    "envoy/tcp/cpu/least-request": Bar(60),
    "envoy/unix/cpu/least-request": Bar(60),
    "envoy/tcp/p50": Bar(0.5, peers="AIBrix 1.6-1.9, llm-d 1.4-1.6"),
    "envoy/unix/p50": Bar(0.5, peers="AIBrix 1.6-1.9, llm-d 1.4-1.6"),
    "envoy/tcp/p99": Bar(1.5, peers="AIBrix 2.7-9, llm-d 3-8"),
    "envoy/unix/p99": Bar(1.5, peers="AIBrix 2.7-9, llm-d 3-8"),
    "idle-streams/rss": Bar(100),
    "workers/least-request/more": Bar(10),
    "workers/least-request, core full/more": Bar(10),
    "one-core/idle": Bar(0.06, peers="AIBrix 0.19, llm-d 0.19"),
    "one-core/h2/p99": Bar(5, peers="AIBrix 243, llm-d 205"),
    "one-core/grpcio/p99": Bar(10, peers="AIBrix 243, llm-d 205"),
    "scrape/page": Bar(500, peers="AIBrix 3,000, llm-d 3,000"),
    "scrape/100-pods": Bar(0.06),
    "scrape/100-pods/scraper": Bar(0.05),
    "strategies/errors": Bar(0),
    "strategies/unused": Bar(0),
    "strategies/least-request": Bar(10),
    "strategies/round-robin": Bar(10),
    "failover/failed": Bar(1, peers="AIBrix, llm-d: every open one and every one until the restart, 41-67 of 400"),
}
"""By the key of the figure. Figures that are not here are told without a bar."""

NO_BAR = Bar()
