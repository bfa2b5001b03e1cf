"""`pointsman demo`: pods, router and Envoy on this machine, chats that run through them, and who answered what.

    pointsman demo                     until Ctrl-C
    pointsman demo --once              one round, then the table; exit code 1 if a request failed
    pointsman demo -- --speed 0.2      what follows -- goes to `simulate-pod`

`lab` starts and ends the processes, `chats` speaks to Envoy; here is what is shown, and for how long.
"""

import asyncio
import io
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import aiohttp
import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from bench.chats import Chats, Client, Outcome
from bench.lab import Lab, LabError
from workers.config import ConfigError

AT_ONCE = 6
"""Requests in flight in the first round."""
PAUSE_SECONDS = 0.6
"""Between two requests afterwards."""
PICTURE_WIDTH = 96
PLAIN_WIDTH = 110
_CODES = {"ok": 0, "failed": 1, "unusable": 2, "interrupted": 130}


# What is shown


@dataclass
class Tally:
    """The requests of one pod, or of all."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    streamed: int = 0
    first_token_seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.requests += 1
        self.failed += bool(outcome.failure)
        self.prompt_tokens += outcome.prompt_tokens
        self.cached_tokens += outcome.cached_tokens
        if outcome.first_token_seconds is not None:
            self.streamed += 1
            self.first_token_seconds += outcome.first_token_seconds

    def row(self, all_requests: int) -> list[str]:
        mean = self.first_token_seconds / self.streamed if self.streamed else None
        share = _percent(self.requests, all_requests)
        return [
            str(self.requests),
            share,
            _percent(self.cached_tokens, self.prompt_tokens),
            _ms(mean),
            str(self.failed),
        ]


class Board:
    """The last requests, and a sum for each pod."""

    def __init__(self, console: Console, pods: int) -> None:
        self._console = console
        self.total = Tally()
        self._pods = {f"pod-{number}": Tally() for number in range(pods)}
        self._last: deque[Outcome] = deque(maxlen=max(5, min(20, console.height - pods - 12)))

    def add(self, outcome: Outcome) -> None:
        """Count it, and show it at once where nothing is redrawn."""
        self.total.add(outcome)
        self._pods.setdefault(outcome.pod or "none", Tally()).add(outcome)
        self._last.append(outcome)
        if not self._console.is_terminal:
            cells = _cells(outcome)
            line = "{:>4}  {:<15} {:>2}  {:<7} {:<18} cached {:>12}  TTFT {:>7}  all {:>7}  {}".format(*cells)
            self._console.print(line.rstrip(), soft_wrap=True, markup=False, highlight=False)

    def requests(self) -> Table:
        """The last requests."""
        table = Table(title="last requests", title_justify="left", box=None, pad_edge=False, header_style="dim")
        for name, right in (
            ("#", True), ("chat", False), ("turn", True), ("pod", False), ("decided by", False),
            ("cached of prompt", True), ("TTFT", True), ("all", True), ("", False),
        ):  # fmt: skip
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        for outcome in self._last:
            table.add_row(*_cells(outcome), style="red" if outcome.failure else None)
        return table

    def pods(self) -> Table:
        """The sums."""
        table = Table(
            title="pods", title_justify="left", box=None, pad_edge=False, header_style="dim", show_footer=True
        )
        names = ("pod", "requests", "share", "prefix hits", "mean TTFT", "failed")
        for name, foot in zip(names, ["all", *self.total.row(self.total.requests)], strict=True):
            table.add_column(name, foot, justify="left" if name == "pod" else "right", no_wrap=True)
        for name, tally in self._pods.items():
            table.add_row(name, *tally.row(self.total.requests))
        return table

    def __rich__(self) -> Group:
        return Group("", self.requests(), "", self.pods())


def _cells(outcome: Outcome) -> list[str]:
    tokens = f"{outcome.cached_tokens} of {outcome.prompt_tokens}" if outcome.prompt_tokens else "-"
    first = _ms(outcome.first_token_seconds)
    return [
        str(outcome.number), outcome.chat, str(outcome.turn), outcome.pod or "-", outcome.strategy or "-",
        tokens, first, _ms(outcome.seconds), outcome.failure or ("" if outcome.streamed else "not streamed"),
    ]  # fmt: skip


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"


# The run


class Ending:
    """SIGINT and SIGTERM: the first one ends what runs in good order, more of them change nothing."""

    def __init__(self) -> None:
        self.asked = False
        self._cancel: Callable[[], object] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        if self._cancel is None:
            raise KeyboardInterrupt
        self._cancel()

    def run(self, work: Awaitable[None]) -> None:
        """Run a coroutine until it returns or a signal cancels it; then KeyboardInterrupt is raised here."""

        async def main() -> None:
            task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            await task

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            self._cancel = None


async def traffic(lab: Lab, board: Board, requests: int, *, once: bool) -> None:
    """A round of `requests`, and then, unless `once`, one after the other without end."""
    chats, number = Chats(), 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        client = Client(session, lab)

        async def turn() -> None:
            nonlocal number
            number += 1
            with chats.next() as chat:
                board.add(await client.send(number, chat))

        async def turns() -> None:
            while number < requests:
                await turn()

        await asyncio.gather(*(turns() for _ in range(AT_ONCE)))
        while not once:
            await asyncio.sleep(PAUSE_SECONDS)
            await turn()


async def watched(work: Awaitable[None], lab: Lab, tick: Callable[[], None]) -> None:
    """Run `work` while every process of the lab lives. Raises LabError when one does not."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.2)
            lab.check()
            tick()
        task.result()
    finally:
        task.cancel()


