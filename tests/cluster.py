"""An API server for tests of discovery: lists and watches as the real one does, with as little behind it as that takes.

Lists come in pages that `continue`, watches begin at a resource version and go on as lines of JSON, versions that are
no longer kept get a 410, kinds that nobody has defined the real one's 404 in plain text, whoever has no token a 401.
Where a real API server can be had (`make kube-apiserver`, and etcd), the tests that change only objects run with that,
too: `RealCluster`.
"""

import asyncio
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from bench.lab import free_ports

Json = dict[str, Any]
TOKEN = "of-the-router"
NAMESPACE = "models"
KINDS = ("pods", "modeladapters")


class Cluster:
    """The objects and what became of them."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Json] = {}
        """By kind, namespace and name."""
        self.history: list[tuple[int, str, str, Json]] = []
        """(version, kind, event, object), oldest first."""
        self.kinds = set(KINDS)
        self.version = itertools.count(1000)
        self.now = next(self.version)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.forbidden: set[str] = set()
        self.changed = asyncio.Condition()
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._watches: set[asyncio.Task[Any]] = set()

    # -- for the tests

    async def put(self, kind: str, one: Json) -> None:
        """Create or change an object."""
        key = (kind, one["metadata"]["namespace"], one["metadata"]["name"])
        event = "MODIFIED" if key in self.objects else "ADDED"
        await self._happen(key, event, one)
        self.objects[key] = self.history[-1][3]

    async def delete(self, kind: str, name: str, namespace: str = NAMESPACE) -> None:
        """Delete an object."""
        key = (kind, namespace, name)
        await self._happen(key, "DELETED", self.objects.pop(key))

    async def forget_history(self) -> None:
        """What was before now can be watched no more."""
        self.history.clear()
        self.now = next(self.version)

    async def start(self) -> None:
        """Listen, on the same port as before."""
        app = web.Application()
        app.router.add_get("/api/v1/pods", self._pods)
        app.router.add_get("/api/v1/namespaces/{namespace}/pods", self._pods)
        group = "/apis/model.aibrix.ai/v1alpha1"
        app.router.add_get(group + "/modeladapters", self._adapters)
        app.router.add_get(group + "/namespaces/{namespace}/modeladapters", self._adapters)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Hang up on everybody."""
        for watch in self._watches:
            watch.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # -- for the clients

    async def _happen(self, key: tuple[str, str, str], event: str, one: Json) -> None:
        self.now = next(self.version)
        one = {**one, "metadata": {**one["metadata"], "resourceVersion": str(self.now)}}
        self.history.append((self.now, key[0], event, one))
        async with self.changed:
            self.changed.notify_all()

    async def _pods(self, request: web.Request) -> web.StreamResponse:
        return await self._answer("pods", "v1", "Pod", request)

    async def _adapters(self, request: web.Request) -> web.StreamResponse:
        return await self._answer("modeladapters", "model.aibrix.ai/v1alpha1", "ModelAdapter", request)

    async def _answer(self, kind: str, version: str, name: str, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.requests.append((request.path, query))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _status(401, "Unauthorized")
        if kind in self.forbidden:
            return _status(403, f'{kind} is forbidden: User "x" cannot list resource "{kind}"')
        if kind not in self.kinds:
            return web.Response(status=404, text="404 page not found\n")
        namespace = request.match_info.get("namespace", "")
        selector = query.get("labelSelector", "")
        if "watch" in query:
            return await self._watch(kind, namespace, selector, int(query["resourceVersion"]), request)
        listed = [
            {"apiVersion": version, "kind": name, **one}
            for (its_kind, its_namespace, _), one in sorted(self.objects.items())
            if its_kind == kind and namespace in ("", its_namespace) and _selected(one, selector)
        ]
        first, size = int(query.get("continue") or 0), int(query.get("limit") or len(listed) or 1)
        metadata: Json = {"resourceVersion": str(self.now)}
        if first + size < len(listed):
            metadata |= {"continue": str(first + size), "remainingItemCount": len(listed) - first - size}
        items = listed[first : first + size]
        return web.json_response({"kind": f"{name}List", "apiVersion": version, "metadata": metadata, "items": items})

    async def _watch(
        self, kind: str, namespace: str, selector: str, since: int, request: web.Request
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        told = since
        try:
            if since < self.now and not any(version <= since + 1 for version, *_ in self.history):
                gone = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"}
                gone["message"] = f"too old resource version: {since} ({self.now})"
                await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
                return response
            while True:
                for version, its_kind, event, one in list(self.history):
                    its_namespace = one["metadata"]["namespace"]
                    if version > told and its_kind == kind and namespace in ("", its_namespace):
                        if not _selected(one, selector):
                            event = "DELETED"  # to this watch
                        await response.write(json.dumps({"type": event, "object": one}).encode() + b"\n")
                told = self.now
                async with self.changed:
                    await self.changed.wait()
        finally:
            self._watches.discard(task)


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """One that runs."""
    made = Cluster()
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def kubeconfig(path: Path, url: str, token: str = TOKEN) -> Path:
    """What leads a client there."""
    document = {
        "clusters": [{"name": "c", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(document))
    return path


def pod(
    name: str,
    ip: str = "10.0.0.1",
    *,
    model: str = "llama",
    namespace: str = NAMESPACE,
    ready: bool = True,
    going: bool = False,
    phase: str = "Running",
    labels: Json | None = None,
    annotations: Json | None = None,
) -> Json:
    """A pod as the API server shows it, without what is of no interest."""
    metadata: Json = {"name": name, "namespace": namespace, "uid": f"uid-{name}", "annotations": annotations or {}}
    metadata["labels"] = {**({"model.aibrix.ai/name": model} if model else {}), **(labels or {})}
    if going:
        metadata["deletionTimestamp"] = "2026-11-27T05:00:00Z"
    conditions = [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": str(ready)}]
    status = {"phase": phase, "conditions": conditions, **({"podIP": ip} if ip else {})}
    return {"metadata": metadata, "spec": {"containers": [{"name": "vllm", "image": "vllm"}]}, "status": status}


def adapter(name: str, instances: Iterable[str], namespace: str = NAMESPACE) -> Json:
    """A LoRA adapter that some pods have loaded."""
    metadata = {"name": name, "namespace": namespace}
    return {"metadata": metadata, "spec": {"baseModel": "llama"}, "status": {"instances": list(instances)}}


def _status(code: int, message: str) -> web.Response:
    document = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}
    return web.json_response(document, status=code)


def _selected(one: Json, selector: str) -> bool:
    labels = one["metadata"].get("labels") or {}
    for term in filter(None, selector.split(",")):
        key, _, value = term.partition("=")
        if key not in labels or (value and labels[key] != value):
            return False
    return True


# -- the real one

BIN = Path(__file__).parent.parent / "bin" / "kube-apiserver"
ADMIN = "of-the-tests"
CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "modeladapters.model.aibrix.ai"},
    "spec": {
        "group": "model.aibrix.ai",
        "scope": "Namespaced",
        "names": {"plural": "modeladapters", "singular": "modeladapter", "kind": "ModelAdapter"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                },
            }
        ],
    },
}


