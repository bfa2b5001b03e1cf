"""AIBrix's standalone endpoints file, read strictly.

    models:
      - name: llama-3-8b
        engine: vllm                      # vllm (default), sglang, trtllm, xllm, xdit
        endpoints: ["10.0.0.1:8000", "vllm-1.example:8000"]
      - name: qwen
        rolesets:
          - name: rs-0
            prefill: ["10.0.1.1:8000"]
            decode: ["10.0.1.2:8000"]

An address without a port has port 8000. Beyond AIBrix's keys an endpoint may be a mapping {address, name,
metrics_port, labels, adapters, draining}, where a draining pod gets no new requests but its models stay known. A
model may carry `metrics_port`, `labels`, `adapters` (further model names its pods answer to, such as LoRA adapters)
and `config` (AIBrix's routing profiles, the JSON of its `model.aibrix.ai/config` annotation, as a mapping).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from router.rules import CONFIG
from workers.address import parse_address
from workers.discovery.model_config import ModelConfig, first_problem
from workers.documents import NotYaml, read_yaml
from workers.problems import numbers_only, problems_of

DEFAULT_PORT = 8000
"""Of a pod that is given without one."""


class EndpointsError(Exception):
    """The file cannot be used. The message is one line for a person."""


class Unreadable(EndpointsError):
    """What it holds is not known: it may be readable in a moment, without being another file."""


def _tcp(value: str) -> str:
    if (":" not in value and "/" not in value) or (value.startswith("[") and value.endswith("]")):
        value = f"{value}:{DEFAULT_PORT}"
    parse_address(value, of_pod=True)
    return value


def _plain(value: str) -> str:
    if not value.isprintable() or any(ord(char) > 0xFFF for char in value):
        raise ValueError(f"{value!r} must be printable")
    return value


def _annotated(labels: Mapping[str, str]) -> Mapping[str, str]:
    for key, value in labels.items():
        if any("\ud800" <= char <= "\udfff" for char in key + value):
            raise ValueError(f"{key!r}: {value!r} is not text")
    problem = CONFIG in labels and first_problem(labels[CONFIG])
    if problem:
        raise ValueError(f"{CONFIG}: {problem}")
    return labels


Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_plain)]
Port = Annotated[int, Field(ge=1, le=65535)]
Labels = Annotated[Mapping[str, str], AfterValidator(_annotated)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return numbers_only(cls, value, info)


class Endpoint(_Strict):
    """One pod, or with a host name that has several addresses, one pod each."""

    address: Annotated[str, AfterValidator(_tcp)]
    name: Name | None = None
    metrics_port: Port | None = None
    labels: Labels = {}
    adapters: tuple[Name, ...] = ()
    draining: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str | Mapping):
            raise ValueError("write host:port, or a mapping with `address`")
        return {"address": value} if isinstance(value, str) else value


class Roleset(_Strict):
    """Pods that prefill for each other's decode pods."""

    name: Name
    prefill: tuple[Endpoint, ...] = ()
    decode: tuple[Endpoint, ...] = ()


class ModelEntry(_Strict):
    """One model and its pods."""

    name: Name
    engine: Literal["vllm", "sglang", "trtllm", "xllm", "xdit"] = "vllm"
    endpoints: tuple[Endpoint, ...] = ()
    rolesets: tuple[Roleset, ...] = ()
    metrics_port: Port | None = None
    labels: Labels = {}
    adapters: tuple[Name, ...] = ()
    config: ModelConfig = ModelConfig()


class _File(_Strict):
    models: tuple[ModelEntry, ...]


def read_endpoints(path: Path) -> tuple[ModelEntry, ...]:
    """The file's models. Raises EndpointsError when it is no YAML or not of this shape, Unreadable when it cannot be
    read."""
    try:
        text = path.read_text()
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise EndpointsError(f"{path}: is not UTF-8 text") from None
    try:
        return _File.model_validate(read_yaml(text)).models
    except NotYaml as error:
        raise EndpointsError(f"{path}:{error}") from None
    except ValidationError as error:
        first, *more = problems_of(error, _File)
        # What is missing may be what is written wrongly.
        told = [first, *[problem for problem in more if problem.placed][:1]]
        left = 1 + len(more) - len(told)
        raise EndpointsError(f"{path}: {'; '.join(map(str, told))}{f' (and {left} more)' if left else ''}") from None
