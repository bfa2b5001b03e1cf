"""What is deployed is what the code can run: configurations load, ports are those of the workers."""

from pathlib import Path

import yaml

from workers.config import load
from workers.discovery.endpoints_file import read_endpoints

DEPLOY = Path(__file__).parent.parent / "deploy"


def test_the_kubernetes_manifest_fits_the_configuration_in_it(tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "pointsman.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    for name, text in by_kind["ConfigMap"]["data"].items():
        (tmp_path / name).write_text(text)
    config = load(tmp_path / "pointsman.yaml")
    assert config.endpoints is not None and read_endpoints(config.endpoints)

    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    for number in range(config.workers):
        assert config.worker_address(number).endswith(f":{ports[f'worker-{number}']}")
    assert config.listen.endswith(f":{ports['grpc']}") and config.admin.endswith(f":{ports['admin']}")
    assert {port["port"] for port in by_kind["Service"]["spec"]["ports"]} == set(ports.values())
    assert pod["terminationGracePeriodSeconds"] > config.drain_seconds + 5


def test_the_image_has_every_package() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = {line.split()[1] for line in lines if line.startswith("COPY ") and "--from" not in line}
    assert {"router", "workers", "state", "protos", "bench", "pyproject.toml"} <= copied
