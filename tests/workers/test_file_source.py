"""The endpoints file over time, and names whose addresses change."""

import asyncio
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from structlog.testing import capture_logs

import workers.discovery.file_source
from workers.discovery.file_source import FileSource, pod_name
from workers.discovery.registry import FoundPod

ONE = "models: [{name: llama, endpoints: ['10.0.0.1:8000']}]"
TWO = "models: [{name: llama, endpoints: ['10.0.0.1:8000', '10.0.0.2:8000']}]"

Found = list[str] | Exception | threading.Event
Resolver = Callable[[dict[str, Found]], None]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Answers name look-ups; others go to the real one. An event is waited for before there is an answer."""

    def install(names: dict[str, Found]) -> None:
        real = socket.getaddrinfo

        def answer(host: Any, *rest: Any, **more: Any) -> Any:
            if host not in names:
                return real(host, *rest, **more)
            if isinstance(event := names[host], threading.Event):
                event.wait(20)
            found = names[host]
            assert not isinstance(found, threading.Event)
            if isinstance(found, Exception):
                raise found
            families = [(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip) for ip in found]
            return [(family, socket.SOCK_STREAM, 6, "", (ip, 0)) for family, ip in families]

        monkeypatch.setattr(socket, "getaddrinfo", answer)

    return install


def raise_(error: Exception) -> NoReturn:
    raise error


async def found(source: FileSource) -> dict[str, FoundPod]:
    source.reload()
    pods, _ = await source.resolve()
    assert len({pod.name for pod in pods}) == len(pods)
    return {pod.address: pod for pod in pods}


def source_of(path: Path, text: str) -> FileSource:
    (path / "e.yaml").write_text(text)
    return FileSource(path / "e.yaml")


async def test_pods_of_a_file(tmp_path: Path) -> None:
    source = source_of(tmp_path, TWO)
    assert not source.loaded
    pods = await found(source)
    assert source.loaded
    assert [pod.name for pod in pods.values()] == ["llama-10-0-0-1-0", "llama-10-0-0-2-1"]
    assert pods["10.0.0.1:8000"].metrics_address == "10.0.0.1:8000"


async def test_a_file_is_read_again_when_it_changed_and_only_then(tmp_path: Path) -> None:
    source = source_of(tmp_path, ONE)
    assert source.changed()
    assert len(await found(source)) == 1
    assert not source.changed()
    source.path.write_text(TWO)
    assert source.changed()
    assert len(await found(source)) == 2


async def test_a_config_map_is_swapped_by_a_symbolic_link(tmp_path: Path) -> None:
    """As Kubernetes does it: e.yaml -> ..data/e.yaml, ..data -> a folder of its own for each version."""
    for version, text in (("v1", ONE), ("v2", TWO)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "e.yaml").write_text(text)
        os.utime(tmp_path / version / "e.yaml", (1, 1))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "e.yaml").symlink_to("..data/e.yaml")
    source = FileSource(tmp_path / "e.yaml")
    assert len(await found(source)) == 1
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").rename(tmp_path / "..data")
    assert source.changed()
    assert len(await found(source)) == 2


@pytest.mark.parametrize("spoil", ["bad", "empty", "gone"])
async def test_a_file_that_cannot_be_used_keeps_the_pods(tmp_path: Path, spoil: str) -> None:
    source = source_of(tmp_path, TWO)
    before = await found(source)
    if spoil == "gone":
        source.path.unlink()
    else:
        source.path.write_text("models: [" if spoil == "bad" else "")
    assert source.changed()
    assert await found(source) == before
    assert not source.changed()  # said once, not every second
    assert not source.usable
    source.path.write_text(ONE)
    with capture_logs() as logs:
        assert len(await found(source)) == 1
    assert source.usable
    assert [line["event"] for line in logs] == ["endpoints file can be used again"]


async def test_a_file_that_cannot_be_read_for_a_moment_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of file descriptors, or written before its mode was set: it does not become another file."""
    source = source_of(tmp_path, ONE)
    before = await found(source)
    source.path.write_text(TWO)
    with monkeypatch.context() as spoiled:
        spoiled.setattr(Path, "read_text", lambda self: raise_(OSError(errno.EMFILE, "Too many open files")))
        for _ in range(3):
            assert source.changed()
            assert await found(source) == before
    assert "".join(capsys.readouterr()).count("Too many open files") == 1
    assert source.changed()
    assert len(await found(source)) == 2
    assert not source.changed()


