"""A fleet that Kubernetes lists: pods get requests from when they are ready until they are about to go."""

import asyncio
from pathlib import Path

import pytest
from client import steady_load
from cluster import cluster, kubeconfig, pod
from waiting import until_told

from bench.lab import Lab

pytestmark = pytest.mark.envoy


async def test_a_rolling_update_fails_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(pods=3, workers=2, strategy="least-request", settings={"endpoints": "", "kubernetes": {}})
    async with cluster() as kube:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "kubeconfig", kube.url)))

        async def show(number: int, *, ready: bool = True, going: bool = False) -> None:
            host, _, port = lab.addresses[number].rpartition(":")
            labels = {"model.aibrix.ai/port": port}
            await kube.put(
                "pods", pod(f"vllm-{number}", host, model=lab.model, ready=ready, going=going, labels=labels)
            )

        def draining() -> dict[str, bool]:
            return {each["name"]: each["draining"] for each in lab.believed_pods()}

        try:
            await asyncio.to_thread(lab.__enter__)
            await show(0)
            await show(1)
            await until_told(lambda: {p["health"] for p in lab.believed_pods()} == {"ready"} and len(draining()) == 2)

            async with steady_load(lab.envoy_url, lab.model, per_second=20, max_tokens=8) as load:
                await asyncio.sleep(1)
                assert set(load.pods) == set(lab.addresses[:2])

                await show(2, ready=False)
                await until_told(lambda: draining().get("vllm-2") is True)
                await asyncio.sleep(1)
                assert lab.addresses[2] not in load.pods

                await show(2)
                await until_told(lambda: lab.addresses[2] in load.pods)

                await show(0, going=True)
                await until_told(lambda: draining()["vllm-0"])
                await asyncio.sleep(0.5)
                before = load.pods[lab.addresses[0]]
                await asyncio.sleep(1)
                assert load.pods[lab.addresses[0]] == before
                await kube.delete("pods", "vllm-0")
                await until_told(lambda: set(draining()) == {"vllm-1", "vllm-2"})
            assert not load.failed, load.failed
        finally:
            await asyncio.to_thread(lab.stop)
