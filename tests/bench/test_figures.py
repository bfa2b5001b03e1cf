"""`pointsman bench`: real servers under very short loads, whose figures mean nothing, and what is made of figures."""

import http.client
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench.figures import accounting, document, plot, rig
from bench.figures.bars import BARS, BODY_KILOBYTES, Bar
from bench.figures.command import bench
from bench.figures.figure import Figure, Outcome, Section, markdown, number, table
from bench.figures.rig import BenchError, Missing, Rig
from bench.figures.sections import SECTIONS
from bench.figures.streams import PROCESS, two_messages
from bench.lab import get
from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from workers.config import Config
from workers.envoy import bootstrap
from workers.envoy_binary import envoy_path

ROOT = Path(__file__).parents[2]
needs_go = pytest.mark.skipif(
    shutil.which("go") is None and not (ROOT / "bin" / "extload").exists(),
    reason="needs Go to build the load generator",
)

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")


@needs_go
def test_streams_are_driven_counted_and_charged() -> None:
    with Rig(seconds=0.2, rounds=1) as bench_rig:
        server = bench_rig.program("bench.h2_server")
        load = bench_rig.load(server, "-size", 2048, "-c", 4, "-chunks", 5)
        assert load.streams > 10
        assert load.chunks == 5 * load.streams
        assert set(load.targets) == {"10.0.0.1:8000"}
        assert load.latency_microseconds["p50"] <= load.latency_microseconds["p99"]
        assert bench_rig.load(server, "-size", 1024, "-rate", 100, seconds=0.3).streams < 100


@needs_go
def test_a_stream_that_fails_spoils_the_figure() -> None:
    with Rig(seconds=0.1, rounds=1) as bench_rig:
        lab = bench_rig.router([], workers=1)
        with pytest.raises(BenchError, match="streams failed: immediate response"):
            bench_rig.load(rig.Server(lab.worker_addresses[0], ()), "-size", 1024, "-c", 1)


@needs_go
def test_both_yardsticks_and_the_router_answer_what_h2load_and_ghz_send() -> None:
    with Rig(seconds=0.1, rounds=1) as bench_rig:
        pods = bench_rig.pods(2)
        addresses = {
            bench_rig.router(pods, workers=1).worker_addresses[0]: set(pods),
            bench_rig.program("bench.grpc_aio_baseline").address: {"10.0.0.1:8000"},
            bench_rig.program("bench.h2_server").address: {"10.0.0.1:8000"},
        }
        for address, expected in addresses.items():
            assert _target(address, two_messages(2048)) in expected
            if (ROOT / "bin" / "ghz").exists():
                command = [sys.executable, "-m", "bench.ghz.run", address, "--", "-n", "20", "-c", "2"]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
                assert "[OK]   20 responses" in done.stdout


def _split(messages: bytes) -> tuple[bytes, bytes]:
    """The two gRPC messages, without what frames them."""
    first = int.from_bytes(messages[1:5], "big")
    assert len(messages[10 + first :]) == int.from_bytes(messages[6 + first : 10 + first], "big")
    return messages[5 : 5 + first], messages[10 + first :]


