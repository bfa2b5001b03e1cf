"""Counters in shared memory: exact, bounded, and never lower after a restart."""

import pytest
from fleet import end_of, in_child, make_tables
from hypothesis import given
from hypothesis import strategies as st

from state.segment import Segment
from state.series import DECISION_BUCKETS, LABEL_BYTES, OVERFLOW, OVERFLOW_ROWS, Histogram, Series, merge
from state.tables import FIRST_WORKER


def make_series(rows: int = 40) -> tuple[Series, memoryview]:
    region = Segment.create({"series": Series.size(rows)}).region("series")
    return Series(region), region


def test_counters_and_gauges() -> None:
    series, _ = make_series()
    series.add(1.0, "a", "x")
    series.add(2.5, "a", "x")
    series.add(1.0, "a", "y")
    series.put(7.0, "g")
    series.put(3.0, "g")
    assert dict(series.items()) == {("a", "x"): 3.5, ("a", "y"): 1.0, ("g",): 3.0}
    series.values[series.cell("a", "x")] += 1
    assert dict(series.items())["a", "x"] == 4.5


def test_a_successor_goes_on_from_where_its_predecessor_was() -> None:
    series, region = make_series()
    series.add(5.0, "a", "x")
    successor = Series(region)
    successor.add(1.0, "a", "x")
    successor.add(1.0, "b")
    assert dict(successor.items()) == {("a", "x"): 6.0, ("b",): 1.0}


def test_a_killed_process_leaves_its_counts() -> None:
    tables = make_tables()

    def work() -> None:
        tables.series(5).add(4.0, "a", "x")

    assert end_of(in_child(work)) == 0
    tables.series(5).add(1.0, "a", "x")
    assert dict(tables.series(5).items()) == {("a", "x"): 5.0}


def test_what_does_not_fit_is_added_up_under_its_own_metric() -> None:
    rows = 64
    series, _ = make_series(rows)
    for metric in ("a", "b", "c"):
        for number in range(1000):
            series.add(1.0, metric, str(number))
    found = dict(series.items())
    assert len(found) <= rows
    for metric in ("a", "b", "c"):
        assert sum(value for labels, value in found.items() if labels[0] == metric) == 1000
    assert found["b", OVERFLOW] > 900
    assert len(series._index) <= rows


def test_more_metrics_than_overflow_rows_lose_no_count() -> None:
    series, _ = make_series(64)
    for metric in range(OVERFLOW_ROWS * 2):
        for number in range(10):
            series.add(1.0, f"m{metric}", str(number))
    assert sum(value for _, value in series.items()) == OVERFLOW_ROWS * 20


def test_a_successor_of_a_full_writer_finds_its_rows() -> None:
    series, region = make_series(20)
    for number in range(50):
        series.add(1.0, "a", str(number))
    successor = Series(region)
    for number in range(50):
        successor.add(1.0, "a", str(number))
    found = dict(successor.items())
    assert sum(found.values()) == 100
    assert found["a", "3"] == 2


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=300), min_size=1, max_size=5))
def test_labels_of_any_length_keep_their_number(labels: list[str]) -> None:
    series, region = make_series()
    series.add(1.0, "metric", *labels)
    ((found, value),) = list(Series(region).items())
    assert value == 1.0
    assert found[0] == "metric"
    assert len(found) == 1 + len(labels)
    for was, label in zip(labels, found[1:], strict=True):
        assert was.startswith(label)
    if len("\x1f".join(["metric", *labels]).encode()) <= LABEL_BYTES:
        assert list(found[1:]) == labels


def test_long_labels_still_count_one_by_one() -> None:
    series, region = make_series()
    for _ in range(3):
        series.add(1.0, "decisions", "m" * 400, "pod", "random")
    Series(region).add(1.0, "decisions", "m" * 400, "pod", "random")
    total = merge([Series(region)])
    assert list(total.values()) == [4.0]
    ((name, model, pod, strategy),) = total
    assert (name, pod, strategy) == ("decisions", "pod", "random")
    assert model == "m" * len(model)


