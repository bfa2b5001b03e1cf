"""The pods as Envoy is told of them, where it keeps a list: in its bootstrap, or in a file that it watches.

The file (`envoy.pods_file`) is a DiscoveryResponse with one ClusterLoadAssignment, as JSON, for Envoy's endpoint
discovery by file. Envoy reads it again when it is moved into its place, so it is written beside that and renamed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from router.replies import NAMESPACE
from workers.address import parse_address

log = structlog.get_logger()

Json = dict[str, Any]

POD_CLUSTER = "pods"
LOAD_ASSIGNMENT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


def envoy_address(text: str) -> Json:
    """An address as Envoy's configuration has it."""
    kind, place, port = parse_address(text)
    if kind == "unix":
        return {"pipe": {"path": place}}
    return {"socket_address": {"address": place, "port_value": port}}


def load_assignment(pods: Mapping[str, str]) -> Json:
    """A ClusterLoadAssignment of pods: their names by host:port, empty where the router's name is not known."""
    endpoints = []
    for address, name in sorted(pods.items()):
        endpoint: Json = {"endpoint": {"address": envoy_address(address)}}
        if name:
            endpoint["metadata"] = {"filter_metadata": {NAMESPACE: {"pod": name}}}
        endpoints.append(endpoint)
    return {"cluster_name": POD_CLUSTER, "endpoints": [{"lb_endpoints": endpoints}]}


class PodsFile:
    """Keeps the file as the pods are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed = ""

    def write(self, pods: Mapping[str, str]) -> None:
        """Names by host:port. What is in the file already is not written again; an error is logged once and tried
        again with the next call."""
        text = json.dumps({"resources": [{"@type": LOAD_ASSIGNMENT, **load_assignment(pods)}]})
        try:
            if self._path.exists() and self._path.read_text() == text:
                return
            beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            beside.write_text(text)
            beside.replace(self._path)
        except (OSError, UnicodeDecodeError) as error:
            if str(error) != self._failed:
                log.error("envoy.pods_file cannot be written, Envoy keeps the pods it has", error=str(error))
            self._failed = str(error)
        else:
            self._failed = ""
