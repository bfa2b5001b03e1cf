"""What one exchange costs, part by part: `python -m bench.exchange_cost [--strategy NAME] [--pods N] [--json]`.

CPU time of this process (not wall time), best of several rounds, in microseconds. The messages are those of
`extload`: thirteen headers, a chat body of the given size.

`--instructions` counts bytecode instructions instead, function by function, of the interpreted code: `python -m
bench.interpreted bench.exchange_cost --instructions`. A busy machine changes nothing about them, and time follows them
(interpreted, a cold one costs 15 to 40 ns), so they tell whether a change made the hot path longer;
`tests/router/test_hot_path.py` holds them against a budget.
"""

import argparse
import itertools
import json
import random
import sys
import time
import timeit
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import orjson

from protos.access_log_pb2 import HTTPAccessLogEntry
from protos.ext_proc_pb2 import ProcessingRequest
from router import log_wire, wire
from router.bodies import read_body
from router.exchange import EnvoyPeer, Exchange, _plain
from router.prefixes import Prefixes
from router.replies import NAMESPACE
from router.request_ids import RequestIds
from router.scheduler import Scheduler
from router.strategies import Context
from state.catalog import CatalogDocument, PodRecord
from state.pods import FIELDS, Health
from state.tables import FIRST_WORKER, Capacity, Tables
from workers.compiled import is_compiled

MODEL = "llama-3-8b"
LOG = Path(__file__).parents[1] / "tests" / "fixtures" / "envoy-1.40" / "access-log.bin"
HEADERS = {
    ":authority": "llm.example.com",
    ":path": "/v1/chat/completions",
    ":method": "POST",
    ":scheme": "http",
    "content-type": "application/json",
    "content-length": "4000",
    "user-agent": "OpenAI/Python 1.50.2",
    "authorization": "Bearer sk-12345678901234567890",
    "accept": "application/json",
    "accept-encoding": "gzip, deflate",
    "x-forwarded-proto": "http",
    "x-request-id": "b7a5b4d2-7d8f-4a86-98b8-3e2d2f1b8f11",
    "x-stainless-lang": "python",
}


def fleet(pods: int) -> Tables:
    """Tables with that many pods, all ready."""
    tables = Tables.create(Capacity(pods=max(pods, 64)), FIRST_WORKER)
    tables.ledger.admit(FIRST_WORKER)
    row = np.full(len(FIELDS), np.nan)
    row[: FIELDS.index("running")] = 0.0
    row[FIELDS.index("health")] = Health.READY
    records = []
    for slot in range(pods):
        tables.pods.claim(slot, slot + 1)
        tables.pods.write(slot, row)
        records.append(PodRecord(slot, slot + 1, f"pod-{slot}", f"10.0.{slot // 250}.{slot % 250}:8000", (MODEL,)))
    tables.catalog.publish(CatalogDocument(tuple(records)))
    return tables


