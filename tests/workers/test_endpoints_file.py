"""AIBrix's endpoints file, and what is said of one that cannot be used."""

from pathlib import Path

import pytest
import yaml

from workers.discovery.endpoints_file import EndpointsError, read_endpoints


def write(path: Path, text: str) -> Path:
    file = path / "endpoints.yaml"
    file.write_text(text)
    return file


def test_aibrix_own_shape(tmp_path: Path) -> None:
    models = read_endpoints(
        write(
            tmp_path,
            """
models:
  - name: llama
    engine: vllm
    endpoints: ["10.0.0.1:8000", "vllm-1.example:8000", "[fd00::1]:8000"]
  - name: qwen
    engine: sglang
    rolesets:
      - name: rs-0
        prefill: ["10.0.1.1:8000"]
        decode: ["10.0.1.2:8000", "10.0.1.3:8000"]
""",
        )
    )
    llama, qwen = models
    assert [endpoint.address for endpoint in llama.endpoints] == [
        "10.0.0.1:8000", "vllm-1.example:8000", "[fd00::1]:8000",
    ]  # fmt: skip
    assert (qwen.engine, qwen.rolesets[0].name) == ("sglang", "rs-0")
    assert [endpoint.address for endpoint in qwen.rolesets[0].decode] == ["10.0.1.2:8000", "10.0.1.3:8000"]


def test_endpoints_with_particulars(tmp_path: Path) -> None:
    (model,) = read_endpoints(
        write(
            tmp_path,
            """
models:
  - name: llama
    metrics_port: 9000
    adapters: [lora-a]
    config: {defaultProfile: x, profiles: {x: {routingStrategy: random}}}
    endpoints:
      - {address: "a:1", name: first, metrics_port: 9001, labels: {zone: a}, adapters: [lora-b]}
      - b:2
""",
        )
    )
    assert model.endpoints[0].name == "first"
    assert (model.endpoints[0].metrics_port, model.endpoints[1].metrics_port, model.metrics_port) == (9001, None, 9000)
    assert model.config.settings()["profiles"]["x"] == {"routingStrategy": "random"}


