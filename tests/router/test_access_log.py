"""Charges that are left to Envoy's access log, and the entries that release them."""

import contextlib
import itertools
from random import Random

import fleet
import pytest
from fleet import BUFFERED, DUPLEX, NONE, chat, loads, read, request_body, request_headers, response_headers
from hypothesis import given
from hypothesis import strategies as st

from protos.access_log_pb2 import StreamAccessLogsMessage
from router.access_log import AccessLog
from router.exchange import Exchange, MessageError
from router.modes import EnvoyPeer
from router.policy import Policy
from router.replies import ENDPOINT, ENVOY_LB, NAMESPACE, Destination
from router.request_ids import RequestIds
from router.scheduler import Scheduler
from router.strategies import Context
from state.ledger import Entry
from state.tables import Tables


def scheduler(tables: Tables) -> Scheduler:
    return Scheduler(tables, "least-request", itertools.count(1000, 0.001).__next__, Context(Random(1)))


def route(by: Scheduler) -> dict[str, str]:
    """Send one request; what Envoy would keep as dynamic metadata."""
    exchange = Exchange(by, EnvoyPeer("access-log"), lambda: b"0" * 36, 10_000)
    exchange.receive(request_headers())
    (reply,) = read(exchange.receive(request_body(chat())))
    exchange.close()
    fields = reply.dynamic_metadata.fields[NAMESPACE].struct_value.fields
    return {key: value.string_value for key, value in fields.items()}


def entries(*finished: tuple[dict[str, str], int], client_left: bool = False) -> bytes:
    message = StreamAccessLogsMessage()
    for metadata, code in finished:
        entry = message.http_logs.log_entry.add()
        entry.response.response_code.value = code
        entry.common_properties.response_flags.downstream_connection_termination = client_left
        fields = entry.common_properties.metadata.filter_metadata[NAMESPACE].fields
        for key, value in metadata.items():
            fields[key].string_value = value
    return message.SerializeToString()


def test_another_worker_releases_what_this_one_charged() -> None:
    tables = fleet.make_fleet(2)
    one, two = scheduler(tables), scheduler(Tables.attach(tables.segment.fd, 5))
    sent = [route(one) for _ in range(6)]
    assert loads(tables)[:2] == [3, 3]
    AccessLog(two).receive(entries(*((metadata, 200) for metadata in sent)))
    for entry in (Entry.REQUESTS, Entry.TOKENS):
        assert loads(tables, entry) == [0] * 16
    assert sum(loads(tables, Entry.SUCCEEDED)) == 6


def test_a_batch_that_comes_after_the_end_counts() -> None:
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    log, sent = AccessLog(by), [route(by) for _ in range(2)]
    log.close()
    log.late(entries(*((metadata, 200) for metadata in sent)))
    log.late(None)
    assert loads(tables) == [0] * 16


def test_what_was_given_back_because_nobody_took_it_is_not_given_back_again() -> None:
    """Envoy took the decision after all, but had no pod for it, which another worker hears."""
    tables = fleet.make_fleet(1)
    one, two = scheduler(tables), scheduler(Tables.attach(tables.segment.fd, 5))
    exchange = Exchange(one, EnvoyPeer("access-log"), RequestIds().new, 10_000)
    exchange.receive(request_headers())
    (reply,) = read(exchange.receive(request_body(chat())))
    exchange.close()
    exchange.late(None)
    assert tables.ledger.load(0) == (0, 0)
    fields = reply.dynamic_metadata.fields[NAMESPACE].struct_value.fields
    metadata = {key: value.string_value for key, value in fields.items()}
    AccessLog(two).receive(entries((metadata, 503)))
    assert tables.ledger.load(0) == (0, 0)
    AccessLog(two).receive(entries((route(one), 200)))
    assert tables.ledger.load(0) == (0, 0)


def watched(by: Scheduler, request_id: bytes = b"", *, heeded: bool = True) -> tuple[Exchange, dict[str, str]]:
    """A request whose response shall be shown, and what Envoy's log will have of it."""
    peer = EnvoyPeer("access-log")
    if heeded:
        peer.has_shown()
    new_id = (lambda: request_id) if request_id else RequestIds().new
    exchange = Exchange(by, peer, new_id, 10_000, Policy(usage_metrics=True))
    exchange.receive(request_headers(modes=(BUFFERED, NONE)))
    (reply,) = read(exchange.receive(request_body(chat())))
    assert not exchange.finished
    fields = reply.dynamic_metadata.fields[NAMESPACE].struct_value.fields
    return exchange, {key: value.string_value for key, value in fields.items()}


