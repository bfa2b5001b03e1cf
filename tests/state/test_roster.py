"""The table of processes."""

from fleet import SMALL, make_tables

from state.roster import Kind, Phase, Process


def test_processes_come_and_go() -> None:
    tables = make_tables()
    assert tables.roster.processes() == []
    worker = Process(Kind.WORKER, 0, 4711, Phase.READY, 2)
    scraper = Process(Kind.SCRAPER, 0, 4712, Phase.STARTING, 0)
    tables.roster.put(3, worker)
    tables.roster.put(1, scraper)
    assert tables.roster.processes() == [scraper, worker]
    tables.roster.put(3, worker._replace(phase=Phase.DRAINING))
    tables.roster.clear(1)
    assert tables.roster.processes() == [worker._replace(phase=Phase.DRAINING)]


def test_there_is_a_row_for_every_writer() -> None:
    tables = make_tables()
    for row in range(SMALL.writers):
        tables.roster.put(row, Process(Kind.WORKER, row, row + 1, Phase.READY, 0))
    assert [process.number for process in tables.roster.processes()] == list(range(SMALL.writers))


def test_a_row_that_is_half_written_is_passed_over() -> None:
    tables = make_tables()
    tables.roster._rows[2] = [int(Kind.WORKER), 1, 0, 0, 0]
    assert tables.roster.processes() == []


def test_every_process_has_a_heartbeat_of_its_own() -> None:
    tables = make_tables()
    tables.roster.put(2, Process(Kind.WORKER, 0, 7, Phase.READY, 0))
    for row in (0, 2, 2, SMALL.writers - 1):
        tables.roster.beat(row)
    assert [tables.roster.beats(row) for row in range(SMALL.writers)] == [1, 0, 2, *[0] * (SMALL.writers - 4), 1]
    assert tables.roster.processes() == [Process(Kind.WORKER, 0, 7, Phase.READY, 0)]
