"""The demo as its user runs it: a command, its output, its exit code, and nothing left behind."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

POINTSMAN = Path(sys.executable).parent / "pointsman"

pytestmark = pytest.mark.envoy


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(
        [POINTSMAN, "demo", *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def running(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """A demo that has answered its first request, and the process ids of its pods, router and Envoy."""
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [POINTSMAN, "demo"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        try:
            assert demo.stdout is not None
            for line in demo.stdout:
                if "TTFT" in line:
                    break
            children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()
            yield demo, [int(pid) for pid in children]
        finally:
            demo.kill()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def table(output: str) -> dict[str, list[str]]:
    """The table of pods: first column to the others."""
    rows = output[output.index("prefix hits") :].splitlines()[1:]
    return {name: rest for name, *rest in (re.split(r"\s{2,}", row.strip()) for row in rows if row.strip())}


def test_one_round_uses_every_pod_and_fails_no_request(tmp_path: Path) -> None:
    done = run(tmp_path, "--once", "--requests", "30", "--pods", "2")
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert list(rows) == ["pod-0", "pod-1", "all"]
    requests = {name: int(row[0]) for name, row in rows.items()}
    assert requests["all"] == 30 == requests["pod-0"] + requests["pod-1"]
    assert min(requests.values()) > 0
    assert rows["all"][-1] == "0"  # failed
    assert rows["all"][2] not in ("-", "0 %")  # the pods' own account of their caches has arrived
    assert "\x1b" not in done.stdout, "no terminal, so nothing to redraw"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("destination", ["metadata", "override-host"])
def test_one_round_with_each_way_to_name_the_pod(tmp_path: Path, destination: str) -> None:
    done = run(
        tmp_path, "--once", "--requests", "8", "--destination", destination, "--strategy", "random", "--workers", "1"
    )
    assert done.returncode == 0, done.stderr
    assert table(done.stdout)["all"][0] == "8"
    assert len(re.findall(r"  random  ", done.stdout)) == 8


def test_a_terminal_gets_tables_that_are_redrawn(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    command = [POINTSMAN, "demo", "--once", "--requests", "8", "--workers", "1"]
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs) as demo:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # the other end is closed
            pass
        assert demo.wait(10) == 0
    os.close(ours)
    assert shown.count(b"last requests") > 2
    assert b"TTFT" in shown


def test_a_failed_request_makes_the_exit_code_1(tmp_path: Path) -> None:
    done = run(tmp_path, "--once", "--requests", "6", "--", "--fail-rate", "1")
    assert done.returncode == 1
    assert "6 of 6 requests failed" in done.stderr
    assert "Failed on purpose" in done.stdout


def test_a_picture_that_could_not_be_written_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    done = run(tmp_path, "--once", "--picture", str(tmp_path / "no" / "demo.svg"))
    assert done.returncode == 2
    assert done.stderr.endswith(f"Error: Invalid value for --picture: there is no folder {tmp_path / 'no'}\n")
    assert done.stdout == ""


def test_a_pod_that_dies_ends_the_demo_which_names_it_and_shows_its_log(tmp_path: Path) -> None:
    with running(tmp_path) as (demo, children):
        pods = next(pid for pid in children if b"bench.pod" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(pods, signal.SIGKILL)
        _, errors = demo.communicate(timeout=30)
        assert demo.returncode == 1
        assert f"(pid {pods}) was ended by SIGKILL" in errors
        assert "ready 127.0.0.1:" in errors
        assert all(has_ended(pid) for pid in children)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as (demo, children):
        assert len(children) == 3
        demo.send_signal(number)
        output, errors = demo.communicate(timeout=30)
        assert (demo.returncode, errors) == (0, "")
        assert table(output)["all"][-1] == "0"
        assert all(has_ended(pid) for pid in children)
    assert not list(tmp_path.iterdir())


def test_nothing_survives_a_demo_that_is_killed(tmp_path: Path) -> None:
    with running(tmp_path) as (demo, children):
        demo.kill()
        demo.wait()
        deadline = time.monotonic() + 30
        while not all(has_ended(pid) for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_wrong_option_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(tmp_path, "--once", "--strategy", "least-requests")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "pointsman: --strategy: strategy: no strategy 'least-requests'; did you mean 'least-request'?"
    ]


def test_a_wrong_pod_option_is_told_in_the_pods_words(tmp_path: Path) -> None:
    done = run(tmp_path, "--once", "--", "--no-such-option")
    assert done.returncode == 1
    assert "No such option" in done.stderr
    assert "Traceback" not in done.stderr
