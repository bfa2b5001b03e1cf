"""Pods found by the Kubernetes API: what they are taken for, and what happens when they or the API come and go."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
import yaml
from cluster import Cluster, RealCluster, adapter, cluster, kubeconfig, missing, pod
from fleet import make_tables
from waiting import until

import workers.discovery.kubernetes_source as module
from state.tables import SCRAPER
from workers.config import Config, ConfigError, KubernetesConfig, load
from workers.discovery.kubernetes_source import KubernetesSource, check_access
from workers.discovery.registry import FoundPod
from workers.discovery.source import source_of
from workers.scraper import Scraper

RIGHTS = Path(__file__).parents[2] / "deploy" / "kubernetes" / "discovery.yaml"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """With the rights of the manifest, for all namespaces, and with none but those."""
    if problem := missing():
        pytest.skip(problem)
    made = RealCluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        (role,) = [one for one in yaml.safe_load_all(RIGHTS.read_text()) if one["kind"] == "Role"]
        bound = {"kind": "User", "name": "router", "apiGroup": "rbac.authorization.k8s.io"}
        reference = {"kind": "ClusterRole", "name": "pointsman", "apiGroup": "rbac.authorization.k8s.io"}
        binding = {"kind": "ClusterRoleBinding", "roleRef": reference, "subjects": [bound]}
        for one in (role, binding):
            one["metadata"] = {"name": "pointsman"}
        made.rights = [{**role, "kind": "ClusterRole"}, binding]
        yield made
    finally:
        made.end()


@pytest.fixture
async def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(module, "MIN_PAUSE_SECONDS", 0.02)
    async with cluster() as made:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "kubeconfig", made.url)))
        yield made


@pytest.fixture(params=["ours", "real"])
async def either(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Cluster | RealCluster]:
    """Our own API server, and a real one where it can be had."""
    if request.param == "real":
        made: RealCluster = request.getfixturevalue("real")
        await made.set_up()
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "kubeconfig", made.url)))
        yield made
        await made.clear()
        return
    async with cluster() as ours:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "kubeconfig", ours.url)))
        yield ours


@pytest.fixture
async def sources() -> AsyncIterator[list[KubernetesSource]]:
    """To be ended with the test."""
    made: list[KubernetesSource] = []
    yield made
    for source in made:
        # The client leaves a connection behind whose TLS handshake is cancelled.
        with contextlib.suppress(TimeoutError):
            await until(lambda source=source: all(one.listed for one in source._adapters), 1.0)
        await source.stop()


@pytest.fixture
def logged() -> Iterator[list[dict[str, object]]]:
    with structlog.testing.capture_logs() as lines:
        yield lines  # type: ignore[misc]


async def start(sources: list[KubernetesSource], *, reachable: bool = True, **config: object) -> KubernetesSource:
    source = KubernetesSource(KubernetesConfig.model_validate(config))
    sources.append(source)
    source.reload()
    await source.resolve()
    if reachable:
        await until(lambda: source.complete)
    return source


def listed(source: KubernetesSource) -> dict[str, FoundPod]:
    pods, settings = source.listed()
    assert settings == {}
    assert len({pod.name for pod in pods}) == len({pod.address for pod in pods}) == len(pods)
    return {pod.name: pod for pod in pods}


async def test_a_pod_with_aibrix_labels(either: Cluster | RealCluster, sources: list[KubernetesSource]) -> None:
    labels = {"model.aibrix.ai/port": "9000", "model.aibrix.ai/metric-port": "9001", "model.aibrix.ai/engine": "sglang"}
    labels |= {"role-name": "decode", "roleset-name": "rs-0", "tier": "gold"}
    notes = {"model.aibrix.ai/config": '{"profiles": {}}', "modelclaim.aibrix.ai/a": '{"model": "qwen", "port": 8000}'}
    notes |= {"model.aibrix.ai/sglang-bootstrap-port": "9100", "model.aibrix.ai/kv-connector-type": "nixl"}
    await either.put("pods", pod("vllm-0", "10.0.0.7", labels=labels, annotations={**notes, "other": "x"}))
    found = listed(await start(sources))["vllm-0"]
    assert (found.address, found.metrics_address) == ("10.0.0.7:9000", "10.0.0.7:9001")
    assert (found.engine, found.role, found.roleset) == ("sglang", "decode", "rs-0")
    assert found.models == ("llama", "qwen")
    assert (found.namespace, found.draining) == ("models", False)
    assert found.labels == {"model.aibrix.ai/name": "llama", **labels, **notes}


async def test_what_a_pod_without_them_is_taken_for(
    either: Cluster | RealCluster, sources: list[KubernetesSource]
) -> None:
    await either.put("pods", pod("vllm-0", "fd00::1"))
    found = listed(await start(sources, port=8001))["vllm-0"]
    assert (found.address, found.metrics_address, found.engine) == ("[fd00::1]:8001", "[fd00::1]:8001", "vllm")


async def test_another_label_and_a_selector(kube: Cluster, sources: list[KubernetesSource]) -> None:
    await kube.put("pods", pod("a", "10.0.0.1", model="", labels={"app": "vllm", "model": "qwen"}))
    await kube.put("pods", pod("b", "10.0.0.2", model="", labels={"app": "vllm"}, annotations={"model": "llama"}))
    await kube.put("pods", pod("c", "10.0.0.3", model="", labels={"app": "web", "model": "qwen"}))
    source = await start(sources, model_label="model", selector="app=vllm")
    assert {name: found.models for name, found in listed(source).items()} == {"a": ("qwen",), "b": ("llama",)}
    await start(sources, model_label="model")
    assert {query["labelSelector"] for path, query in kube.requests if "pods" in path} == {"app=vllm", "model"}


async def test_pods_that_serve_nothing_are_not_listed(
    either: Cluster | RealCluster, sources: list[KubernetesSource]
) -> None:
    await either.put("pods", pod("no-address", ""))
    await either.put("pods", pod("over", "10.0.0.2", phase="Succeeded"))
    await either.put("pods", pod("ray-worker", "10.0.0.3", labels={"ray.io/node-type": "worker"}))
    index = "stormservice.orchestration.aibrix.ai/pod-group-index"
    await either.put("pods", pod("second-of-a-group", "10.0.0.4", labels={index: "1"}))
    await either.put("pods", pod("first-of-a-group", "10.0.0.5", labels={index: "0"}))
    assert set(listed(await start(sources))) == {"first-of-a-group"}


async def test_pods_that_start_or_go_stay_known_and_get_nothing(
    either: Cluster | RealCluster, sources: list[KubernetesSource]
) -> None:
    await either.put("pods", pod("starting", "10.0.0.1", ready=False))
    await either.put("pods", pod("going", "10.0.0.2", going=True))
    await either.put("pods", pod("serving", "10.0.0.3"))
    found = listed(await start(sources))
    assert {name: pod.draining for name, pod in found.items()} == {"starting": True, "going": True, "serving": False}


async def test_labels_that_cannot_be_used_leave_their_pod_out_and_are_told_of_once(
    kube: Cluster, sources: list[KubernetesSource], logged: list[dict[str, object]]
) -> None:
    await kube.put("pods", pod("a", "10.0.0.1", labels={"model.aibrix.ai/port": "http"}))
    await kube.put("pods", pod("b", "10.0.0.2", labels={"model.aibrix.ai/engine": "tgi"}))
    await kube.put("pods", pod("c", "10.0.0.3", annotations={"model.aibrix.ai/port": "70000"}))
    await kube.put("pods", pod("d", "10.0.0.4", annotations={"modelclaim.aibrix.ai/x": '{"model": "a\\u0000b"}'}))
    await kube.put("pods", pod("good", "10.0.0.5"))
    source = await start(sources)
    assert set(listed(source)) == set(listed(source)) == {"good"}
    told = {line["pod"]: line["error"] for line in logged if line["event"] == "a pod is left out"}
    assert len([line for line in logged if line["event"] == "a pod is left out"]) == len(told) == 4
    assert told["a"] == "model.aibrix.ai/port: 'http' is no port, which is a number from 1 to 65535"
    assert str(told["b"]).startswith("engine 'tgi' is not known: use one of")


async def test_changes_are_news(either: Cluster | RealCluster, sources: list[KubernetesSource]) -> None:
    await either.put("pods", pod("a", "10.0.0.1"))
    source = await start(sources)
    assert set(listed(source)) == {"a"} and not source.news

    await either.put("pods", pod("b", "10.0.0.2", ready=False))
    await until(lambda: source.news)
    assert listed(source)["b"].draining

    await either.put("pods", pod("b", "10.0.0.2"))
    await until(lambda: source.news)
    assert not listed(source)["b"].draining

    await either.put("pods", pod("a", "10.0.0.1", model="", labels={"other": "x"}))  # to a watch, that is its end
    await until(lambda: source.news)
    assert set(listed(source)) == {"b"}

    await either.delete("pods", "b")
    await until(lambda: source.news)
    assert not listed(source) and source.complete


async def test_adapters_are_models_of_the_pods_that_have_loaded_them(
    either: Cluster | RealCluster, sources: list[KubernetesSource]
) -> None:
    await either.put("pods", pod("a", "10.0.0.1"))
    await either.put("pods", pod("b", "10.0.0.2"))
    await either.put("modeladapters", adapter("sql", ["b"]))
    await either.put("modeladapters", adapter("sql", ["a"], namespace="elsewhere"))
    source = await start(sources)
    await until(lambda: listed(source)["b"].models == ("llama", "sql"))
    assert listed(source)["a"].models == ("llama",)
    await either.put("modeladapters", adapter("sql", ["a", "gone"]))
    await until(lambda: listed(source)["a"].models == ("llama", "sql"))
    assert listed(source)["b"].models == ("llama",)


async def test_a_cluster_without_that_kind(
    kube: Cluster, sources: list[KubernetesSource], logged: list[dict[str, object]]
) -> None:
    kube.kinds.discard("modeladapters")
    await kube.put("pods", pod("a"))
    source = await start(sources)
    await until(lambda: any("modeladapters" in path for path, _ in kube.requests))
    await asyncio.sleep(0.1)
    assert set(listed(source)) == {"a"} and not logged
    assert sum("modeladapters" in path for path, _ in kube.requests) == 1


async def test_namespaces(either: Cluster | RealCluster, sources: list[KubernetesSource]) -> None:
    await either.put("pods", pod("vllm-0", "10.0.0.1"))
    await either.put("pods", pod("vllm-0", "10.0.0.2", namespace="other"))
    await either.put("pods", pod("vllm-1", "10.0.0.3", namespace="third"))
    assert {found.address for found in listed(await start(sources)).values()} == {"10.0.0.1:8000"}
    two = listed(await start(sources, namespaces=["models", "other"]))
    assert {name: found.address for name, found in two.items()} == {
        "vllm-0": "10.0.0.1:8000",
        "vllm-0.other": "10.0.0.2:8000",
    }
    assert len(listed(await start(sources, namespaces=["*"]))) == 3


async def test_of_two_pods_with_one_address_the_one_that_serves_counts(
    either: Cluster | RealCluster, sources: list[KubernetesSource]
) -> None:
    await either.put("pods", pod("a-new", "10.0.0.1"))
    await either.put("pods", pod("b-old", "10.0.0.1", going=True))
    await either.put("pods", pod("c-old", "10.0.0.2", going=True))
    await either.put("pods", pod("d-new", "10.0.0.2"))
    assert set(listed(await start(sources))) == {"a-new", "d-new"}


async def test_many_pods_come_in_pages(
    kube: Cluster, sources: list[KubernetesSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    for number in range(10):
        await kube.put("pods", pod(f"pod-{number}", f"10.0.0.{number + 1}"))
    assert len(listed(await start(sources))) == 10
    pages = [query for path, query in kube.requests if path.endswith("/pods") and "watch" not in query]
    assert [query.get("continue") for query in pages] == [None, "3", "6", "9"]


async def test_what_is_watched_from_too_long_ago_is_listed_again(
    kube: Cluster, sources: list[KubernetesSource], logged: list[dict[str, object]]
) -> None:
    await kube.put("pods", pod("a", "10.0.0.1"))
    await kube.put("pods", pod("b", "10.0.0.2"))
    source = await start(sources)
    await kube.stop()
    await kube.delete("pods", "a")
    await kube.forget_history()
    await kube.start()
    await until(lambda: set(listed(source)) == {"b"})


async def test_while_the_api_is_away_the_pods_stay(
    kube: Cluster, sources: list[KubernetesSource], logged: list[dict[str, object]]
) -> None:
    await kube.put("pods", pod("a", "10.0.0.1"))
    source = await start(sources)
    await kube.stop()
    await until(lambda: any(line["log_level"] == "warning" for line in logged))
    await asyncio.sleep(0.2)
    assert set(listed(source)) == {"a"} and source.complete
    told = [line for line in logged if line["event"] == "Kubernetes cannot be followed, the pods stay as they are"]
    assert 0 < len(told) <= 6  # not with every attempt
    await kube.put("pods", pod("b", "10.0.0.2"))
    await kube.start()
    await until(lambda: set(listed(source)) == {"a", "b"})
    await until(lambda: any(line["event"] == "the Kubernetes API answers again" for line in logged))
    await kube.delete("pods", "a")
    await until(lambda: set(listed(source)) == {"b"})


async def test_a_broken_watch_that_nobody_notices_is_made_good_by_the_next_list(
    kube: Cluster, sources: list[KubernetesSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELIST_SECONDS", 2.0)
    await kube.put("pods", pod("a", "10.0.0.1"))
    source = await start(sources)
    key = ("pods", "models", "b")
    kube.objects[key] = pod("b", "10.0.0.2")  # no watch hears of it
    await until(lambda: set(listed(source)) == {"a", "b"})


async def test_who_may_not_list_pods_is_told_what_to_do(
    kube: Cluster, sources: list[KubernetesSource], logged: list[dict[str, object]]
) -> None:
    kube.forbidden.add("pods")
    source = await start(sources, reachable=False)
    await until(lambda: "deploy/kubernetes/discovery.yaml" in source.cure())
    assert not source.complete and not source.usable and not listed(source)
    kube.forbidden.clear()
    await kube.put("pods", pod("a"))
    await until(lambda: source.complete)
    assert set(listed(source)) == {"a"} and source.usable


async def test_a_token_that_is_renewed(kube: Cluster, sources: list[KubernetesSource], tmp_path: Path) -> None:
    await kube.put("pods", pod("a"))
    kubeconfig(tmp_path / "kubeconfig", kube.url, token="of yesterday")
    source = await start(sources, reachable=False)
    assert not source.complete
    kubeconfig(tmp_path / "kubeconfig", kube.url)
    await until(lambda: source.complete)


async def test_the_scraper_follows_it(either: Cluster | RealCluster, tmp_path: Path) -> None:
    await either.put("pods", pod("a", "127.0.0.1", labels={"model.aibrix.ai/port": "9"}))
    (tmp_path / "p.yaml").write_text("kubernetes: {}")
    tables = make_tables(writer=SCRAPER)
    scraper = Scraper(load(tmp_path / "p.yaml"), tables)
    running = asyncio.ensure_future(scraper.run())
    try:
        await until(lambda: [record.name for record in tables.catalog.read()[1].pods] == ["a"])
        await either.put("pods", pod("a", "127.0.0.1", going=True, labels={"model.aibrix.ai/port": "9"}))
        await until(lambda: [record.draining for record in tables.catalog.read()[1].pods] == [True])
        await either.put("pods", pod("b", "127.0.0.1", labels={"model.aibrix.ai/port": "10"}))
        await either.delete("pods", "a")
        await until(lambda: [record.name for record in tables.catalog.read()[1].pods] == ["b"])
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_scraper_that_cannot_reach_it_keeps_what_its_predecessor_found(kube: Cluster, tmp_path: Path) -> None:
    await kube.put("pods", pod("a", "127.0.0.1", labels={"model.aibrix.ai/port": "9"}))
    (tmp_path / "p.yaml").write_text("kubernetes: {}")
    config, tables = load(tmp_path / "p.yaml"), make_tables(writer=SCRAPER)
    for reachable in (True, False):
        if not reachable:
            await kube.stop()
        running = asyncio.ensure_future(Scraper(config, tables).run())
        await until(lambda: tables.catalog.version > 0)
        await asyncio.sleep(0.5)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert [(record.name, record.draining) for record in tables.catalog.read()[1].pods] == [("a", False)]


def configured(tmp_path: Path, text: str) -> Config:
    (tmp_path / "p.yaml").write_text(text)
    return load(tmp_path / "p.yaml")


def test_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(tmp_path, "kubernetes: {}").kubernetes == KubernetesConfig()
    assert source_of(configured(tmp_path, "workers: 1")) is None
    monkeypatch.setenv("POINTSMAN_KUBERNETES__NAMESPACES", '["a", "b"]')
    assert configured(tmp_path, "workers: 1").kubernetes == KubernetesConfig(namespaces=("a", "b"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{kubernetes: {}, endpoints: e.yaml}", "listed in `endpoints` already"),
        ("kubernetes: {namespaces: ['*', a]}", "are all"),
        ("kubernetes: {namespaces: [Not_One]}", "namespaces"),
        ("kubernetes: {port: 0}", "port"),
        ("kubernetes: {selectors: x}", "selectors"),
    ],
)
def test_configuration_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match="kubernetes.*" + problem.replace("*", r"\*")) as error:
        configured(tmp_path, text)
    assert "\n" not in str(error.value)


def test_without_access_to_a_cluster_the_router_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(
        ConfigError, match=r"kubernetes: there is no access to a cluster .*automountServiceAccountToken"
    ):
        check_access()
    kubeconfig(tmp_path / "missing", "http://127.0.0.1:1")
    check_access()