async def test_a_file_that_was_never_good_is_not_one_without_pods(tmp_path: Path) -> None:
    source = source_of(tmp_path, "models: [")
    source.reload()
    assert not source.loaded


async def test_a_name_with_several_addresses_is_several_pods(tmp_path: Path, resolver: Resolver) -> None:
    resolver({"vllm.svc": ["10.1.0.2", "10.1.0.1", "fd00::1"]})
    source = source_of(
        tmp_path,
        "models: [{name: llama, endpoints: [{address: 'vllm.svc:8000', name: vllm, metrics_port: 9000}, '10.0.0.1:1']}"
        "]",
    )
    pods = await found(source)
    assert set(pods) == {"10.1.0.1:8000", "10.1.0.2:8000", "10.0.0.1:1"}
    assert pods["10.1.0.2:8000"].metrics_address == "10.1.0.2:9000"
    assert {pod.host for pod in pods.values()} == {"vllm.svc", "10.0.0.1"}


async def test_a_name_with_v6_addresses_alone(tmp_path: Path, resolver: Resolver) -> None:
    resolver({"vllm.svc": ["fd00::1"]})
    pods = await found(source_of(tmp_path, "models: [{name: llama, endpoints: ['vllm.svc:8000']}]"))
    assert set(pods) == {"[fd00::1]:8000"}