def missing() -> str:
    """What a real API server needs and is not there."""
    if not BIN.exists():
        return "there is no bin/kube-apiserver; `make kube-apiserver` builds it (Go, a quarter of an hour)"
    return "" if shutil.which("etcd") else "there is no etcd; apt-get install etcd-server"


class RealCluster:
    """kube-apiserver with etcd behind it, no nodes and no controllers. For tests it has the same methods."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        etcd, peers, port = free_ports(3)
        self.url = f"https://127.0.0.1:{port}"
        self._etcd = f"http://127.0.0.1:{etcd}"
        self._peers = f"http://127.0.0.1:{peers}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.rights: list[Json] = []
        """Cluster roles and their bindings, for the user that the token is for."""

    def start(self) -> None:
        """Until it is ready. Blocks."""
        folder = self.folder
        for command in ("genrsa -out sa.key 2048", "rsa -in sa.key -pubout -out sa.pub"):
            subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
        (folder / "tokens.csv").write_text(f'{ADMIN},admin,1,"system:masters"\n{TOKEN},router,2\n')
        listen = f"--listen-client-urls {self._etcd} --advertise-client-urls {self._etcd} --data-dir etcd"
        self._run("etcd", f"{listen} --listen-peer-urls {self._peers} --unsafe-no-fsync".split())
        port = self.url.rpartition(":")[2]
        options = (
            f"--etcd-servers {self._etcd} --bind-address 127.0.0.1 --advertise-address 127.0.0.1 --secure-port {port} "
            "--cert-dir certs --service-account-issuer https://tests --service-account-key-file sa.pub "
            "--service-account-signing-key-file sa.key --token-auth-file tokens.csv --authorization-mode RBAC "
            "--service-cluster-ip-range 10.0.0.0/24 --disable-admission-plugins ServiceAccount"
        )
        self._run(str(BIN), options.split())

    def _run(self, program: str, options: list[str]) -> None:
        with (self.folder / f"{Path(program).name}.log").open("wb") as output:
            run = subprocess.Popen([program, *options], cwd=self.folder, stdout=output, stderr=subprocess.STDOUT)
        self._processes.append(run)

    def end(self) -> None:
        """End both."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)

    async def set_up(self) -> None:
        """Namespaces, the kind of adapters, and what the router may do; once."""
        if not self.rights:
            return
        await until_async(self._ready, 120)
        for namespace in (NAMESPACE, "other", "third", "elsewhere"):
            await self.ask("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        await self.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", CRD)
        for one in self.rights:
            plural = {"ClusterRole": "clusterroles", "ClusterRoleBinding": "clusterrolebindings"}[one["kind"]]
            await self.ask("POST", f"/apis/rbac.authorization.k8s.io/v1/{plural}", one)
        await until_async(self._serves_adapters, 60)
        self.rights = []

    async def clear(self) -> None:
        """Take away what a test has put there."""
        for kind in KINDS:
            _, listed = await self.ask("GET", self._path(kind, ""))
            for one in listed["items"]:
                await self.delete(kind, one["metadata"]["name"], one["metadata"]["namespace"])

    async def put(self, kind: str, one: Json) -> None:
        """Create or change an object."""
        metadata = one["metadata"]
        path = self._path(kind, metadata["namespace"])
        own = f"{path}/{metadata['name']}"
        going = "deletionTimestamp" in metadata
        known = {key: value for key, value in metadata.items() if key not in ("uid", "deletionTimestamp")}
        if kind == "pods":
            body = {"metadata": known, "spec": {**one["spec"], "nodeName": "node", "enableServiceLinks": False}}
            code, _ = await self.ask("POST", path, body)
            if code == 409:
                _, old = await self.ask("GET", own)
                gone = dict.fromkeys(set(old["metadata"].get("labels") or {}) - set(known["labels"]))
                await self.ask("PATCH", own, {"metadata": {"labels": {**known["labels"], **gone}}})
            await self.ask("PATCH", own + "/status", {"status": one["status"]})
            if going:
                await self.ask("DELETE", own + "?gracePeriodSeconds=60")
            return
        body = {**one, "apiVersion": "model.aibrix.ai/v1alpha1", "kind": "ModelAdapter"}
        code, _ = await self.ask("POST", path, body)
        if code == 409:
            await self.ask("PATCH", own, {"status": one["status"]})

    async def delete(self, kind: str, name: str, namespace: str = NAMESPACE) -> None:
        """Delete an object, without waiting for anybody."""
        await self.ask("DELETE", f"{self._path(kind, namespace)}/{name}?gracePeriodSeconds=0")

    async def ask(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        """Status and answer."""
        headers = {"authorization": f"Bearer {ADMIN}"}
        if method == "PATCH":
            headers["content-type"] = "application/merge-patch+json"
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.request(method, self.url + path, json=body, ssl=False) as answer,
        ):
            text = await answer.text()
            assert answer.status < 400 or answer.status in (404, 409, 500), text
            return answer.status, json.loads(text) if text.startswith("{") else {}

    async def _ready(self) -> bool:
        try:
            return (await self.ask("GET", "/readyz"))[0] == 200
        except aiohttp.ClientError:
            return False

    async def _serves_adapters(self) -> bool:
        return (await self.ask("GET", self._path("modeladapters", "")))[0] == 200

    def _path(self, kind: str, namespace: str) -> str:
        group = "/api/v1" if kind == "pods" else "/apis/model.aibrix.ai/v1alpha1"
        return f"{group}/namespaces/{namespace}/{kind}" if namespace else f"{group}/{kind}"


async def until_async(happened: Callable[[], Awaitable[bool]], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not await happened():
            await asyncio.sleep(0.1)
