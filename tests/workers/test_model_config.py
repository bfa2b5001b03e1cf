"""Routing profiles that a pod's annotation brings: one that cannot be followed harms nobody but itself."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from structlog.testing import capture_logs

from workers.discovery.file_source import FileSource
from workers.discovery.model_config import usable
from workers.discovery.registry import FoundPod
from workers.scraper import _with_usable_profiles

GOOD = {"profiles": {"default": {"routingStrategy": "least-request"}, "x": None}}


@pytest.fixture(autouse=True)
def _nothing_was_said_yet() -> None:
    usable.cache_clear()


@pytest.mark.parametrize(
    ("bad", "left"),
    [
        ({"profiles": {**GOOD["profiles"], "y": {"routingStrategy": "nope"}}}, GOOD),
        ({"profiles": {**GOOD["profiles"], "y": 7, "z": {"requestsPerSecond": "5"}}}, GOOD),
        ({**GOOD, "lockedRoutingStrategy": "dp"}, GOOD),
        ({"profiles": 7}, {}),
        ("[]", ""),
        ("{", ""),
    ],
)
def test_what_cannot_be_followed_is_left_out_and_said_once(bad: object, left: object) -> None:
    text = bad if isinstance(bad, str) else orjson.dumps(bad).decode()
    pod = FoundPod("10.0.0.1:1", "pod-a", ("m",), labels={"a": "b", "model.aibrix.ai/config": text})
    with capture_logs() as said:
        for _ in range(2):
            labels = dict(_with_usable_profiles(pod).labels)
    rest = labels.pop("model.aibrix.ai/config")
    assert (orjson.loads(rest) if rest else "") == left
    assert labels == {"a": "b"}
    assert said and all(line["pod"] == "pod-a" and line["error"] for line in said)
    assert len(said) == (2 if isinstance(bad, dict) and "z" in str(bad) else 1)


@pytest.mark.parametrize("text", [orjson.dumps(GOOD).decode(), '{"profiles": {"x": {}}, "newer": 1}', "{}"])
def test_what_can_be_followed_stays_as_it_is(text: str) -> None:
    pod = FoundPod("10.0.0.1:1", "pod-a", ("m",), labels={"model.aibrix.ai/config": text})
    with capture_logs() as said:
        assert orjson.loads(_with_usable_profiles(pod).labels["model.aibrix.ai/config"]) == orjson.loads(text)
        assert _with_usable_profiles(replace(pod, labels={})).labels == {}
    assert not said


async def test_a_file_with_such_a_profile_changes_nothing_and_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("models: [{name: m, endpoints: ['10.0.0.1:1'], config: {profiles: {default: {}}}}]")
    source = FileSource(path)
    source.reload()
    before = await source.resolve()
    path.write_text("models: [{name: m, endpoints: [], config: {profiles: {default: {routingStrategy: nope}}}}]")
    with capture_logs() as said:
        source.reload()
        source.reload()
    assert await source.resolve() == before == (before[0], {"m": {"profiles": {"default": {}}}})
    (line,) = said
    assert line["log_level"] == "error" and "no strategy 'nope'" in line["error"]