def leave(exchange: Exchange, *, half_closed: bool = False) -> None:
    """Envoy ends the stream."""
    if half_closed:
        exchange.half_close()
    else:
        exchange.late(None)
    exchange.close()


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("log_first", [False, True])
def test_a_watched_request_whose_client_left_before_the_response_is_given_back_once(
    half_closed: bool, log_first: bool
) -> None:
    """Whether Envoy took the decision, and writes a log entry, or not."""
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    AccessLog(by).receive(entries((route(by), 200)))
    exchange, metadata = watched(by)
    goes_on = route(by)
    if not log_first:
        leave(exchange, half_closed=half_closed)
        assert tables.ledger.load(0)[0] == 1
    AccessLog(by).receive(entries((metadata, 0), client_left=True))
    assert tables.ledger.load(0)[0] == 1
    leave(exchange, half_closed=half_closed)
    assert tables.ledger.load(0)[0] == 1
    assert dict(by.series.items())["finished", "pod-0", "499"] == 1.0
    AccessLog(by).receive(entries((goes_on, 200)))
    assert tables.ledger.load(0) == (0, 0)


def test_another_request_of_the_same_trace_is_not_taken_for_one_that_was_given_back() -> None:
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    (first, _), (_, second) = watched(by, b"a" * 32), watched(by, b"a" * 32)
    leave(first)
    AccessLog(by).receive(entries((second, 200)))
    assert loads(tables) == [0] * 16
    assert sum(loads(tables, Entry.SUCCEEDED)) == 1


def test_a_request_that_is_sent_again_is_not_taken_for_the_one_that_was_left() -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    first, again = route(by), route(by)
    AccessLog(by).receive(entries((first, 0), client_left=True))
    AccessLog(by).receive(entries((again, 0), client_left=True))
    assert tables.ledger.load(0) == (0, 0)


@pytest.mark.parametrize("heeded", [False, True])
def test_a_watched_request_whose_stream_was_lost_is_left_to_the_log(heeded: bool) -> None:
    """And so is one of an Envoy that does not show responses when it is asked to."""
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    exchange, metadata = watched(by, heeded=heeded)
    if not heeded:
        exchange.half_close()
    exchange.close()
    assert tables.ledger.load(0)[0] == 1
    AccessLog(by).receive(entries((metadata, 200)))
    assert tables.ledger.load(0) == (0, 0)
    assert dict(by.series.items())["finished", "pod-0", "200"] == 1.0


def test_what_one_worker_saw_of_an_envoy_all_workers_know() -> None:
    """A second connection of the same Envoy may be to a worker that has not been shown a response yet."""
    first = fleet.make_fleet(1)
    second = Tables.attach(first.segment.fd, 5)
    peers = [
        EnvoyPeer(accounting, destination, tables.heeding)
        for tables in (first, second)
        for accounting in ("access-log", "stream")
        for destination in Destination
    ]
    EnvoyPeer("stream", "header", first.heeding).has_shown()
    assert not any(peer.heeds_overrides for peer in peers)
    EnvoyPeer("access-log", "metadata", first.heeding).has_shown()
    assert {peer.destination for peer in peers if peer.heeds_overrides} == {Destination.METADATA}
    assert EnvoyPeer("access-log", "metadata", second.heeding).heeds_overrides


@pytest.mark.parametrize(
    ("asked", "modes", "heeds"),
    [(True, (BUFFERED, NONE), True), (False, (BUFFERED, NONE), False), (True, (DUPLEX, DUPLEX), False)],
)
def test_only_a_response_that_was_asked_for_shows_that_it_is_shown_when_asked(
    asked: bool, modes: tuple[int, int], heeds: bool
) -> None:
    peer = EnvoyPeer("access-log")
    exchange = Exchange(scheduler(fleet.make_fleet(1)), peer, RequestIds().new, 10_000, Policy(usage_metrics=asked))
    exchange.receive(request_headers(modes=modes))
    exchange.receive(request_body(chat()))
    exchange.receive(response_headers())
    assert peer.heeds_overrides == heeds


def test_outcomes_by_status() -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    log = AccessLog(by)
    for code in (200, 404, 429, 500, 503, 504):
        log.receive(entries((route(by), code)))
    assert tables.ledger.total(Entry.SUCCEEDED, 0) == 3
    assert tables.ledger.total(Entry.FAILED, 0) == 3
    finished = {labels[1:]: value for labels, value in by.series.items() if labels[0] == "finished"}
    assert finished == {("pod-0", code): 1.0 for code in ("200", "404", "429", "500", "503", "504")}


@pytest.mark.parametrize(("code", "client_left"), [(0, False), (200, True), (503, True)])
def test_a_client_that_left_says_nothing_of_the_pod(code: int, client_left: bool) -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    AccessLog(by).receive(entries((route(by), code), client_left=client_left))
    assert tables.ledger.load(0) == (0, 0)
    assert tables.ledger.total(Entry.SUCCEEDED, 0) == tables.ledger.total(Entry.FAILED, 0) == 0
    assert ("finished", "pod-0", "499") in dict(by.series.items())


