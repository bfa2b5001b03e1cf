"""Who is there: the pods, their models and their settings, as one document with a version.

Discovery publishes a new document when something changed (seconds to hours apart); every other process compares one
integer per request and parses the document only when it differs. So identities may be as rich as they need to be
(labels, adapters, profiles) and cost the hot path nothing.

Two buffers are written in turn. The version names the buffer that is valid (its lowest bit), and a reader that was
overtaken while copying sees that the version moved on, or that the checksum does not fit, and starts again.

    0    8 bytes   version, 0 before the first document
    64   buffer 0: 8 bytes length, 8 bytes xxh3 of the document, document
    ..   buffer 1
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
import xxhash

from state.fence import fence

_HEADER = 64
_BUFFER_HEADER = 16


class CatalogFull(Exception):
    """The document is larger than the capacity that the configuration reserved."""


@dataclass(frozen=True, slots=True)
class PodRecord:
    """One pod as discovery knows it. `slot` is its row in every table, `generation` is new for every new pod.

    `address` is "ip:port" (or "[v6]:port") with the name already resolved: Envoy's ORIGINAL_DST takes nothing else.
    """

    slot: int
    generation: int
    name: str
    address: str
    models: tuple[str, ...]
    namespace: str = "standalone"
    engine: str = "vllm"
    host: str = ""
    metrics_address: str = ""
    draining: bool = False
    role: str = ""
    roleset: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CatalogDocument:
    """Everything discovery publishes: the pods, and per model the settings that came with it (routing profiles,
    limits; free-form, read by the router)."""

    pods: tuple[PodRecord, ...] = ()
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Catalog:
    """The shared document. One process publishes, any number read."""

    def __init__(self, region: memoryview) -> None:
        self.versions = region[:8].cast("Q")
        """`version` is the first: reading it here costs a tenth."""
        self._room = (len(region) - _HEADER) // 2 - _BUFFER_HEADER
        start = _HEADER
        self._buffers = []
        for _ in range(2):
            self._buffers.append(region[start : start + _BUFFER_HEADER + self._room])
            start += _BUFFER_HEADER + self._room

    @staticmethod
    def size(document_bytes: int) -> int:
        """Bytes of shared memory for documents of up to `document_bytes`."""
        return _HEADER + 2 * (_BUFFER_HEADER + document_bytes)

    @property
    def version(self) -> int:
        """Goes up with every published document; 0 means that discovery has not loaded yet."""
        return self.versions[0]

    def check(self, document: CatalogDocument) -> bytes:
        """The document as it is published. Raises CatalogFull when it does not fit."""
        encoded = orjson.dumps(asdict(document))
        if len(encoded) > self._room:
            raise CatalogFull(
                f"the description of {len(document.pods)} pods takes {len(encoded)} bytes, the catalog has room for "
                f"{self._room}: raise capacity.catalog_bytes"
            )
        return encoded

    def publish(self, document: CatalogDocument) -> None:
        """Make `document` the valid one. Raises CatalogFull when it does not fit."""
        encoded = self.check(document)
        version = self.versions[0] + 1
        buffer = self._buffers[version & 1]
        buffer[0:8] = len(encoded).to_bytes(8, "little")
        buffer[8:16] = xxhash.xxh3_64_intdigest(encoded).to_bytes(8, "little")
        buffer[_BUFFER_HEADER : _BUFFER_HEADER + len(encoded)] = encoded
        fence()
        self.versions[0] = version

    def read(self) -> tuple[int, CatalogDocument]:
        """The valid document and its version. Raises RuntimeError if none can be read in a hundred tries."""
        for _ in range(100):
            version = self.versions[0]
            if version == 0:
                return 0, CatalogDocument()
            fence()
            buffer = self._buffers[version & 1]
            length = int.from_bytes(buffer[0:8], "little")
            digest = int.from_bytes(buffer[8:16], "little")
            encoded = bytes(buffer[_BUFFER_HEADER : _BUFFER_HEADER + min(length, self._room)])
            fence()
            if self.versions[0] == version and xxhash.xxh3_64_intdigest(encoded) == digest:
                return version, _decode(encoded)
        raise RuntimeError("the catalog changes faster than it can be read")


def _decode(encoded: bytes) -> CatalogDocument:
    raw = orjson.loads(encoded)
    pods = tuple(PodRecord(**{**pod, "models": tuple(pod["models"])}) for pod in raw["pods"])
    return CatalogDocument(pods, raw["models"])
