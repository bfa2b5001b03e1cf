"""What users have used, by all writers of the last minutes, and what other replicas have counted."""

import numpy as np
import pytest
from fleet import make_tables

from state.tables import FIRST_WORKER, REPLICATOR, Tables
from state.user_tokens import CELLS, ROWS, WINDOW_SECONDS, UserTokens, cells_of


def used(tokens: UserTokens, user: str, now: float, without: int | None = None) -> float:
    first, second = cells_of(user)
    totals = tokens.totals(now, without)
    return float(min(totals[0, first], totals[1, second]))


def mirrored(user: str, tokens: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    totals = np.zeros((ROWS, CELLS))
    for row, cell in enumerate(cells_of(user)):
        totals[row, cell] = tokens
    return totals


def test_all_writers_count_together_for_as_long_as_the_window() -> None:
    tables = make_tables()
    one, two = tables.user_tokens, Tables.attach(tables.segment.fd, FIRST_WORKER + 1).user_tokens
    one.add("ann", 5, 1000.0)
    two.add("ann", 7, 1001.0)
    assert used(one, "ann", 1002.0) == used(two, "ann", 1002.0) == 12
    assert used(one, "ann", 1000.0 + WINDOW_SECONDS + 1) == 0


def test_what_other_replicas_counted_is_said_anew_each_time_and_is_not_ones_own() -> None:
    tables = make_tables()
    own = tables.user_tokens
    replicator = Tables.attach(tables.segment.fd, REPLICATOR).user_tokens
    own.add("ann", 5, 1000.0)
    replicator.mirror(mirrored("ann", 100.0), 1000.0)
    assert used(own, "ann", 1000.0) == 105
    assert used(own, "ann", 1000.0, without=REPLICATOR) == 5
    for now in np.arange(1001.0, 1001.0 + WINDOW_SECONDS, 20.0):
        replicator.mirror(mirrored("ann", 30.0), now)
        assert used(own, "ann", now) - used(own, "ann", now, without=REPLICATOR) == 30
    assert used(own, "ann", 1001.0 + 3 * WINDOW_SECONDS) == 0


def test_a_process_without_a_row_only_reads() -> None:
    tables = make_tables()
    reader = Tables.attach(tables.segment.fd).user_tokens
    with pytest.raises(ValueError, match="without a writer row"):
        reader.mirror(np.zeros((ROWS, CELLS)), 1.0)
    with pytest.raises(ValueError, match="without a writer row"):
        reader.add("ann", 1.0, 1.0)
