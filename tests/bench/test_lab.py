"""The lab that end-to-end tests and benchmarks stand on."""

import os
import signal
from pathlib import Path

import pytest

from bench.lab import Lab, LabError, free_ports, get
from workers.config import ConfigError


def test_ports_are_consecutive_and_below_the_kernels_own() -> None:
    lowest_of_the_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(20)
    assert len(ports) == 20
    assert ports[-1] < lowest_of_the_kernel


def test_a_lab_is_what_its_arguments_say_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_STRATEGY", "random")
    monkeypatch.setenv("ROUTING_ALGORITHM", "random")
    monkeypatch.setenv("POINTSMAN_SCRAPE__TIMEOUT_SECONDS", "33")
    settings = {"scrape": {"failures": 7}, "strategy": "round-robin"}
    with Lab(pods=0, workers=1, with_envoy=False, settings=settings) as lab:
        assert (lab.config.strategy, lab.config.scrape.failures) == ("round-robin", 7)
        assert lab.config.scrape.timeout_seconds != 33
        assert len(lab.worker_pids()) == 1
        assert {"worker 0", "scraper", "admin"} <= set(lab.router_children())
        folder = lab.folder
        assert folder.is_dir()
    assert not folder.exists()


def test_pods_come_go_and_die_one_by_one() -> None:
    with Lab(pods=1, workers=1, with_envoy=False, process_per_pod=True) as lab:
        lab.start_pods(1)
        lab.write_endpoints(lab.addresses)
        lab.until(lambda: [pod["name"] for pod in lab.believed_pods()] == ["pod-0", "pod-1"], "both pods")
        assert all(get(address, "/health")[0] == 200 for address in lab.addresses)

        lab.stop_process(lab.pod_processes[0])
        lab.check()  # it was ended on purpose

        os.kill(lab.pod_processes[1].pid, signal.SIGKILL)
        lab.pod_processes[1].popen.wait()
        with pytest.raises(LabError, match=r"^pods-\d+ \(pid \d+\) was ended by SIGKILL"):
            lab.check()


def test_what_cannot_be_configured_starts_nothing() -> None:
    with pytest.raises(ConfigError, match="no strategy 'nonsense'"), Lab(strategy="nonsense", with_envoy=False) as lab:
        raise AssertionError(lab)
