"""Kubernetes as a source of pods: those with AIBrix's labels and annotations, listed once and then watched.

    label or annotation model.aibrix.ai/name    the model; `kubernetes.model_label` names another
    label or annotation model.aibrix.ai/port, model.aibrix.ai/metric-port, model.aibrix.ai/engine
    labels role-name, roleset-name              prefill and decode pods
    annotation model.aibrix.ai/config           routing profiles
    annotations modelclaim.aibrix.ai/...        models that sleep and wake
    ModelAdapter (model.aibrix.ai/v1alpha1)     LoRA adapters, each a model of the pods among its `status.instances`

A pod that is not ready or about to go is listed as draining: it gets no new requests and its model stays known. While
the API server cannot be reached the pods stay as they are. Everything is listed anew after RELIST_SECONDS, so nothing
that a broken connection swallowed stays wrong for longer.
"""

import asyncio
import contextlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog
from httpx2 import HTTPStatusError
from lightkube import ApiError, AsyncClient, KubeConfig
from lightkube.generic_resource import create_namespaced_resource
from lightkube.resources.core_v1 import Pod

from router.claims import PREFIX as CLAIM_PREFIX
from router.claims import claims_of
from router.handover import BOOTSTRAP_PORT_LABEL, CONNECTOR_LABEL
from router.rules import CONFIG, ENGINE, PORT
from workers.address import canonical_ip, join_address
from workers.config import ConfigError, KubernetesConfig
from workers.discovery.registry import FoundPod, Settings
from workers.scrape.engines import engine_named

log = structlog.get_logger()

PATIENCE_SECONDS: Final = 0.25
"""For the first list, before the pods that a predecessor knew are used."""
RELIST_SECONDS: Final = 300.0
"""Between two complete lists."""
MIN_PAUSE_SECONDS: Final = 1.0
MAX_PAUSE_SECONDS: Final = 30.0
"""Before the next attempt, after one and after many that failed."""
PAGE: Final = 500
"""Objects that are asked for at once."""
MAX_NAME_LENGTH: Final = 256
"""Characters of a model's name."""

_TOLD: Final = (CONFIG, ENGINE, BOOTSTRAP_PORT_LABEL, CONNECTOR_LABEL)
"""Annotations that the router reads as if they were labels."""
_METRICS_PORT: Final = "model.aibrix.ai/metric-port"
_ROLE: Final = "role-name"
_ROLESET: Final = "roleset-name"
_ROLES: Final = ("prefill", "decode")
_GROUP_INDEX: Final = "stormservice.orchestration.aibrix.ai/pod-group-index"
_RAY_NODE: Final = "ray.io/node-type"
_OVER: Final = ("Succeeded", "Failed")

ModelAdapter: Final = create_namespaced_resource("model.aibrix.ai", "v1alpha1", "ModelAdapter", "modeladapters")
Key = tuple[str, str]
"""Namespace and name."""


@dataclass(slots=True)
class _Followed:
    """The objects of one kind in one namespace, or in all."""

    kind: type[Any]
    namespace: str | None
    """None is that of the service account, or of the kubeconfig's context; "*" are all."""
    selector: str = ""
    objects: dict[Key, Any] = field(default_factory=dict)
    listed: bool = False
    failures: int = 0
    """Since the last list."""
    problem: str = ""
    """Why it cannot be followed at the moment; each is logged once."""


def check_access() -> None:
    """Whether there is anything to speak to a cluster with. Raises ConfigError."""
    try:
        KubeConfig.from_env().get()
    except Exception as error:  # its files may be wrong in any way
        raise ConfigError(
            f"kubernetes: there is no access to a cluster ({error}); in a pod set automountServiceAccountToken, "
            "elsewhere KUBECONFIG"
        ) from None


