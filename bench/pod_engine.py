"""Drives one engine model by the clock of the event loop, and hands out its tokens as they come.

There is one timer per engine and none while it is idle. While somebody streams, the timer follows the engine's steps;
otherwise it sleeps from event to event. Tokens come out on the engine's own schedule: a late timer makes one wake-up
carry several steps, and nothing drifts.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

from bench.engine import Engine, EngineRequest, EventKind


@dataclass(slots=True, eq=False)
class Choice:
    """One answer under way. `emit(choice, tokens)` is called when more than `sent` tokens are there."""

    request: EngineRequest
    index: int
    offset: int  # of the answer in the corpus
    finish_reason: str
    done: asyncio.Future[None]
    emit: Callable[["Choice", int], None] | None = None
    sent: int = 0
    finished: bool = field(default=False, init=False)


class LiveEngine:
    def __init__(self, engine: Engine, stream_interval: int = 1) -> None:
        self.engine = engine
        self._interval = stream_interval
        self._streaming: dict[Choice, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def submit(self, choice: Choice) -> None:
        """ValueError if the engine could never serve it."""
        self.engine.submit(choice.request, time.monotonic())
        if choice.emit is not None:
            self._streaming[choice] = None
        self._hand_out()

    def abort(self, choice: Choice) -> None:
        self._streaming.pop(choice, None)
        if not choice.finished:
            self.engine.abort(choice.request, time.monotonic())
            self._hand_out()

    def settle(self) -> None:
        """Bring the engine's numbers up to now."""
        self._hand_out()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        self._timer = None
        self._hand_out()

    def _hand_out(self) -> None:
        events = self.engine.advance(time.monotonic())
        finished = [event.request.key for event in events if event.kind is EventKind.FINISHED]
        for choice in finished:
            choice.finished = True
        if self._streaming:
            generated = self.engine.generated
            for choice in self._streaming:
                tokens = generated(choice.request)
                if tokens - choice.sent >= self._interval or (choice.finished and tokens > choice.sent):
                    assert choice.emit is not None
                    choice.emit(choice, tokens)
                    choice.sent = tokens
        for choice in finished:
            self._streaming.pop(choice, None)
            if not choice.done.done():
                choice.done.set_result(None)
        self._plan()

    def _plan(self) -> None:
        due = self.engine.next_step() if self._streaming else self.engine.next_event()
        if self._timer is not None:
            if due == self._due:
                return
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._due = due
            # uvloop rounds to milliseconds; rounded down, a timer would fire before there is anything to do.
            delay = ceil(max(0.0, due - time.monotonic()) * 1000) / 1000
            self._timer = asyncio.get_running_loop().call_later(delay, self._wake)
