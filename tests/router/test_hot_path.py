"""The hot path does not grow unnoticed: bytecode instructions of one request, which no busy machine changes."""

import json
import subprocess
import sys

import pytest

from bench.interpreted import ROOT

BUDGETS = {"random": 3150, "least-request": 4220, "marginal-delay": 9680}
"""Of a two-message exchange with a 4 KB chat and 64 pods, some 3 % above what it takes now."""


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="each Python compiles to instructions of its own")
@pytest.mark.parametrize("strategy", BUDGETS)
def test_a_request_takes_no_more_instructions_than_it_is_allowed(strategy: str) -> None:
    command = [sys.executable, "-m", "bench.interpreted", "bench.exchange_cost", "--instructions", "--json"]
    done = subprocess.run([*command, "--strategy", strategy], cwd=ROOT, capture_output=True, check=True, timeout=100)
    assert 0.5 * BUDGETS[strategy] < sum(json.loads(done.stdout).values()) <= BUDGETS[strategy]
