"""The bootstrap that `pointsman envoy` writes, read by Envoy itself."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from router.exchange import ACCOUNTING_KEY, DESTINATION_KEY, EnvoyPeer
from router.replies import DESTINATION_HEADERS, Destination
from workers.config import Config, ConfigError, load
from workers.envoy import ADMIN_CLUSTER, ROUTER_CLUSTER, bootstrap
from workers.envoy_binary import envoy_path, validated
from workers.envoy_pods import POD_CLUSTER, PodsFile

DESTINATIONS = ["header", "metadata", "override-host"]
ACCOUNTINGS = ["access-log", "stream"]


@pytest.fixture
def endpoints(tmp_path: Path) -> Path:
    path = tmp_path / "endpoints.yaml"
    path.write_text(
        "models: [{name: a, endpoints: ['10.0.0.1:8000', 'vllm.svc:8000']},"
        " {name: b, rolesets: [{name: r, prefill: ['10.0.0.3:1'], decode: ['[fd00::1]:2', '10.0.0.1:8000']}]}]"
    )
    return path


def make_config(endpoints: Path | None, envoy: dict[str, Any] | None = None, **rest: Any) -> Config:
    return load(None, {"workers": 3, "endpoints": endpoints, "envoy": envoy or {}, **rest})


def cluster(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in document["static_resources"]["clusters"] if one["name"] == name]
    return dict(found)


def endpoint_addresses(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    (locality,) = cluster(document, name)["load_assignment"]["endpoints"]
    return [one["endpoint"]["address"] for one in locality["lb_endpoints"]]


def manager(document: dict[str, Any]) -> dict[str, Any]:
    (listener,) = document["static_resources"]["listeners"]
    return dict(listener["filter_chains"][0]["filters"][0]["typed_config"])


def ext_proc(document: dict[str, Any]) -> dict[str, Any]:
    return dict(manager(document)["http_filters"][0]["typed_config"])


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


@pytest.mark.envoy
@pytest.mark.parametrize(("destination", "accounting"), list(itertools.product(DESTINATIONS, ACCOUNTINGS)))
def test_envoy_accepts_every_variant(endpoints: Path, destination: str, accounting: str) -> None:
    document = bootstrap(make_config(endpoints, {"destination": destination, "accounting": accounting}))
    validated(envoy_path(), document)


@pytest.mark.envoy
@pytest.mark.parametrize(
    "changes",
    [
        {"worker_listen": "unix:/tmp/pointsman-{i}.sock", "admin": "unix:/tmp/pointsman-admin.sock"},
        {"worker_listen": "unix:/tmp/pointsman-{i}.sock", "envoy": {"router_host": "pointsman.svc"}},
        {"worker_listen": "[::]:20052", "admin": "[::1]:8080", "envoy": {"router_host": "::1", "listen": "[::]:10080"}},
        {"envoy": {"router_host": "pointsman.svc.cluster.local"}},
        {"worker_listen": "worker.svc:20052", "admin": "admin.svc:8080"},
        {"envoy": {"heap_bytes": 1 << 30, "max_connections": 100, "upload_seconds": 0.001}},
        {"envoy": {"upload_seconds": 86400}},
        {"workers": 40, "max_message_bytes": 1 << 30, "envoy": {"body_limit_bytes": 1 << 29}},
    ],
)
def test_envoy_accepts_addresses_of_every_kind(changes: dict[str, Any]) -> None:
    validated(envoy_path(), bootstrap(make_config(None, **changes)))


@pytest.mark.envoy
def test_what_envoy_does_not_accept_is_said_in_its_own_words() -> None:
    document = bootstrap(make_config(None))
    document["static_resources"]["clusters"][0]["lb_policy"] = "NO_SUCH"
    with pytest.raises(ConfigError, match=r"Envoy does not accept this bootstrap: .*NO_SUCH") as raised:
        validated(envoy_path(), document)
    assert "\n" not in str(raised.value)


def test_there_is_one_endpoint_for_each_worker() -> None:
    document = bootstrap(make_config(None, {"router_host": "10.5.5.5"}))
    assert endpoint_addresses(document, ROUTER_CLUSTER) == [
        {"socket_address": {"address": "10.5.5.5", "port_value": 20052 + number}} for number in range(3)
    ]
    assert cluster(document, ROUTER_CLUSTER)["lb_policy"] == "LEAST_REQUEST"


def test_a_full_connection_to_a_worker_is_given_time_to_answer_a_ping() -> None:
    """A PING waits behind bodies; the health checks find dead workers sooner."""
    router = cluster(bootstrap(make_config(None)), ROUTER_CLUSTER)
    (options,) = router["typed_extension_protocol_options"].values()
    keepalive = options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"]
    assert keepalive == {"interval": "10s", "timeout": "10s"}
    (check,) = router["health_checks"]
    assert int(check["interval"].removesuffix("s")) * check["unhealthy_threshold"] < 10


def test_unix_sockets_become_pipes() -> None:
    document = bootstrap(make_config(None, worker_listen="unix:/run/w{i}.sock", admin="unix:/run/admin.sock"))
    assert endpoint_addresses(document, ROUTER_CLUSTER) == [{"pipe": {"path": f"/run/w{n}.sock"}} for n in range(3)]
    assert endpoint_addresses(document, ADMIN_CLUSTER) == [{"pipe": {"path": "/run/admin.sock"}}]
    assert cluster(document, ROUTER_CLUSTER)["type"] == "STATIC"


def test_a_worker_that_listens_on_one_address_is_dialled_there() -> None:
    document = bootstrap(make_config(None, {"router_host": "10.5.5.5"}, worker_listen="127.0.0.9:20052"))
    assert endpoint_addresses(document, ROUTER_CLUSTER)[0]["socket_address"]["address"] == "127.0.0.9"


@pytest.mark.parametrize(("destination", "accounting"), list(itertools.product(DESTINATIONS, ACCOUNTINGS)))
def test_what_envoy_says_of_itself_is_what_the_exchange_understands(
    endpoints: Path, destination: str, accounting: str
) -> None:
    document = bootstrap(make_config(endpoints, {"destination": destination, "accounting": accounting}))
    metadata = {one["key"]: one["value"] for one in ext_proc(document)["grpc_service"]["initial_metadata"]}
    peer = EnvoyPeer(metadata[ACCOUNTING_KEY], metadata[DESTINATION_KEY])
    assert peer.destination is Destination(destination)
    assert (not peer.held) == (accounting == "access-log") == ("access_log" in manager(document))


@pytest.mark.parametrize("destination", DESTINATIONS)
def test_no_header_of_a_clients_reaches_the_choice_of_a_pod(endpoints: Path, destination: str) -> None:
    document = bootstrap(make_config(endpoints, {"destination": destination}))
    (early,) = manager(document)["early_header_mutation_extensions"]
    assert [one["remove"] for one in early["typed_config"]["mutations"]] == list(DESTINATION_HEADERS)


def test_the_body_limit_is_on_every_route_to_the_pods() -> None:
    document = bootstrap(make_config(None, {"body_limit_bytes": 12345}))
    routes = manager(document)["route_config"]["virtual_hosts"][0]["routes"]
    to_pods = [route for route in routes if route.get("route", {}).get("cluster") == POD_CLUSTER]
    assert [route["request_body_buffer_limit"] for route in to_pods] == [12345]
    assert all("typed_per_filter_config" in route for route in routes if route not in to_pods)


def test_only_with_override_host_may_a_request_pass_without_the_router(endpoints: Path) -> None:
    for destination in DESTINATIONS:
        document = bootstrap(make_config(endpoints, {"destination": destination}))
        assert ext_proc(document)["failure_mode_allow"] == (destination == "override-host")


@pytest.mark.parametrize("limits", [{"bearer_token": "secret"}, {"require_key": True, "users_file": "users.yaml"}])
def test_no_request_passes_a_lock_while_the_router_is_gone(endpoints: Path, limits: dict[str, Any]) -> None:
    config = make_config(endpoints, {"destination": "override-host"}, limits=limits)
    assert ext_proc(bootstrap(config))["failure_mode_allow"] is False


def test_override_host_knows_every_pod_of_the_file_once(endpoints: Path) -> None:
    document = bootstrap(make_config(endpoints, {"destination": "override-host"}))
    addresses = [one["socket_address"] for one in endpoint_addresses(document, POD_CLUSTER)]
    assert sorted((one["address"], one["port_value"]) for one in addresses) == [
        ("10.0.0.1", 8000), ("10.0.0.3", 1), ("fd00::1", 2), ("vllm.svc", 8000),
    ]  # fmt: skip


def test_override_host_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set envoy\.pods_file, or endpoints"):
        bootstrap(make_config(None, {"destination": "override-host"}))


def test_with_a_pods_file_envoy_watches_that(tmp_path: Path) -> None:
    path = tmp_path / "pods.json"
    document = bootstrap(make_config(None, {"destination": "override-host", "pods_file": str(path)}))
    pods = cluster(document, POD_CLUSTER)
    assert pods["type"] == "EDS" and "load_assignment" not in pods
    assert pods["eds_cluster_config"]["eds_config"]["path_config_source"] == {"path": str(path)}


def test_a_pods_file_for_an_envoy_that_keeps_no_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="set destination to override-host"):
        make_config(None, {"pods_file": "pods.json"})


def test_the_pods_file_is_moved_into_place_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "pods.json"
    file = PodsFile(path)
    file.write({"10.0.0.1:8000": "one", "[fd00::1]:1": ""})
    first = path.stat()
    file.write({"[fd00::1]:1": "", "10.0.0.1:8000": "one"})
    assert path.stat().st_ino == first.st_ino, "nothing has changed"
    (resource,) = json.loads(path.read_text())["resources"]
    one, other = resource["endpoints"][0]["lb_endpoints"]
    assert one["metadata"]["filter_metadata"]["pointsman"] == {"pod": "one"}
    assert other["endpoint"]["address"]["socket_address"] == {"address": "fd00::1", "port_value": 1}
    file.write({})
    assert path.stat().st_ino != first.st_ino
    assert [file.name for file in tmp_path.iterdir()] == ["pods.json"]


def test_a_pods_file_that_cannot_be_written_is_logged_once(tmp_path: Path) -> None:
    file = PodsFile(tmp_path / "missing" / "pods.json")
    with capture_logs() as logs:
        for _ in range(3):
            file.write({})
    assert [line["event"] for line in logs] == ["envoy.pods_file cannot be written, Envoy keeps the pods it has"]


def test_nothing_in_it_is_left_unwritten(endpoints: Path) -> None:
    for destination, accounting in itertools.product(DESTINATIONS, ACCOUNTINGS):
        document = bootstrap(make_config(endpoints, {"destination": destination, "accounting": accounting}))
        assert not [text for text in strings(document) if "{i}" in text or "None" in text]


def pod_names(document: dict[str, Any]) -> dict[str, str]:
    (locality,) = cluster(document, POD_CLUSTER)["load_assignment"]["endpoints"]
    return {
        one["endpoint"]["address"]["socket_address"]["address"]: one.get("metadata", {})
        .get("filter_metadata", {})
        .get("pointsman", {})
        .get("pod", "")
        for one in locality["lb_endpoints"]
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("['10.0.0.1:8000', '[fd00::1]:1']", {"10.0.0.1": "a-10-0-0-1-0", "fd00::1": "a-fd00::1-1"}),
        ("[{address: '10.0.0.1:8000', name: x}]", {"10.0.0.1": "x"}),
        (
            "['vllm.svc:1', {address: '10.0.0.2:1', name: x}, '10.0.0.3:1']",
            {"vllm.svc": "", "10.0.0.2": "x", "10.0.0.3": ""},
        ),
        ("[{address: 'vllm.svc:1', name: x}]", {"vllm.svc": ""}),
    ],
)
def test_envoy_knows_the_pods_names_where_they_do_not_depend_on_a_look_up(
    tmp_path: Path, text: str, names: dict[str, str]
) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(f"models: [{{name: a, endpoints: {text}}}]")
    assert pod_names(bootstrap(make_config(path, {"destination": "override-host"}))) == names


@pytest.mark.parametrize("accounting", ACCOUNTINGS)
@pytest.mark.parametrize("destination", DESTINATIONS)
def test_where_envoy_may_retry_it_says_which_pod_answered(endpoints: Path, destination: str, accounting: str) -> None:
    document = bootstrap(make_config(endpoints, {"destination": destination, "accounting": accounting}))
    routes = manager(document)["route_config"]["virtual_hosts"][0]["routes"]
    (pods,) = [one for one in routes if one["match"].get("prefix") == "/v1/"]
    told = [(each["header"]["key"], each["header"]["value"]) for each in pods.get("response_headers_to_add", [])]
    assert (("target-pod-ip", "%UPSTREAM_REMOTE_ADDRESS%") in told) == (destination == "override-host")
    if told and destination == "override-host":
        assert told[-1][0] == "target-pod-ip", "later ones win"


@pytest.mark.parametrize(("seconds", "timeout"), [(0.5, "60s"), (30.0, "70s"), (60.0, "130s"), (290.0, "590s")])
def test_two_prefills_have_room_in_the_time_for_an_answer(endpoints: Path, seconds: float, timeout: str) -> None:
    written = ext_proc(bootstrap(make_config(endpoints, pd={"timeout_seconds": seconds})))
    assert written["message_timeout"] == timeout
    assert float(timeout[:-1]) <= float(written["max_message_timeout"][:-1])