def test_the_successor_in_a_row_is_not_touched_by_its_predecessors_entries() -> None:
    tables = fleet.make_fleet(1)
    by = scheduler(tables)
    late = route(by)
    tables.pods.vacate(0)
    requests, tokens = tables.ledger.load(0)
    tables.ledger.settle(0, -requests, -tokens)
    tables.pods.claim(0, 9)
    AccessLog(by).receive(entries((late, 500)))
    assert tables.ledger.load(0) == (0, 0)
    assert tables.ledger.total(Entry.FAILED, 0) == 0


@pytest.mark.parametrize(
    "ticket",
    ["", ".", "..", "0.1", "0.1.2.3", "a.1.5", "-1.1.5", "0.1.-5", "0.1.5e3", "16.1.5", "9999999.1.5", "٣.1.5",
     "0.1." + "9" * 30, "0." + "9" * 30 + ".1", " 0.1.5"],
)  # fmt: skip
def test_what_is_no_ticket_is_passed_over(ticket: str) -> None:
    tables = fleet.make_fleet(1)
    before = [loads(tables, entry) for entry in Entry]
    for whole in (ticket, f"{tables.replica}.{ticket}"):
        AccessLog(scheduler(tables)).receive(entries(({"ticket": whole}, 200)))
    assert [loads(tables, entry) for entry in Entry] == before


def test_what_another_replica_routed_is_passed_over() -> None:
    here, there = fleet.make_fleet(2), fleet.make_fleet(2)
    by = scheduler(here)
    routed = [route(by), route(scheduler(there))]
    AccessLog(by).receive(entries((routed[1], 503)))
    assert sum(loads(here)) == 1
    assert sum(loads(here, Entry.FAILED)) == 0
    assert ("foreign",) in dict(by.series.items())
    AccessLog(by).receive(entries((routed[0], 200)))
    assert sum(loads(here)) == 0


def test_entries_of_requests_that_were_not_routed_are_passed_over() -> None:
    tables = fleet.make_fleet(1)
    message = StreamAccessLogsMessage()
    message.http_logs.log_entry.add()
    log = AccessLog(scheduler(tables))
    log.receive(message.SerializeToString())
    log.receive(b"")
    log.receive(entries(({"pod": "x"}, 200)))
    assert loads(tables) == [0] * 16
    assert not log.finished
    assert log.idle
    assert log.half_close() == b""


@given(st.binary(max_size=60))
def test_any_bytes_are_a_batch_or_a_message_error(message: bytes) -> None:
    with contextlib.suppress(MessageError):
        _LOG.receive(message)
    assert loads(_TABLES) == [0] * 16


_TABLES = fleet.make_fleet(1)
_LOG = AccessLog(scheduler(_TABLES))


def retried(metadata: dict[str, str], order: list[str], answered: str, code: int = 200) -> bytes:
    """An entry of a request that Envoy had a list of pods for."""
    message = StreamAccessLogsMessage.FromString(entries((metadata, code)))
    common = message.http_logs.log_entry[0].common_properties
    common.metadata.filter_metadata[ENVOY_LB].fields[ENDPOINT].string_value = ",".join(order)
    host, _, port = answered.rpartition(":")
    common.upstream_remote_address.socket_address.address = host.strip("[]")
    common.upstream_remote_address.socket_address.port_value = int(port)
    return message.SerializeToString()


@pytest.mark.parametrize("last", ["10.0.0.9:8000", "[fd00::9]:8000"])
def test_an_answer_after_retries_counts_for_the_pod_that_gave_it(last: str) -> None:
    addresses = ["10.0.0.1:8000", "10.0.0.2:8000", last]
    records = [fleet.make_record(slot, address=address) for slot, address in enumerate(addresses)]
    tables = fleet.make_fleet(records=records)
    by = scheduler(tables)
    while (first := route(by))["target"] == last:
        AccessLog(by).receive(entries((first, 0)))
    before = loads(tables, Entry.SUCCEEDED)
    assert before == [0] * 16
    order = [first["target"], *(r.address for r in records if r.address not in (first["target"], last)), last]
    AccessLog(by).receive(retried(first, order, last))
    slots = {record.address: record.slot for record in records}
    good, bad = loads(tables, Entry.SUCCEEDED), loads(tables, Entry.FAILED)
    assert [good[slots[address]] for address in order] == [0, 0, 1]
    assert [bad[slots[address]] for address in order] == [1, 1, 0]
    assert loads(tables) == [0] * 16
    finished = {labels[1:]: value for labels, value in by.series.items() if labels[0] == "finished"}
    assert finished[f"pod-{slots[last]}", "200"] == 1.0


@pytest.mark.parametrize("answered", ["first", "10.9.9.9:1"])
def test_an_answer_of_the_first_or_of_nobody_known_is_the_firsts(answered: str) -> None:
    tables = fleet.make_fleet(2)
    by = scheduler(tables)
    first = route(by)
    target = first["target"]
    AccessLog(by).receive(retried(first, [target, "10.0.0.2:8000"], target if answered == "first" else answered))
    assert sum(loads(tables, Entry.SUCCEEDED)) == 1
    assert sum(loads(tables, Entry.FAILED)) == 0