class KubernetesSource:
    """What the cluster says now. `reload` begins to follow it, on the event loop that runs then."""

    loaded = True

    def __init__(self, config: KubernetesConfig) -> None:
        self._config = config
        namespaces = config.namespaces or (None,)
        self._pods = [_Followed(Pod, namespace, config.selector or config.model_label) for namespace in namespaces]
        self._adapters = [_Followed(ModelAdapter, namespace) for namespace in namespaces]
        self._tasks: list[asyncio.Task[None]] = []
        self._listed = asyncio.Event()
        self._told: dict[Key, str] = {}
        self.news = False
        """Whether something has changed since the pods were listed last."""

    def remember(self, pods: Iterable[FoundPod]) -> None:
        """Nothing is needed of what a predecessor found: until all is listed, the registry keeps its pods."""

    def changed(self) -> bool:
        """Changes come by themselves, see `news`."""
        return False

    def reload(self) -> None:
        """Begin to follow."""
        if not self._tasks:
            self._tasks = [asyncio.ensure_future(self._follow(one)) for one in (*self._pods, *self._adapters)]

    async def stop(self) -> None:
        """Follow it no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def resolve(self) -> tuple[list[FoundPod], Settings]:
        """List the pods, after a little patience at the start."""
        if not self.complete:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._listed.wait(), PATIENCE_SECONDS)
        return self.listed()

    def listed(self) -> tuple[list[FoundPod], Settings]:
        """The pods as they are known at this moment."""
        self.news = False
        adapters = self._adapters_of_pods()
        found: dict[str, FoundPod] = {}
        told: dict[Key, str] = {}
        names: set[str] = set()
        pods = {key: pod for followed in self._pods for key, pod in followed.objects.items()}
        for key in sorted(pods):
            try:
                one = _found(pods[key], self._config, adapters.get(key, ()))
            except ValueError as error:
                told[key] = str(error)
                if self._told.get(key) != told[key]:
                    log.warning("a pod is left out", pod=key[1], namespace=key[0], error=told[key])
                continue
            if one is None or (one.address in found and one.draining):
                continue
            if one.name in names:
                one = replace(one, name=f"{one.name}.{one.namespace}")
            names.add(one.name)
            found[one.address] = one
        self._told = told
        return list(found.values()), {}

    @property
    def complete(self) -> bool:
        """Whether all pods have been listed at least once."""
        return all(followed.listed for followed in self._pods)

    @property
    def usable(self) -> bool:
        """Whether the API tells of all pods."""
        return self.complete and not any(followed.problem for followed in self._pods)

    def cure(self) -> str:
        """What to do where the cluster has come to no pods."""
        problem = next((followed.problem for followed in self._pods if followed.problem), "")
        where = ", ".join(self._config.namespaces) or "the router's own"
        selector = self._config.selector or self._config.model_label
        return problem or f"label pods with {selector} in the namespaces that are followed ({where})"

    def _adapters_of_pods(self) -> dict[Key, list[str]]:
        adapters: dict[Key, list[str]] = {}
        for followed in self._adapters:
            for (namespace, name), adapter in sorted(followed.objects.items()):
                instances = (adapter.status or {}).get("instances")
                for instance in instances if isinstance(instances, list) else ():
                    adapters.setdefault((namespace, str(instance)), []).append(name)
        return adapters

    # -- following

    async def _follow(self, followed: _Followed) -> None:
        """List and watch for ever."""
        while True:
            try:
                async with asyncio.timeout(RELIST_SECONDS):
                    await self._follow_once(followed)
            except TimeoutError:
                continue
            except HTTPStatusError as error:
                code, message = _answer(error)
                if code == 410:  # what is watched is too far behind
                    continue
                if code == 404 and followed.kind is ModelAdapter:
                    await asyncio.sleep(RELIST_SECONDS)  # the cluster has no such kind
                    continue
                self._failed(followed, message + _cure(code, followed))
            except Exception as error:  # whatever it is, the pods stay as they are and the next attempt may do
                self._failed(followed, f"{type(error).__name__}: {error}".rstrip(": "))
            pause = min(MIN_PAUSE_SECONDS * 2 ** min(followed.failures - 1, 10), MAX_PAUSE_SECONDS)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    async def _follow_once(self, followed: _Followed) -> None:
        client = AsyncClient()  # reads the service account, or the kubeconfig, again
        try:
            options: dict[str, Any] = {"namespace": followed.namespace}
            if followed.selector:
                options["labels"] = {followed.selector: None}  # which the client passes on as it is
            page = client.list(followed.kind, chunk_size=PAGE, **options)
            followed.objects = {_key(one): one async for one in page}
            followed.listed = self.news = True
            followed.failures = 0
            if followed.problem:
                followed.problem = ""
                log.info("the Kubernetes API answers again", kind=followed.kind.__name__)
            if self.complete:
                self._listed.set()
            changes = client.watch(followed.kind, resource_version=page.resourceVersion, **options)
            async for event, one in changes:
                if event == "DELETED":
                    followed.objects.pop(_key(one), None)
                else:
                    followed.objects[_key(one)] = one
                self.news = True
        finally:
            await client.close()

    def _failed(self, followed: _Followed, problem: str) -> None:
        followed.failures += 1
        if followed.problem != problem:
            followed.problem = problem
            log.warning(
                "Kubernetes cannot be followed, the pods stay as they are",
                kind=followed.kind.__name__, namespace=followed.namespace or "its own", error=problem,
            )  # fmt: skip


def _found(pod: Pod, config: KubernetesConfig, adapters: Iterable[str]) -> FoundPod | None:
    """The pod as the registry takes it; None if it serves nothing, now or ever. Raises ValueError, with one line for a
    person, when its labels or annotations cannot be used."""
    metadata, status = pod.metadata, pod.status
    if metadata is None or status is None or not status.podIP or status.phase in _OVER:
        return None
    labels, annotations = metadata.labels or {}, metadata.annotations or {}
    if labels.get(_RAY_NODE) == "worker" or labels.get(_GROUP_INDEX, "0") != "0":
        return None  # a part of another pod's engine

    def fact(key: str) -> str:
        return labels.get(key) or annotations.get(key) or ""

    told = {key: text for key, text in annotations.items() if key in _TOLD or key.startswith(CLAIM_PREFIX)}
    models = tuple(name for name in (fact(config.model_label), *adapters, *claims_of(told)) if name)
    if not models:
        raise ValueError(f"{config.model_label}: no label or annotation names its model")
    for name in models:
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise ValueError(f"model {name[:MAX_NAME_LENGTH]!r}: must be printable and at most {MAX_NAME_LENGTH} long")
    ip = canonical_ip(status.podIP)
    if ip is None:
        raise ValueError(f"podIP: {status.podIP!r} is no IP address")
    port = _port(fact(PORT), PORT) or config.port
    role = labels.get(_ROLE, "")
    ready = any(one.type == "Ready" and one.status == "True" for one in status.conditions or ())
    return FoundPod(
        address=join_address(ip, port),
        name=metadata.name or ip,
        models=tuple(dict.fromkeys(models)),
        engine=engine_named(fact(ENGINE)).name,
        namespace=metadata.namespace or "",
        metrics_address=join_address(ip, _port(fact(_METRICS_PORT), _METRICS_PORT) or port),
        role=role if role in _ROLES else "",
        roleset=labels.get(_ROLESET, ""),
        labels={**labels, **told},
        draining=not ready or metadata.deletionTimestamp is not None,
    )


def _port(text: str, key: str) -> int:
    """A port, 0 where none is given."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise ValueError(f"{key}: {text!r} is no port, which is a number from 1 to 65535")
    return int(text)


def _key(one: Any) -> Key:
    return one.metadata.namespace or "", one.metadata.name or ""


def _answer(error: HTTPStatusError) -> tuple[int, str]:
    """Status code and message of an answer that is none of the wanted."""
    if isinstance(error, ApiError):
        return error.status.code or 0, error.status.message or error.status.reason or "refused"
    return error.response.status_code, f"status {error.response.status_code}"


def _cure(code: int, followed: _Followed) -> str:
    if code not in (401, 403):
        return ""
    plural = "pods" if followed.kind is Pod else "modeladapters"
    return f"; let the router's service account list and watch {plural} (deploy/kubernetes/discovery.yaml)"
