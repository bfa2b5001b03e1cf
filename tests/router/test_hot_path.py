"""The hot path does not grow unnoticed: bytecode instructions of one request, which no busy machine changes."""

import sys

import pytest

from bench.exchange_cost import exchanges, instructions

BUDGETS = {"random": 1950, "least-request": 2050, "marginal-delay": 4450}
"""Of a two-message exchange with a 4 KB chat and 64 pods, some 2 to 3 % above what it takes now."""


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="each Python compiles to instructions of its own")
@pytest.mark.parametrize("strategy", BUDGETS)
def test_a_request_takes_no_more_instructions_than_it_is_allowed(strategy: str) -> None:
    if sys.gettrace() is not None:
        pytest.skip("something else is tracing, coverage perhaps")
    assert 0.5 * BUDGETS[strategy] < instructions(exchanges(strategy, 64, 4096)).total() <= BUDGETS[strategy]
