"""What the commands refuse before they replay anything."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.replay import command, matrix


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--plot", "/nonexist/x.png"], "'--plot': there is no folder /nonexist"),
        (["--plot", "x"], "'x' must end in one of ."),
        (["--plot", "x.nope"], ".png"),
        (["--rate", "-3"], "'--rate'"),
        (["--rate", "0"], "'--rate'"),
        (["--requests", "0"], "'--requests'"),
        (["--limit", "-1"], "'--limit'"),
        (["--spread", "-1"], "'--spread'"),
        (["--speed", "0"], "'--speed'"),
        (["--engine-speed", "-1"], "'--engine-speed'"),
        (["--metrics-interval", "0"], "'--metrics-interval'"),
        (["--metrics-age", "-1"], "'--metrics-age'"),
        (["--exchange-interval", "0"], "'--exchange-interval'"),
        (["--index-blocks", "0"], "'--index-blocks'"),
        (["--prefill-error", "0"], "'--prefill-error'"),
        (["--slo-ttft", "0"], "'--slo-ttft'"),
    ],
)
def test_options_are_checked_first(monkeypatch: pytest.MonkeyPatch, options: list[str], says: str) -> None:
    monkeypatch.setattr(command, "Simulation", None)
    done = CliRunner().invoke(command.replay, ["shared-prefix", *options])
    assert done.exit_code == 2
    assert says.replace("'", "") in done.stderr.replace("'", "")


@pytest.mark.parametrize("subcommand", [["show"], ["plot", "."]])
def test_the_matrix_says_where_results_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subcommand: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(matrix.main, subcommand)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "there are no results; make some with `python -m bench.replay.matrix run`" in done.stderr