def _target(address: str, messages: bytes) -> str:
    """Where the server sends the request of these gRPC messages."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(PROCESS, response_deserializer=ProcessingResponse.FromString)
        replies = list(call(iter(_split(messages)), timeout=10))
    assert [reply.WhichOneof("response") for reply in replies] == ["request_headers", "request_body"]
    options = replies[1].request_body.response.header_mutation.set_headers
    (target,) = [each.header.raw_value.decode() for each in options if each.header.key == "target-pod"]
    return target


def test_the_chat_for_h2load_has_the_size_it_says() -> None:
    _, body = _split(two_messages(2048))
    chat = ProcessingRequest.FromString(body).request_body.body
    assert len(chat) == 2048
    assert json.loads(chat)["messages"][0]["content"]


@needs_go
def test_a_section_prints_its_figures_beside_bars_that_it_has() -> None:
    done = CliRunner().invoke(bench, ["strategies", "--seconds", "0.3", "--rounds", "1", "--json"])
    assert done.exit_code == 0, done.output
    section = json.loads(done.stdout)["sections"]["strategies"]
    figures = {figure["key"]: figure for figure in section["figures"]}
    assert figures["strategies/errors"]["value"] == 0
    assert figures["strategies/round-robin"]["bar"] == 10
    assert {key for key in BARS if key.startswith("strategies/")} <= set(figures)


@needs_go
@needs_wrk
@pytest.mark.envoy
def test_every_mode_is_measured_with_every_kind_of_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: accounting.ANSWERS[name] for name in ("json", "sse-usage")}
    monkeypatch.setattr(accounting, "ANSWERS", kinds)
    done = CliRunner().invoke(bench, ["accounting", "--seconds", "0.3", "--rounds", "1", "--json"])
    assert done.exit_code == 0, done.output
    section = json.loads(done.stdout)["sections"]["accounting"]
    assert {figure["key"] for figure in section["figures"]} == {
        f"accounting/{mode}/{what}" for mode in accounting.MODES for what in (*kinds, "p50", "p99")
    }
    assert all(figure["value"] > 0 for figure in section["figures"] if figure["unit"] == "µs")


def _messages(config: Config) -> int:
    """What this Envoy has sent to the router."""
    status, stats = get(config.envoy.admin, "/stats?filter=ext_proc.stream_msgs_sent")
    assert status == 200
    return int(stats.rpartition(b":")[2])


@needs_go
@pytest.mark.envoy
def test_the_modes_differ_in_how_much_of_a_response_the_router_sees() -> None:
    seen = {}
    with Rig(seconds=0.1, rounds=1) as bench_rig:
        pods = bench_rig.pods(1, "-chunks", 10, "-gap", "20ms")
        limits = {"users_file": str(bench_rig.users(accounting.COUNTED_USER))}
        lab = bench_rig.router(pods, workers=1, more={"limits": limits})
        for mode in accounting.MODES:
            config = accounting.envoy_of(lab.config, mode)
            document = bootstrap(config)
            bench_rig.envoy(envoy_path(), accounting.as_aibrix(document) if mode == "aibrix" else document)
            for user in ("", accounting.COUNTED_USER):
                before = _messages(config)
                _ask_for_a_stream(config, user)
                seen[mode, user] = _messages(config) - before
    assert (seen["access-log", ""], seen["stream", ""]) == (2, 3)
    assert seen["aibrix", ""] > 10
    assert all(seen[mode, accounting.COUNTED_USER] > 10 for mode in accounting.MODES)


def _ask_for_a_stream(config: Config, user: str) -> None:
    body = {"model": rig.MODEL, "stream": True, "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": "hi"}]}  # fmt: skip
    connection = http.client.HTTPConnection(config.envoy.listen, timeout=10)
    headers = {"content-type": "application/json", **({"user": user} if user else {})}
    connection.request("POST", "/v1/chat/completions", json.dumps(body, separators=(",", ":")), headers)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    assert (response.status, said.count(b"data: ")) == (200, 12)
    assert said.endswith(b"data: [DONE]\n\n") and b'"usage":{' in said


def test_every_bar_belongs_to_a_section() -> None:
    assert {key.partition("/")[0] for key in BARS} <= set(SECTIONS)


def test_bars_from_above_and_from_below() -> None:
    assert Bar(10).met(10)
    assert not Bar(10).met(10.1)
    assert Bar(10, at_least=True).met(11)
    assert not Bar(10, at_least=True).met(9)
    assert Bar().met(5) is None


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0, 0.03456, 4.567, 55.04, 234.5, 39712.3)] == [
        "0", "0.0346", "4.57", "55", "234", "39,712",
    ]  # fmt: skip


def _outcome(name: str, *figures: Figure, **more: str) -> Outcome:
    return Outcome(Section(name, "A title", "What it is.", lambda _: []), list(figures), **more)


def test_a_figure_is_shown_with_its_rounds_its_bar_and_others() -> None:
    outcome = _outcome("chunks", Figure.over("chunks/h2", "h2", [16.0, 12.0, 20.0], "µs", "a note"))
    assert "| h2 | 16 µs | 12 to 20 | ≤ 15 | AIBrix 17.4, llm-d 29-37 | **missed** |" in markdown(outcome)
    assert "- h2: a note." in markdown(outcome)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(table(outcome))
    shown = console.export_text()
    assert "16 µs" in shown and "missed" in shown and "another machine" in shown


def test_a_document_keeps_what_is_not_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    empty = "\n".join(f"<!-- bench:{name} -->\nold {name}\n<!-- /bench:{name} -->" for name in ("machine", "a", "b"))
    path.write_text(f"before\n{empty}\nafter\n")
    document.write(path, [_outcome("a", missing="wrk (apt-get install wrk)")], {"cores": "2"}, 3, 3)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old a" not in text and "old b" in text and "old machine" not in text
    assert "Not measured: wrk (apt-get install wrk)." in text
    with pytest.raises(document.NoMarkers, match="<!-- bench:c -->"):
        document.write(path, [_outcome("c")], {}, 3, 3)


def test_the_page_in_docs_has_a_place_for_every_section() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in SECTIONS:
        assert f"<!-- bench:{name} -->" in text, name


def test_the_picture_has_everybody_in_it(tmp_path: Path) -> None:
    figures = [Figure(f"streams/{kind}/{size}", "", 50.0 * size, "µs") for kind in plot.OURS for size in BODY_KILOBYTES]
    named = plot.bars(figures)
    assert named["pointsman least-request"] == (50, 200, 3200)
    path = tmp_path / "picture.svg"
    plot.draw(named, path)
    assert "AIBrix prefix-cache" in path.read_text()


def test_what_is_missing_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rig, "BIN", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match=r"Go \(1\.26"):
        rig.generator()
    with pytest.raises(Missing, match=r"wrk \(apt-get install wrk\)"):
        rig.tool("wrk", "wrk")
    done = CliRunner().invoke(bench, ["bodies", "--json"])
    monkeypatch.setattr(rig, "GENERATOR", tmp_path / "extload")
    with pytest.raises(Missing, match="a clone of pointsman"):
        rig.generator()
    assert done.exit_code == 0
    assert json.loads(done.stdout)["sections"]["bodies"]["missing"].startswith("Go")
