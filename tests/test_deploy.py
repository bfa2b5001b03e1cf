"""What is deployed is what the code can run: configurations load, ports are those of the workers, names match."""

import http.client
import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from fleet import make_tables

from bench.lab import Lab
from workers.config import Config, KubernetesConfig, load
from workers.discovery.endpoints_file import read_endpoints
from workers.discovery.kubernetes_source import ModelAdapter
from workers.envoy import ROUTER_CLUSTER, bootstrap
from workers.envoy_binary import envoy_path, validated
from workers.metrics import TablesCollector
from workers.supervisor import KILL_AFTER_SECONDS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

Json = dict[str, Any]


def manifest(name: str) -> dict[str, Json]:
    """The documents of a file by their kind."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents)
    return by_kind


def pod_of(by_kind: dict[str, Json]) -> Json:
    pod: Json = by_kind["Deployment"]["spec"]["template"]["spec"]
    return pod


def ports_of(by_kind: dict[str, Json]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod_of(by_kind)["containers"][0]["ports"]}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """What the deployed router runs with."""
    router = manifest("pointsman")
    for name, text in router["ConfigMap"]["data"].items():
        (tmp_path / name).write_text(text)
    for name, text in router["Secret"]["stringData"].items():
        monkeypatch.setenv(name, text)
    return load(tmp_path / "pointsman.yaml")


def test_the_kubernetes_manifest_fits_the_configuration_in_it(config: Config) -> None:
    router = manifest("pointsman")
    assert config.endpoints is not None and read_endpoints(config.endpoints)

    pod, ports = pod_of(router), ports_of(router)
    for number in range(config.workers):
        assert config.worker_address(number).endswith(f":{ports[f'worker-{number}']}")
    assert len(ports) == config.workers + 2
    assert config.listen.endswith(f":{ports['grpc']}") and config.admin.endswith(f":{ports['admin']}")
    assert {port["port"] for port in router["Service"]["spec"]["ports"]} == set(ports.values())
    assert router["Service"]["spec"]["clusterIP"] == "None"
    _, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + config.drain_seconds + KILL_AFTER_SECONDS
    assert router["Deployment"]["spec"]["minReadySeconds"] > int(seconds), "whoever leaves is missed by nobody"

    names = {source["secretRef"]["name"] for source in pod["containers"][0]["envFrom"]}
    assert names == {router["Secret"]["metadata"]["name"]}
    assert pod["volumes"][0]["configMap"]["name"] == router["ConfigMap"]["metadata"]["name"]


def test_what_is_commented_out_in_the_manifest_is_configuration_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = manifest("pointsman")
    text = router["ConfigMap"]["data"]["pointsman.yaml"]
    assert "# redis:" in text
    (tmp_path / "pointsman.yaml").write_text(
        text.replace("# redis:", "redis:").replace("endpoints: endpoints.yaml", "")
    )
    assert load(tmp_path / "pointsman.yaml").redis
    whole = (DEPLOY / "kubernetes" / "pointsman.yaml").read_text()
    (secret,) = re.findall(r"# POINTSMAN_REDIS: (\S+)", whole)
    monkeypatch.setenv("POINTSMAN_REDIS", secret)
    monkeypatch.setenv("POINTSMAN_SESSION_SECRET", "0123456789abcdef")
    config = load(tmp_path / "pointsman.yaml")
    assert config.redis == secret and config.session_secret.get_secret_value()


def test_the_router_may_read_what_it_finds_the_pods_by(tmp_path: Path) -> None:
    whole = (DEPLOY / "kubernetes" / "pointsman.yaml").read_text()
    for old, new in (
        ("    endpoints: endpoints.yaml\n", ""),
        ("# kubernetes: {}", "kubernetes: {}"),
        ("# serviceAccountName:", "serviceAccountName:"),
        ("automountServiceAccountToken: false", "automountServiceAccountToken: true"),
    ):
        assert whole.count(old) == 1
        whole = whole.replace(old, new)
    router = {document["kind"]: document for document in yaml.safe_load_all(whole)}
    (tmp_path / "pointsman.yaml").write_text(router["ConfigMap"]["data"]["pointsman.yaml"])
    assert load(tmp_path / "pointsman.yaml").kubernetes == KubernetesConfig()
    rights = manifest("discovery")
    account = rights["ServiceAccount"]["metadata"]["name"]
    assert pod_of(router)["serviceAccountName"] == account
    assert rights["RoleBinding"]["subjects"][0]["name"] == account
    assert rights["RoleBinding"]["roleRef"]["name"] == rights["Role"]["metadata"]["name"]
    asked = {("", "pods"), ("model.aibrix.ai", ModelAdapter._api_info.plural)}
    allowed = {(rule["apiGroups"][0], rule["resources"][0]): rule["verbs"] for rule in rights["Role"]["rules"]}
    assert allowed == {each: ["list", "watch"] for each in asked}


def test_several_replicas_account_by_stream_and_find_each_other_by_one_name(config: Config) -> None:
    router = manifest("pointsman")
    assert router["Deployment"]["spec"]["replicas"] > 1
    assert config.envoy.accounting == "stream"
    assert config.envoy.router_host.split(".")[0] == router["Service"]["metadata"]["name"]


def test_envoys_manifest_fits_the_bootstrap_it_is_given(config: Config) -> None:
    router, envoy = manifest("pointsman"), manifest("envoy")
    document = bootstrap(config)
    clusters = {cluster["name"]: cluster for cluster in document["static_resources"]["clusters"]}
    assert clusters[ROUTER_CLUSTER]["type"] == "STRICT_DNS"
    endpoints = clusters[ROUTER_CLUSTER]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    dialled = [endpoint["endpoint"]["address"]["socket_address"]["port_value"] for endpoint in endpoints]
    ports = ports_of(router)
    assert dialled == [ports[f"worker-{number}"] for number in range(config.workers)]

    (listener,) = document["static_resources"]["listeners"]
    assert ports_of(envoy) == {"http": listener["address"]["socket_address"]["port_value"]}
    assert [port["targetPort"] for port in envoy["Service"]["spec"]["ports"]] == ["http"]
    pod = pod_of(envoy)
    container = pod["containers"][0]
    (mount,) = container["volumeMounts"]
    path = Path(container["args"][container["args"].index("-c") + 1])
    assert str(path.parent) == mount["mountPath"]
    name = pod["volumes"][0]["configMap"]["name"]
    for text in ((DEPLOY / "README.md").read_text(), (DEPLOY / "kubernetes" / "envoy.yaml").read_text()):
        assert f"kubectl create configmap {name} --from-file={path.name} " in text
    *_, pre_stop = container["lifecycle"]["preStop"]["exec"]["command"]
    (seconds,) = re.findall(r"sleep (\d+)$", pre_stop)
    assert pod["terminationGracePeriodSeconds"] > int(seconds)
    admin = document["admin"]["address"]["socket_address"]
    assert f"/dev/tcp/{admin['address']}/{admin['port_value']};" in pre_stop


@pytest.mark.envoy
def test_envoy_takes_the_bootstrap_of_the_manifest(config: Config) -> None:
    validated(envoy_path(), bootstrap(config))


@pytest.mark.envoy
def test_an_envoy_that_leaves_has_its_clients_leave() -> None:
    """By what its manifest does before it stops."""
    *shell, pre_stop = pod_of(manifest("envoy"))["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    with Lab(pods=1, workers=1) as lab:
        where = urlsplit(lab.envoy_url)
        admin = lab.config.envoy.admin.replace(":", "/")
        client = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)

        def closes() -> bool:
            client.request("GET", "/v1/models")
            response = client.getresponse()
            assert response.status == 200 and response.read()
            return response.getheader("connection") == "close"

        assert not closes()
        done = subprocess.run(
            [*shell, pre_stop.replace("127.0.0.1/9901", admin).replace("sleep 60", "echo slept")],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        assert (done.stdout, done.stderr) == ("slept\n", "")
        assert closes()
    client.close()
    # Where the port is another it sleeps all the same.
    done = subprocess.run(
        [*shell, pre_stop.replace("127.0.0.1/9901", admin).replace("sleep 60", "echo slept")],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout == "slept\n"


def test_what_the_manifests_ask_for_is_what_the_page_says() -> None:
    page = (DEPLOY / "README.md").read_text()
    total = most = 0
    for name, called in (("pointsman", "router"), ("envoy", "Envoy")):
        spec = manifest(name)["Deployment"]["spec"]
        requests = spec["template"]["spec"]["containers"][0]["resources"]["requests"]
        cpus, memory = int(requests["cpu"]), int(requests["memory"].removesuffix("Mi"))
        replicas, surge = spec["replicas"], spec["replicas"] + spec["strategy"]["rollingUpdate"]["maxSurge"]
        cells = [f"{cpus * count} CPUs, {memory * count}Mi" for count in (1, replicas, surge)]
        assert f"| {called}, {replicas} replicas | {' | '.join(cells)} |" in page
        total += cpus * replicas
        most += cpus * surge
    assert f"Together that is {total} CPUs, and up to {most} while" in page


def test_only_envoy_and_prometheus_reach_the_router() -> None:
    router, envoy = manifest("pointsman"), manifest("envoy")
    spec = manifest("networkpolicy")["NetworkPolicy"]["spec"]
    labels = {name: by_kind["Deployment"]["spec"]["selector"] for name, by_kind in (("r", router), ("e", envoy))}
    from_envoy, from_prometheus = spec["ingress"]
    assert spec["podSelector"] == labels["r"]
    assert from_envoy["from"] == [{"podSelector": labels["e"]}]
    first, last = next((port["port"], port["endPort"]) for port in from_envoy["ports"] if "endPort" in port)
    ports = ports_of(router)
    workers = {ports.pop(name) for name in list(ports) if name.startswith("worker-")}
    assert min(workers) == first and max(workers) <= last
    assert {port["port"] for port in from_envoy["ports"]} == {first, *ports.values()}
    assert f"{first}-{last}" in (DEPLOY / "Dockerfile").read_text()
    assert [port["port"] for port in from_prometheus["ports"]] == [ports_of(router)["admin"]]


@pytest.mark.parametrize("name", ["pointsman", "envoy"])
def test_selectors_and_pods_have_the_same_labels(name: str) -> None:
    by_kind = manifest(name)
    template = by_kind["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert by_kind["Service"]["spec"]["selector"] == labels
    assert by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    pod = template["spec"]
    assert pod["enableServiceLinks"] is False and pod["automountServiceAccountToken"] is False
    container = pod["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_are_whole_documents(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        assert document["apiVersion"] and document["kind"] and document["metadata"]["name"]


def test_the_image_has_every_package() -> None:
    copied = set(_copied())
    assert {"router", "workers", "state", "protos", "bench", "pyproject.toml"} <= copied
    for name in copied:
        assert (ROOT / name).exists()


def test_the_image_is_made_without_what_was_built_here() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line for line in lines if line and not line.startswith("#")]
    assert {".git", ".venv", "**/*.so", "**/__pycache__"} <= set(ignored)
    assert [name for name in _copied() if any(fnmatch(name, pattern) for pattern in ignored)] == []


def test_the_image_is_called_by_the_version() -> None:
    tag = f"pointsman:{VERSION}"
    assert pod_of(manifest("pointsman"))["containers"][0]["image"] == tag
    for text in ((DEPLOY / "Dockerfile").read_text(), (DEPLOY / "README.md").read_text()):
        assert f"docker build -f deploy/Dockerfile -t {tag} ." in text


def _copied() -> Iterator[str]:
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            yield from line.split()[1:-1]


# Metrics


def metric_names() -> set[str]:
    """Everything that a sample of ours can be called."""
    names = set()
    for family in TablesCollector(make_tables()).collect():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "info": ("_info",)}.get(
            family.type, ("",)
        )
        names |= {family.name + ending for ending in endings}
    return names


def rules() -> list[Json]:
    document = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def test_alerts_are_on_metrics_that_exist() -> None:
    for rule in rules():
        named = set(re.findall(r"\bpointsman_\w+", rule["expr"]))
        assert named and named <= metric_names(), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_the_operations_page_lists_only_events_that_are_logged() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    (table,) = re.findall(r"^\| event \| level .*\n((?:\|.*\n)+)", page, re.M)
    listed = [event for row in table.splitlines()[1:] for event in re.findall(r"`([^`]+)`", row.split("|")[1])]
    sources = "".join(path.read_text() for path in (ROOT / "workers").rglob("*.py"))
    logged = set(re.findall(r"log\.\w+\(\s*\"([^\"]+)\"", sources))
    assert len(listed) > 10
    assert [event for event in listed if event not in logged] == []


def test_the_operations_page_lists_all_alerts_and_all_metrics() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    alerts = [rule["alert"] for rule in rules()]
    assert re.findall(r"^\| `(Pointsman\w+)` \|", page, re.M) == alerts
    named = set(re.findall(r"\bpointsman_\w+", page))
    plain = {name.removesuffix("_bucket") for name in metric_names()}
    assert named == {name for name in plain if not name.endswith(("_count", "_sum"))}
