"""A router without pods is ready, and refuses everything: its log says why."""

from pathlib import Path

from fleet import make_tables
from structlog.testing import capture_logs

from state.tables import SCRAPER
from workers.config import load
from workers.scraper import Scraper


async def cures(endpoints: Path | None) -> list[str]:
    """Of the warnings."""
    with capture_logs() as said:
        scraper = Scraper(load(None, {"endpoints": endpoints}), make_tables(writer=SCRAPER))
        await scraper.discover()
        await scraper.discover()
    return [line["cure"] for line in said if line["log_level"] == "warning"]


async def test_a_router_without_pods_says_so_once(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    assert await cures(None) == ["set `endpoints`"]
    path.write_text("models: []")
    assert await cures(path) == [f"list some in {path}"]
