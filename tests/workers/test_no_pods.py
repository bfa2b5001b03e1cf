"""A router without pods is ready, and refuses everything: its log says why."""

import asyncio
from pathlib import Path

import pytest
from fleet import make_tables
from structlog.testing import capture_logs

from state.tables import SCRAPER
from workers import scraper as scraper_module
from workers.config import load
from workers.scraper import Scraper


async def cures(endpoints: Path | None) -> list[str]:
    """Of the warnings."""
    with capture_logs() as said:
        scraper = Scraper(load(None, {"endpoints": endpoints}), make_tables(writer=SCRAPER))
        await scraper.discover()
        await scraper.discover()
    return [line["cure"] for line in said if line["log_level"] == "warning"]


async def test_names_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    """Else the cure would be to list what is listed."""
    path = tmp_path / "e.yaml"
    path.write_text("models: [{name: m, endpoints: ['b.invalid:1', 'a.invalid:1', 'a.invalid:2']}]")
    with capture_logs() as said:
        scraper = Scraper(load(None, {"endpoints": path}), make_tables(writer=SCRAPER))
        while not any("cure" in line for line in said):
            await scraper.discover()
    (cure,) = [line["cure"] for line in said if "cure" in line]
    assert cure == f"see that a.invalid, b.invalid can be resolved here, or correct {path}"


async def test_a_router_without_pods_says_so_once(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    assert await cures(None) == ["set `endpoints` or `kubernetes`"]
    path.write_text("models: []")
    assert await cures(path) == [f"list some in {path}"]


async def test_a_pod_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraper_module, "LOOK_SECONDS", 0.01)
    path = tmp_path / "e.yaml"
    path.write_text("models: [{name: m, endpoints: [{address: '127.0.0.1:1', name: one}]}]")
    tables = make_tables(writer=SCRAPER)
    with capture_logs() as said:
        running = asyncio.ensure_future(Scraper(load(None, {"endpoints": path}), tables).run())
        while not tables.catalog.read()[1].pods:
            await asyncio.sleep(0.01)
        path.write_text("models: []")
        while not (gone := [line for line in said if line["event"] == "a pod is gone"]):
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running])
    assert [(line["pod"], line["address"]) for line in gone] == [("one", "127.0.0.1:1")]