async def test_names_are_resolved_again_and_keep_their_addresses_when_they_cannot_be(
    tmp_path: Path, resolver: Resolver
) -> None:
    names: dict[str, Found] = {"a.svc": ["10.1.0.1"], "b.svc": ["10.2.0.1"]}
    resolver(names)
    source = source_of(tmp_path, "models: [{name: m, endpoints: ['a.svc:1', 'b.svc:1']}]")
    assert set(await found(source)) == {"10.1.0.1:1", "10.2.0.1:1"}
    names["a.svc"] = ["10.1.0.9"]
    names["b.svc"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
    assert set(await found(source)) == {"10.1.0.9:1", "10.2.0.1:1"}


async def test_a_name_that_cannot_be_one_harms_nobody_else(tmp_path: Path) -> None:
    source = source_of(tmp_path, f"models: [{{name: m, endpoints: ['{'x' * 70}.y:1', '10.0.0.1:1']}}]")
    assert set(await found(source)) == {"10.0.0.1:1"}


async def test_a_successor_remembers_addresses_of_names_that_cannot_be_resolved_now(
    tmp_path: Path, resolver: Resolver
) -> None:
    resolver({"a.svc": socket.gaierror(socket.EAI_AGAIN, "Temporary failure")})
    source = source_of(tmp_path, "models: [{name: m, endpoints: ['a.svc:1']}]")
    source.remember(
        FoundPod(address, "p", ("m",), host=host)
        for address, host in (("10.1.0.1:1", "a.svc"), ("10.1.0.2:1", "a.svc"), ("10.3.0.1:1", "b.svc"))
    )
    assert set(await found(source)) == {"10.1.0.1:1", "10.1.0.2:1"}


async def test_a_name_server_that_hangs_holds_up_nobody_and_is_asked_once(
    tmp_path: Path, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.discovery.file_source, "LOOK_UP_SECONDS", 0.6)
    hangs = threading.Event()
    names: dict[str, Found] = {"old.svc": ["10.1.0.1"], "new.svc": hangs}
    resolver(names)
    source = source_of(tmp_path, "models: [{name: m, endpoints: ['old.svc:1']}]")
    await found(source)
    names["old.svc"] = hangs
    source.path.write_text("models: [{name: m, endpoints: ['old.svc:1', 'new.svc:1', '10.0.0.1:1', '[FD00:0::1]:1']}]")
    try:
        for complete in (False, False, True):
            began = time.monotonic()
            assert set(await found(source)) == {"10.1.0.1:1", "10.0.0.1:1", "[fd00::1]:1"}
            assert time.monotonic() - began < 0.5
            assert source.complete is complete
        assert set(source._look_ups) == {"old.svc", "new.svc"}
        names["old.svc"] = names["new.svc"] = ["10.2.0.1"]
    finally:
        hangs.set()
    assert not source.news
    async with asyncio.timeout(20):
        while source._look_ups:
            await asyncio.sleep(0.01)
    assert source.news
    assert "10.2.0.1:1" in {pod.address for pod in source.listed()[0]}
    assert not source.news


async def test_rolesets(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        "models: [{name: m, rolesets: [{name: r, prefill: ['10.0.0.1:1'], decode: ['10.0.0.2:1', '10.0.0.3:1']}]}]",
    )
    pods = await found(source)
    assert {(pod.address, pod.role, pod.roleset) for pod in pods.values()} == {
        ("10.0.0.1:1", "prefill", "r"), ("10.0.0.2:1", "decode", "r"), ("10.0.0.3:1", "decode", "r"),
    }  # fmt: skip


async def test_one_pod_of_two_models_and_its_adapters(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        "models: [{name: a, adapters: [x], endpoints: ['10.0.0.1:1'], labels: {k: v}, config: {state: active}},"
        " {name: b, endpoints: [{address: '10.0.0.1:1', adapters: [y]}]}]",
    )
    pods = await found(source)
    assert pods["10.0.0.1:1"].models == ("a", "x", "b", "y")
    _, settings = await source.resolve()
    assert settings == {"a": {"state": "active"}}


async def test_names_are_told_apart(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        "models: [{name: A_B, endpoints: ['10.0.0.1:1']}, {name: a/b, endpoints: ['10.0.0.1:2', "
        "{address: '10.0.0.2:1', name: x}, {address: '10.0.0.3:1', name: x}]}]",
    )
    names = [pod.name for pod in (await found(source)).values()]
    assert names == ["a-b-10-0-0-1-0", "a-b-10-0-0-1-1", "x", "x-10.0.0.3:1"]


@pytest.mark.parametrize(
    ("model", "host", "name"),
    [
        ("meta-llama/Llama-3.1-8B_it", "10.0.0.1", "meta-llama-llama-3.1-8b-it-10-0-0-1-7"),
        ("/_x_/", "vllm-0.svc", "x-vllm-0-svc-7"),
        ("m" * 49 + "/" + "n" * 9, "h", "m" * 49 + "-h-7"),
        ("m", "fd00::1", "m-fd00::1-7"),
    ],
)
def test_pods_have_the_names_that_aibrix_gives_them(model: str, host: str, name: str) -> None:
    assert pod_name(model, host, 7) == name


def test_look_ups_run_side_by_side(tmp_path: Path, resolver: Resolver) -> None:
    hosts = [f"h{n}.svc" for n in range(8)]
    resolver({host: [f"10.1.0.{n + 1}"] for n, host in enumerate(hosts)})
    listed = ", ".join(f"'{host}:1'" for host in hosts)
    source = source_of(tmp_path, f"models: [{{name: m, endpoints: [{listed}]}}]")
    assert len(asyncio.run(found(source))) == 8


async def test_a_pod_listed_under_two_models_has_the_labels_of_both_and_drains_for_both(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        """
models:
  - name: a
    endpoints: [{address: "10.0.0.1:8000", labels: {modelclaim.aibrix.ai/a: sleeping}, draining: true}]
  - name: b
    labels: {zone: z}
    endpoints: ["10.0.0.1:8000", "10.0.0.2:8000"]
""",
    )
    pods = await found(source)
    assert pods["10.0.0.1:8000"].labels == {"modelclaim.aibrix.ai/a": "sleeping", "zone": "z"}
    assert [pod.draining for pod in pods.values()] == [True, False]


async def test_a_claim_makes_its_model_known(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        """
models:
  - name: warm
    endpoints:
      - address: "10.0.0.1:8000"
        labels: {modelclaim.aibrix.ai/one: '{"model": "org/qwen", "port": 0, "state": "sleeping"}'}
""",
    )
    assert (await found(source))["10.0.0.1:8000"].models == ("warm", "org/qwen")
