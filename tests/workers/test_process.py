"""What every child does first."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workers.process import _Lossy

LOG = """
import structlog
from workers.config import LogConfig
from workers.process import set_up_logging
set_up_logging(LogConfig(), "worker 0")
for number in range(3):
    structlog.get_logger().info("line", number=number)
print("still here")
"""

BUG = """
from workers.config import LogConfig
from workers.h2.connection import Connection
from workers.h2.limits import TransportCounters, TransportLimits
from workers.process import set_up_logging

class Call:
    def close(self):
        raise ValueError("a bug")

set_up_logging(LogConfig(format="json"), "worker 0")
Connection({}, TransportLimits(), TransportCounters(), lambda: 0.0).close_call(Call())
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_colours_are_for_terminals(terminal: bool) -> None:
    read, write = os.openpty() if terminal else os.pipe()
    subprocess.run([sys.executable, "-c", LOG.replace("LogConfig()", "LogConfig(format='console')")],
                   stdout=subprocess.DEVNULL, stderr=write, timeout=60, check=True)  # fmt: skip
    said = os.read(read, 65536).decode()
    for each in (read, write):
        os.close(each)
    assert said.count("line") == 3
    assert ("\x1b[" in said) == terminal


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", LOG], stdout=subprocess.PIPE, stderr=full, timeout=60, check=False)
    assert done.stdout == b"still here\n"


def test_a_log_that_nobody_reads_ends_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", LOG], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and process.stdout is not None
        process.stderr.close()
        assert process.stdout.read() == b"still here\n"
        assert process.wait(60) == 0


def test_a_log_that_nobody_reads_stops_nobody() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w", buffering=1) as file:
        lossy = _Lossy(file)
        began = time.monotonic()
        for size in (200, 10_000) * 1000:
            lossy.write("x" * size + "\n")
        assert time.monotonic() - began < 5.0
        os.close(read)


def test_a_bug_in_a_call_is_logged_like_everything_else() -> None:
    done = subprocess.run([sys.executable, "-c", BUG], stderr=subprocess.PIPE, timeout=60, check=True)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["event"], line["level"], line["process"]) == ("a call failed unexpectedly", "error", "worker 0")
    assert line["pid"] > 0 and "ValueError: a bug" in line["exception"]
