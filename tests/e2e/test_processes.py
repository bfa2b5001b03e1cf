"""What happens to running requests when processes die, drain, are replaced, and when pods come and go."""

import asyncio
import json
import os
import random
import signal
import time
from pathlib import Path

import aiohttp
import pytest
from client import chat, in_flight, send, steady_load
from waiting import until_told

from bench.lab import Lab, get
from workers.scrape.settle import PATIENCE_SECONDS

pytestmark = pytest.mark.envoy


def ready(lab: Lab) -> bool:
    try:
        return get(lab.config.admin, "/readyz")[0] == 200
    except OSError:  # the admin process is being replaced
        return False


@pytest.fixture
def lab() -> Lab:
    return Lab(pods=3, workers=2, strategy="least-request")


async def test_a_killed_worker_costs_at_most_one_request(lab: Lab) -> None:
    with lab:
        before = lab.router_children()
        async with steady_load(lab.envoy_url, lab.model, per_second=20, max_tokens=40) as load:
            await asyncio.sleep(1.5)
            os.kill(before["worker 0"], signal.SIGKILL)
            killed = time.monotonic()
            await until_told(lambda: lab.router_children().get("worker 0", before["worker 0"]) != before["worker 0"])
            back = time.monotonic() - killed
            await asyncio.sleep(3)
        assert len(load.outcomes) > 60
        assert len(load.failed) <= 1, load.failed
        after = lab.router_children()
        assert {name: pid for name, pid in after.items() if name != "worker 0"} == {
            name: pid for name, pid in before.items() if name != "worker 0"
        }
        assert back < 1.0
        # A log entry that died with the worker leaves a charge behind, which is settled against the engine's count.
        await until_told(lambda: not any(in_flight(lab)), PATIENCE_SECONDS + 20)


async def test_requests_wait_for_the_only_worker_to_come_back(lab: Lab) -> None:
    lab.workers = 1
    with lab:
        before = lab.worker_pids()
        async with aiohttp.ClientSession() as session:
            os.kill(before[0], signal.SIGKILL)
            outcomes = await asyncio.gather(*(send(session, lab.envoy_url, chat(lab.model)) for _ in range(5)))
        assert lab.worker_pids() != before
        assert all(outcome.ok for outcome in outcomes), outcomes


async def test_what_a_killed_worker_held_is_given_back(lab: Lab) -> None:
    lab.accounting = "stream"
    with lab:
        async with aiohttp.ClientSession() as session:
            bodies = [chat(lab.model, f"{n}", stream=True, max_tokens=3_000) for n in range(6)]
            answers = [await session.post(lab.envoy_url + "/v1/chat/completions", json=body) for body in bodies]
            await until_told(lambda: sum(in_flight(lab)) == 6)
            for pid in lab.worker_pids():
                os.kill(pid, signal.SIGKILL)
            await until_told(lambda: not any(in_flight(lab)))
            for answer in answers:
                answer.close()
        await until_told(lambda: ready(lab))


@pytest.mark.parametrize("name", ["scraper", "admin"])
async def test_a_killed_service_is_back_and_no_request_notices(lab: Lab, name: str) -> None:
    with lab:
        before = lab.router_children()
        async with steady_load(lab.envoy_url, lab.model, per_second=20) as load:
            os.kill(before[name], signal.SIGKILL)
            await until_told(lambda: lab.router_children().get(name, before[name]) != before[name])
            await asyncio.sleep(1.5)
        assert not load.failed
        await until_told(lambda: {pod["health"] for pod in lab.believed_pods()} == {"ready"})
        assert [pod["generation"] for pod in lab.believed_pods()] == [1, 2, 3]


async def test_a_rolling_restart_loses_nothing(lab: Lab) -> None:
    with lab:
        before = set(lab.router_children().values())
        async with steady_load(lab.envoy_url, lab.model, per_second=30, max_tokens=30) as load:
            await asyncio.sleep(1)
            os.kill(lab.router.pid, signal.SIGHUP)
            await until_told(lambda: len(set(lab.router_children().values()) - before) == 4 and ready(lab), 20)
            await asyncio.sleep(1.5)
        assert len(load.outcomes) > 60
        assert not load.failed, load.failed
        await until_told(lambda: not any(in_flight(lab)), 25)


async def test_workers_more_and_fewer(lab: Lab) -> None:
    with lab:
        async with steady_load(lab.envoy_url, lab.model, per_second=20) as load:
            os.kill(lab.router.pid, signal.SIGTTIN)
            await until_told(lambda: len(lab.worker_pids()) == 3 and ready(lab))
            for left in (2, 1):
                os.kill(lab.router.pid, signal.SIGTTOU)
                await until_told(lambda left=left: len(lab.worker_pids()) == left)
            os.kill(lab.router.pid, signal.SIGTTOU)
            await asyncio.sleep(0.5)
            assert len(lab.worker_pids()) == 1
        assert not load.failed, load.failed


def router_stat(lab: Lab, name: str) -> int:
    """What Envoy has counted for the workers."""
    page = get(lab.config.envoy.admin, f"/stats?filter=^cluster.pointsman.{name}$")[1].decode()
    return int(page.rpartition(":")[2])


async def test_who_met_a_worker_that_is_gone_meets_another_at_once(lab: Lab) -> None:
    """The one that is gone has nothing to do, so Envoy would choose it again and again."""
    lab.accounting = "stream"
    with lab:
        async with steady_load(lab.envoy_url, lab.model, per_second=40, max_tokens=100) as load:
            await asyncio.sleep(1)
            os.kill(lab.router.pid, signal.SIGTTOU)
            await until_told(lambda: router_stat(lab, "upstream_rq_retry") > 2)
            await asyncio.sleep(2)
        assert not load.failed, load.failed
        assert router_stat(lab, "upstream_rq_retry_success") == router_stat(lab, "upstream_rq_retry")