def test_no_models_at_all_is_a_file(tmp_path: Path) -> None:
    assert read_endpoints(write(tmp_path, "models: []")) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a mapping with keys such as `models`"),
        ("[]", "must be a mapping with keys such as `models`"),
        ("models:", "models: "),
        ("models: [{}]", "models.0.name: Field required"),
        ("models: [{name: ''}]", "models.0.name: "),
        ("models: [{name: 5}]", "models.0.name: "),
        ('models: [{name: "a\\nb"}]', "models.0.name: 'a\\nb' must be printable"),
        ('models: [{name: "\\uE000"}]', "must be printable"),
        ('models: [{name: a, labels: {zone: "\\uD800"}}]', "models.0.labels: 'zone': '\\ud800' is not text"),
        ("models: [{name: a, engine: tgi}]", "models.0.engine: "),
        ("models: [{name: a, endpoints: ['a:b']}]", "models.0.endpoints.0.address: 'a:b' is not an address"),
        ("models: [{name: a, endpoints: ['']}]", "':8000' is not an address"),
        ("models: [{name: a, endpoints: ['unix:/x']}]", "'unix:/x' is not a pod address: write host:port"),
        ("models: [{name: a, endpoints: ['a:0']}]", "'a:0' is not an address: write host:port, such as 10.0.0.1:8000"),
        ("models: [{name: a, endpoints: ['http://a:1']}]", "write host:port alone, without http://"),
        ("models: [{name: a, endpoints: ['a:1/v1']}]", "write host:port alone, without /v1"),
        ("models: [{name: a, metrics_port: true}]", "models.0.metrics_port: must be a number (got True)"),
        ("models: [{name: a, endpoints: [{address: 'a:1', metrics_port: 70000}]}]", "metrics_port"),
        ("models: [{name: a, endpoint: ['a:1']}]", "no key 'models.0.endpoint'; did you mean 'models.0.endpoints'?"),
        ("models: [{name: a, labels: {a: 1}}]", "models.0.labels.a"),
        ("models: [{name: a, config: {1: 2}}]", "models.0.config.1"),
        ("models: [{name: a, endpoints: [{adress: x}]}]", "models.0.endpoints.0.address: Field required"),
        ("models: [{name: a, endpoints: [{adress: x}]}]", "did you mean 'models.0.endpoints.0.address'?"),
        ("models: [{name: 5}]", "models.0.name: must be text: write it in quotes (got 5)"),
        (
            "models: [{name: a, endpoints: [{address: x, adapter: [y]}]}]",
            "did you mean 'models.0.endpoints.0.adapters'?",
        ),
        ("models: [{name: a, endpoints: [7]}]", "models.0.endpoints.0: write host:port, or a mapping"),
        ("models: [{name: a, endpoints: 'b:1'}]", "models.0.endpoints: must be a list"),
        ("models: [7]", "models.0: must be a mapping with keys such as `name`"),
        ("models: [{name: a, labels: 7}]", "models.0.labels: must be a mapping of keys to values"),
        ("models: [{name: a}, {}, {}]", "(and 1 more)"),
        ("models: [\n  {name: a,\n", "line "),
        ("a: b: c", "line 1, column 5: not YAML"),
        ("x: 2001-99-99", "not YAML: month must be in 1..12"),
        ("x: !!python/object:os.system {}", "not YAML: could not determine a constructor"),
        ("\x00", "not YAML: unacceptable character"),
        ("[" * 1200, "not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(EndpointsError) as raised:
        read_endpoints(path)
    message = str(raised.value)
    assert message.startswith(f"{path}:")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            "{profiles: {x: {routingStrategy: nope}}}",
            "models.0.config.profiles.x.routingStrategy: no strategy 'nope'; ",
        ),
        ("{profiles: {x: {routingStrategy: least-requests}}}", "did you mean 'least-request'?"),
        ("{profiles: {x: {routingStrategy: 'random:1,least-request:1'}}}", "random has no scores"),
        ("{profiles: {x: {routingStrategy: 'prefix-cache:x'}}}", "is not a combination of strategies"),
        ("{profiles: {x: {routingStrategi: random}}}", "did you mean 'models.0.config.profiles.x.routingStrategy'?"),
        ("{profiles: {x: {requestsPerSecond: '5'}}}", "x.requestsPerSecond: Input should be a valid integer"),
        ("{profiles: {x: {requestsPerSecond: -1}}}", "x.requestsPerSecond: "),
        ("{profiles: {x: {routingConfig: {promptTokensGte: '8'}}}}", "routingConfig: promptTokensGte: must be a whole"),
        ("{profiles: {x: {routingConfig: {a: {1: 2}}}}}", "routingConfig: must contain only JSON values"),
        ("{profiles: {x: {routingConfig: {a: !!binary aGk=}}}}", "routingConfig: must contain only JSON values"),
        ("{profiles: {x: 7}}", "models.0.config.profiles.x: must be a mapping with keys such as `routingStrategy`"),
        ("{profiles: {default: {}}, lockedRoutingStrategy: dp}", "lockedRoutingStrategy: no strategy 'dp'"),
        ("{profiles: {default: {}}, defaultProfile: defalt}", "no profile 'defalt'; did you mean 'default'?"),
        ("{lockedRoutingStrategy: random}", "add `profiles: {default: {}}`"),
        ("{lockedStrategy: random}", "did you mean 'models.0.config.lockedRoutingStrategy'?"),
        ("{state: asleep}", "models.0.config.state: no state 'asleep'; did you mean 'sleeping'?"),
    ],
)
def test_routing_profiles_that_could_not_be_followed(tmp_path: Path, config: str, says: str) -> None:
    """Else they would be found out request by request, with a 400 that blames the client."""
    path = write(tmp_path, f"models: [{{name: a, config: {config}}}]")
    with pytest.raises(EndpointsError) as raised:
        read_endpoints(path)
    assert says in str(raised.value)


def test_an_annotation_in_a_label_is_read_as_strictly(tmp_path: Path) -> None:
    label = """model.aibrix.ai/config: '{"profiles": {"x": {"routingStrategy": "nope"}}}'"""
    for place in (f"labels: {{{label}}}", f"endpoints: [{{address: b, labels: {{{label}}}}}]"):
        with pytest.raises(EndpointsError, match=r"config: profiles\.x\.routingStrategy: no strategy 'nope'"):
            read_endpoints(write(tmp_path, f"models: [{{name: a, {place}}}]"))


def test_a_configuration_is_handed_on_as_it_was_written(tmp_path: Path) -> None:
    text = (
        "{lockedRoutingStrategy: '', defaultProfile: x, profiles: {x: , y: {routingConfig: {q: [1]}}}, state: Active}"
    )
    (model,) = read_endpoints(write(tmp_path, f"models: [{{name: a, config: {text}}}]"))
    assert model.config.settings() == yaml.safe_load(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EndpointsError, match="cannot be read: No such file"):
        read_endpoints(tmp_path / "none")
    with pytest.raises(EndpointsError, match="cannot be read: Is a directory"):
        read_endpoints(tmp_path)
    (tmp_path / "latin").write_bytes(b"models: [\xff]")
    with pytest.raises(EndpointsError, match="not UTF-8"):
        read_endpoints(tmp_path / "latin")


@pytest.mark.parametrize("text", ["vllm-host", "{address: vllm-host}", "vllm-host:8000"])
def test_a_pod_without_a_port_has_aibrixs(tmp_path: Path, text: str) -> None:
    (model,) = read_endpoints(write(tmp_path, f"models: [{{name: a, endpoints: [{text}]}}]"))
    assert model.endpoints[0].address == "vllm-host:8000"


def test_an_ipv6_pod_without_a_port_has_it_too(tmp_path: Path) -> None:
    (model,) = read_endpoints(write(tmp_path, "models: [{name: a, endpoints: ['[fd00::1]']}]"))
    assert model.endpoints[0].address == "[fd00::1]:8000"