def try_it(console: Console, lab: Lab) -> None:
    """How to send a request by hand."""
    body = f'{{"model":"{lab.model}","stream":true,"max_tokens":16,"messages":[{{"role":"user","content":"Hello"}}]}}'
    for line in (
        "Try it yourself; the header target-pod says who answered:",
        f"  curl -siN {lab.envoy_url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        f"  curl -s {lab.admin_url}/debug/pods",
        "Ctrl-C ends it.",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


@click.command(short_help="The whole thing on this machine: real Envoy, simulated pods.")
@click.option("--pods", type=click.IntRange(1, 200), default=3, show_default=True, help="Simulated pods.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Worker processes.")
@click.option("--requests", type=click.IntRange(1), default=48, show_default=True, help="In the first round.")
@click.option("--once", is_flag=True, help="End after the first round; exit code 1 if a request failed.")
@click.option("--strategy", help="See `pointsman strategies`; default: the configuration's.")
@click.option(
    "--destination", type=click.Choice(["header", "metadata", "override-host"]), help="How Envoy learns the pod."
)
@click.option("--picture", type=click.Path(dir_okay=False), help="Write the last tables there, as SVG.")
@click.option("--keep-logs", is_flag=True, help="Leave the folder with logs and configuration behind.")
@click.argument("pod_options", nargs=-1, type=click.UNPROCESSED)
def demo(
    pods: int,
    workers: int,
    requests: int,
    once: bool,
    strategy: str | None,
    destination: str | None,
    picture: str | None,
    keep_logs: bool,
    pod_options: tuple[str, ...],
) -> None:
    """Route chats through a real Envoy to simulated pods, and show who answers them.

    What follows -- goes to `pointsman simulate-pod`.
    """
    if picture is not None and not Path(picture).parent.is_dir():
        raise click.BadParameter(f"there is no folder {Path(picture).parent}", param_hint="--picture")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    lab = Lab(
        pods=pods, workers=workers, strategy=strategy, destination=destination, keep_logs=keep_logs,
        pod_arguments=pod_options, progress=lambda step: console.print(f"[dim]{step} ...[/]"),
    )  # fmt: skip
    ending, began = Ending(), time.monotonic()
    board = Board(console, pods)
    result = "ok"
    try:
        with lab:
            console.print(f"[dim]ready after {time.monotonic() - began:.1f} s[/]\n")
            show(console, lab, board, ending, requests, once=once)
    except KeyboardInterrupt:
        # Without --once there is no other way to end it.
        result = "interrupted" if once else "ok"
    except ConfigError as error:
        click.echo(f"pointsman: {error}", err=True)
        sys.exit(_CODES["unusable"])
    except LabError as error:
        click.echo(f"pointsman: {error}", err=True)
        result = "failed"
    if board.total.failed:
        click.echo(f"pointsman: {board.total.failed} of {board.total.requests} requests failed", err=True)
        result = "failed"
    if picture is not None:
        drawing = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO(), highlight=False)
        drawing.print(board)
        drawing.save_svg(picture, title="make demo")
    if keep_logs:
        console.print(f"logs and configuration: {lab.folder}", soft_wrap=True)
    sys.exit(_CODES[result])


def show(console: Console, lab: Lab, board: Board, ending: Ending, requests: int, *, once: bool) -> None:
    """The traffic and the tables, in a lab that runs."""
    if not once:
        try_it(console, lab)
    work = traffic(lab, board, requests, once=once)
    try:
        if console.is_terminal:
            with Live(board, console=console, auto_refresh=False, transient=True) as live:
                ending.run(watched(work, lab, live.refresh))
        else:
            ending.run(watched(work, lab, lambda: None))
    finally:
        console.print(board if console.is_terminal else board.pods())


if __name__ == "__main__":
    demo()