@pytest.mark.parametrize("value", [0.0, 1e-6, 5e-6, 5.1e-6, 0.003, 1.0, 2.0])
def test_histogram_counts_a_value_in_the_first_bucket_that_holds_it(value: float) -> None:
    series, _ = make_series()
    Histogram(series, "h").observe(value)
    found = dict(series.items())
    bound = next((bound for bound in DECISION_BUCKETS if value <= bound), float("inf"))
    assert [labels for labels, count in found.items() if labels[1] == "le" and count] == [("h", "le", repr(bound))]
    assert found["h", "sum"] == value


def test_a_histogram_goes_on_after_a_restart() -> None:
    series, region = make_series()
    Histogram(series, "h").observe(0.5)
    Histogram(Series(region), "h").observe(0.5)
    assert dict(Series(region).items())["h", "le", "1.0"] == 2


def test_merge_adds_up_over_all_writers() -> None:
    tables = make_tables()
    for writer in range(3):
        tables.series(writer).add(writer + 1.0, "a", "x")
        tables.series(writer).add(1.0, "b", str(writer))
    assert merge(tables.all_series()) == {("a", "x"): 6.0, ("b", "0"): 1.0, ("b", "1"): 1.0, ("b", "2"): 1.0}


def test_rows_of_pods_that_are_gone_are_given_back_when_they_are_needed() -> None:
    series, region = make_series(64)
    series.add(3.0, "refused", "400", "none")
    for generation in range(100):
        pods = {f"pod-{generation}-{number}" for number in range(3)}
        series.reclaim(pods)
        for pod in pods:
            series.add(1.0, "finished", pod, "200")
            series.add(1.0, "decisions", "m", pod, "random")
    found = dict(series.items())
    assert all(found["finished", pod, "200"] == found["decisions", "m", pod, "random"] == 1.0 for pod in pods)
    assert ("finished", OVERFLOW) not in found
    assert found["refused", "400", "none"] == 3.0
    successor = Series(region)
    assert dict(successor.items()) == found
    successor.add(1.0, "finished", "another", "200")
    assert dict(successor.items()) == {**found, ("finished", "another", "200"): 1.0}


def test_while_there_is_room_nothing_is_given_back() -> None:
    series, _ = make_series(64)
    for pod in ("a", "b"):
        series.add(1.0, "finished", pod, "200")
    assert series.reclaim(set()) == 0
    assert len(dict(series.items())) == 2


def test_totals_beyond_the_last_row_are_never_given_back() -> None:
    series, _ = make_series(64)
    for number in range(100):
        series.add(1.0, "finished", str(number), "200")
    before = dict(series.items())["finished", OVERFLOW]
    assert series.reclaim(set()) > 0
    assert dict(series.items()) == {("finished", OVERFLOW): before}


def test_two_objects_for_one_region_never_give_out_the_same_row() -> None:
    first, region = make_series(64)
    for number in range(40):
        first.add(1.0, "finished", f"gone-{number}", "200")
    assert first.reclaim(set()) == 40
    one, other = Series(region), Series(region)
    one.add(40.0, "finished", "pod-1", "200")
    other.add(1.0, "limits_outage", "open")
    one.add(2.0, "finished", "pod-1", "200")
    assert dict(Series(region).items()) == {("finished", "pod-1", "200"): 42.0, ("limits_outage", "open"): 1.0}


def test_what_is_about_no_pod_or_one_whose_name_was_cut_is_kept() -> None:
    series, region = make_series(64)
    long = "pod-" + "x" * LABEL_BYTES
    for number in range(40):
        series.add(1.0, "finished", f"gone-{number}", "200")
    series.add(2.0, "finished", "", "200")
    series.add(3.0, "decisions", "m" * 200, long, "random")
    series.add(4.0, "refused", "400", "none")
    successor = Series(region)
    assert successor.reclaim({long}) == 40
    assert sorted(value for _, value in successor.items()) == [2.0, 3.0, 4.0]


def test_gauges_end_with_their_process() -> None:
    tables = make_tables()
    tables.series().put(3.0, "transport_level", "connections_open")
    tables.series().add(2.0, "transport", "frames")
    tables.series(FIRST_WORKER).clear_levels()
    assert dict(tables.series().items()) == {("transport_level", "connections_open"): 0.0, ("transport", "frames"): 2.0}