def messages(size: int) -> tuple[bytes, bytes, bytes]:
    """(request headers, request body, the JSON in it)."""
    headers = ProcessingRequest()
    for name, value in HEADERS.items():
        headers.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    text = "You are a helpful assistant, and this is what you know. " * (size // 56 + 1)
    document = {
        "model": MODEL,
        "stream": False,
        "max_tokens": 64,
        "messages": [{"role": "system", "content": text[: max(size - 150, 1)]}, {"role": "user", "content": "hello"}],
    }
    body = ProcessingRequest()
    body.request_body.body = orjson.dumps(document)
    body.request_body.end_of_stream = True
    return headers.SerializeToString(), body.SerializeToString(), body.request_body.body


def measured(run: Callable[[], object], rounds: int = 5, number: int = 5000) -> float:
    """CPU microseconds of one call."""
    run()
    return min(timeit.repeat(run, number=number, repeat=rounds, timer=time.process_time)) / number * 1e6


def exchanges(strategy: str, pods: int, size: int) -> Callable[[], None]:
    """Runs one two-message exchange per call, of prompts that share their first 70 % with one in 200, while sixteen
    others are open."""
    tables = fleet(pods)
    clock = itertools.count(1000.0, 0.00005).__next__
    scheduler = Scheduler(tables, strategy, clock, Context(random.Random(1), prefixes=Prefixes.of(tables)))
    peer, new_id = EnvoyPeer(), RequestIds().new
    chance = random.Random(1)
    sessions = ["".join(chance.choices("abcdefghij klmnop", k=size * 7 // 10)) for _ in range(200)]
    headers, _, _ = messages(size)
    still_open: deque[Exchange] = deque()

    def run() -> None:
        content = chance.choice(sessions) + "".join(chance.choices("abcdefgh ij", k=size * 3 // 10))
        document = {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": content}]}
        body = ProcessingRequest()
        body.request_body.body, body.request_body.end_of_stream = orjson.dumps(document), True
        message = body.SerializeToString()
        stream = Exchange(scheduler, peer, new_id, 1 << 26)
        stream.receive(headers)
        stream.receive(message)
        still_open.append(stream)
        if len(still_open) > 16:
            still_open.popleft().close()

    return run


def instructions(run: Callable[[], None], rounds: int = 300, warm: int = 1500) -> Counter[str]:
    """Bytecode instructions of one call by function, without those of `run` itself."""
    counts: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode" and frame.f_code is not code and frame.f_code.co_filename != random.__file__:
            counts[frame.f_code.co_qualname] += 1
        return trace

    code = run.__code__
    for _ in range(warm):
        run()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _ in range(rounds):
            run()
    finally:
        sys.settrace(before)
    return Counter({name: round(count / rounds) for name, count in counts.items()})


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="least-request")
    parser.add_argument("--pods", type=int, default=64)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    chosen = parser.parse_args()
    if chosen.instructions:
        if is_compiled():
            parser.error("compiled modules have no bytecode: python -m bench.interpreted bench.exchange_cost ...")
        found = instructions(exchanges(chosen.strategy, chosen.pods, chosen.size))
        if chosen.json:
            print(json.dumps(found))
            return 0
        print(f"{chosen.strategy}, {chosen.pods} pods, {chosen.size} bytes: {found.total()} bytecode instructions")
        for name, count in found.most_common(40):
            print(f"  {name:45} {count:5}")
        return 0

    scheduler = Scheduler(fleet(chosen.pods), chosen.strategy, time.monotonic, Context())
    peer, new_id = EnvoyPeer(), RequestIds().new
    headers, body, document = messages(chosen.size)
    headers_part, body_part = wire.phase_part(headers), wire.phase_part(body)
    assert headers_part is not None and body_part is not None

    def exchange() -> None:
        stream = Exchange(scheduler, peer, new_id, 1 << 26)
        stream.receive(headers)
        stream.receive(body)
        stream.close()

    def headers_only() -> None:
        stream = Exchange(scheduler, peer, new_id, 1 << 26)
        stream.receive(headers)
        stream.close()

    batch = LOG.read_bytes()
    places = log_wire.entries(batch)
    assert places is not None
    start, end = places[0]

    def log_entry() -> tuple[str, int]:
        entry = HTTPAccessLogEntry.FromString(batch[start:end])
        fields = entry.common_properties.metadata.filter_metadata[NAMESPACE].fields
        return fields["ticket"].string_value + fields["pod"].string_value, entry.response.response_code.value

    figures = {
        "two-message exchange": measured(exchange),
        "of it, request headers": measured(headers_only),
        "headers where they lie": measured(lambda: wire.read_headers(headers, headers_part, wire.REQUEST_NAMES)),
        "headers by protobuf": measured(
            lambda: _plain(ProcessingRequest.FromString(headers).request_headers, wire.REQUEST_NAMES)
        ),
        "body where it lies": measured(lambda: wire.read_body(body, body_part)),
        "body by protobuf": measured(lambda: ProcessingRequest.FromString(body).request_body.body),
        "orjson.loads": measured(lambda: orjson.loads(document)),
        "body read and checked": measured(lambda: read_body("/v1/chat/completions", "application/json", document)),
        "request id": measured(new_id),
        "log entry where it lies": measured(lambda: log_wire.read(batch, start, end)),
        "log entry by protobuf": measured(log_entry),
    }
    if chosen.json:
        print(json.dumps(figures))
    else:
        print(f"{chosen.strategy}, {chosen.pods} pods, {chosen.size} bytes: CPU microseconds")
        for name, microseconds in figures.items():
            print(f"  {name:26} {microseconds:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
