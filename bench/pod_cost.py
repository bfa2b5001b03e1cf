"""What simulated pods cost: `python -m bench.pod_cost`. Starts 16 in one process and reads that process's CPU time.

Measured on 2 shared cores: nothing at rest, 0.4 ms per request of 4 KB, 30 µs per streamed token (half of it the kernel
sending it), 0.8 ms per metrics page, of which 0.3 ms to write it and the rest aiohttp's.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

PODS = 16
CLIENTS = 64


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(pid: int, addresses: list[str]) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def chat(i: int, tokens: int, stream: bool) -> None:
            body = {
                "messages": [{"role": "user", "content": f"{i} " + "x" * 4000}],
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": stream,
            }
            url = f"http://{addresses[i % PODS]}/v1/chat/completions"
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                await response.read()

        async def page(i: int) -> None:
            async with session.get(f"http://{addresses[i % PODS]}/metrics") as response:
                await response.read()

        async def cost(count: int, one: Callable[[int], Awaitable[None]]) -> float:
            async def client(k: int) -> None:
                for i in range(k, count, CLIENTS):
                    await one(i)

            before = cpu_seconds(pid)
            await asyncio.gather(*(client(k) for k in range(CLIENTS)))
            return (cpu_seconds(pid) - before) / count

        before = cpu_seconds(pid)
        await asyncio.sleep(5)
        print(f"at rest: {(cpu_seconds(pid) - before) / 5:.3f} of a core")
        request = await cost(2000, lambda i: chat(i, 1, False))
        print(f"request of 4 KB, one token: {request * 1e3:.2f} ms")
        streamed = await cost(400, lambda i: chat(i, 100, True))
        print(f"streamed token: {(streamed - request) / 100 * 1e6:.0f} µs")
        print(f"metrics page: {await cost(1000, page) * 1e3:.2f} ms")


def main() -> None:
    command = [sys.executable, "-m", "bench.pod", "--port", "0", "--count", str(PODS), "--model", "m"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            addresses = [process.stdout.readline().split()[1] for _ in range(PODS)]
            began = time.monotonic()
            asyncio.run(measure(process.pid, addresses))
            print(f"in {time.monotonic() - began:.0f} s")
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