@pytest.mark.parametrize("accounting", ["access-log", "stream"])
async def test_sigterm_during_a_streamed_answer_loses_nothing(lab: Lab, accounting: str) -> None:
    lab.accounting = accounting
    with lab:
        body = chat(lab.model, stream=True, max_tokens=150)
        async with (
            aiohttp.ClientSession() as session,
            session.post(lab.envoy_url + "/v1/chat/completions", json=body) as answer,
        ):
            await answer.content.readany()
            code = asyncio.to_thread(lab.stop_process, lab.router)
            rest = await answer.read()
            assert await code == 0
        assert rest.endswith(b"data: [DONE]\n\n")
        assert rest.count(b'"content"') > 50


@pytest.mark.parametrize("accounting", ["access-log", "stream"])
async def test_while_no_router_answers_requests_are_refused_in_openais_shape(lab: Lab, accounting: str) -> None:
    lab.accounting = accounting
    with lab:
        await asyncio.to_thread(lab.stop_process, lab.router)
        async with (
            aiohttp.ClientSession() as session,
            session.post(lab.envoy_url + "/v1/chat/completions", json=chat(lab.model)) as answer,
        ):
            assert answer.status == 503
            error = (await answer.json())["error"]
        assert error == {
            "message": "no router answers", "type": "overloaded_error", "code": "service_unavailable", "param": None,
        }  # fmt: skip


async def test_the_children_die_with_a_killed_supervisor(lab: Lab) -> None:
    lab.with_envoy = False
    with lab:
        children = lab.router_children()
        lab.router.popen.kill()
        lab.router.popen.wait()
        lab.processes.remove(lab.router)
        await until_told(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children.values()))


@pytest.mark.parametrize("listed", [False, True])
async def test_pods_come_and_go_while_requests_run(lab: Lab, tmp_path: Path, listed: bool) -> None:
    """Also where Envoy has a list of them, which the router keeps for it."""
    if listed:
        lab.destination = "override-host"
        lab.settings = {"envoy": {"pods_file": str(tmp_path / "pods.json")}, "retry_candidates": 0}
    with lab:
        first = list(lab.addresses)
        async with steady_load(lab.envoy_url, lab.model, per_second=20, max_tokens=30) as load:
            await asyncio.sleep(1)
            kept = {pod["address"]: (pod["slot"], pod["generation"]) for pod in lab.believed_pods()}
            fourth = await asyncio.to_thread(lab.start_pods, 1)
            lab.write_endpoints([*first[1:], *fourth])
            await until_told(lambda: any(pod["address"] in fourth for pod in lab.believed_pods()))
            await until_told(lambda: all(pod["address"] != first[0] for pod in lab.believed_pods()))
            load.outcomes.clear()
            await asyncio.sleep(2.5)
        assert not load.failed
        assert set(load.pods) == {*first[1:], *fourth}
        now = {pod["address"]: (pod["slot"], pod["generation"]) for pod in lab.believed_pods()}
        assert {address: kept[address] for address in first[1:]} == {address: now[address] for address in first[1:]}


async def test_a_dead_pod_gets_no_requests_until_it_is_back() -> None:
    with Lab(pods=3, workers=2, process_per_pod=True, strategy="least-request") as lab:
        dead = lab.addresses[0]
        async with steady_load(lab.envoy_url, lab.model, per_second=30, stream=False) as load:
            await asyncio.sleep(0.5)
            await asyncio.to_thread(lab.stop_process, lab.pod_processes[0])
            await until_told(
                lambda: {p["health"] for p in lab.believed_pods() if p["address"] == dead} & {"failed", "ejected"}
            )
            load.outcomes.clear()
            await asyncio.sleep(1.5)
            assert dead not in load.pods
            assert len(load.failed) <= 1  # one that was already on its way


async def test_clients_that_leave_while_their_pod_is_chosen_charge_nobody(lab: Lab) -> None:
    body = json.dumps({"model": lab.model, "max_tokens": 5, "messages": [{"role": "user", "content": "x " * 2000}]})
    kind = f"content-type: application/json\r\ncontent-length: {len(body)}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{kind}"
    rng = random.Random(1)

    async def leave(host: str, port: int) -> None:
        _, writer = await asyncio.open_connection(host, port)
        writer.write(f"{head}\r\n\r\n{body}".encode())
        await writer.drain()
        await asyncio.sleep(rng.uniform(0.0, 0.02))
        writer.transport.abort()

    with lab:
        host, _, port = lab.config.envoy.listen.rpartition(":")
        for _ in range(10):
            await asyncio.gather(*(leave(host, int(port)) for _ in range(20)))
        assert "pointsman_decisions_total" in get(lab.config.admin, "/metrics")[1].decode()
        await until_told(lambda: not any(in_flight(lab)), PATIENCE_SECONDS / 2)


async def test_rolling_restarts_lose_no_log_entries(lab: Lab) -> None:
    with lab:
        async with steady_load(lab.envoy_url, lab.model, per_second=150, max_tokens=1) as load:
            for _ in range(3):
                await asyncio.sleep(1)
                os.kill(lab.router.pid, signal.SIGHUP)
            await asyncio.sleep(2)
        assert len(load.outcomes) > 300
        assert not load.failed
        await until_told(lambda: not any(in_flight(lab)), PATIENCE_SECONDS / 2)
