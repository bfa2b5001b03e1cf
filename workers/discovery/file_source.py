"""The endpoints file as a source of pods: read when it changes, host names resolved again and again.

Changes are seen by what `stat` says of the file (a Kubernetes ConfigMap is swapped by a symbolic link, which `stat`
follows). A file that cannot be used is reported once and the pods stay as they are; one that is there and cannot be
read is tried again.

Nobody waits for a name server that hangs: what is given by IP address, and names whose addresses are known, are listed
at once. A look-up that takes long goes on by itself, and `news` says when it has come to something.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import structlog

from router.claims import claims_of
from workers.address import canonical_ip, is_ip, join_address, parse_address
from workers.discovery.endpoints_file import Endpoint, EndpointsError, ModelEntry, Unreadable, read_endpoints
from workers.discovery.registry import FoundPod, Settings

log = structlog.get_logger()

PATIENCE_SECONDS = 0.25
"""For all look-ups together, before the pods are listed without those that are still under way."""
LOOK_UP_SECONDS = 2.0
"""For one look-up, before its name counts as one that cannot be resolved, until it is answered after all."""
MAX_LOOK_UPS = 32
"""At the same time; each that hangs takes a thread."""
_TOLD = 3
"""Host names in one line of the log."""
MAX_MODEL_LENGTH_IN_NAMES = 50
"""Characters of a model's name in the names of its pods."""


class FileSource:
    """What the endpoints file says now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._models: tuple[ModelEntry, ...] = ()
        self._seen: object = None
        self._complaint = ""
        self._hosts: set[str] = set()
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._look_ups: dict[str, asyncio.Task[None]] = {}
        self._late: set[str] = set()
        # Threads of our own: the event loop waits for its own before it ends, and has a handful for everybody.
        self._threads = ThreadPoolExecutor(MAX_LOOK_UPS, "look-up")
        self.usable = False
        """Whether the file could be read when it was looked at last."""
        self.loaded = False
        """Whether the file could ever be read: until then nothing is known, which is not the same as no pods."""
        self.news = False
        """Whether a look-up has come to something since the pods were listed last."""

    def remember(self, pods: Iterable[FoundPod]) -> None:
        """Take the addresses that a predecessor found, for names that cannot be resolved when this one starts."""
        for pod in pods:
            if pod.host:
                ip = parse_address(pod.address).place
                self._addresses[pod.host] = (*self._addresses.get(pod.host, ()), ip)

    def changed(self) -> bool:
        """Whether the file is another than the one read last."""
        return self._look() != self._seen

    def reload(self) -> None:
        """Read the file again if it changed."""
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._models = read_endpoints(self.path)
            self._hosts = {parse_address(endpoint.address).place for endpoint, *_ in _lines(self._models)}
            if self.loaded and not self.usable:
                log.info("endpoints file can be used again")
            self.usable = self.loaded = True
            self._complaint = ""
        except EndpointsError as error:
            self.usable = False
            if isinstance(error, Unreadable) and not isinstance(seen, int):
                self._seen = None
            if str(error) != self._complaint or not isinstance(error, Unreadable):
                log.error("endpoints file cannot be used, the pods stay as they are", error=str(error))
            self._complaint = str(error)

    def _look(self) -> object:
        try:
            status = self.path.stat()
        except OSError as error:
            return error.errno
        return (status.st_mtime_ns, status.st_ino, status.st_size)

    async def resolve(self) -> tuple[list[FoundPod], Settings]:
        """Look all names up, wait a little, and list the pods; see `listed`."""
        for host in self._hosts:
            ip = canonical_ip(host)
            if ip is not None:
                self._addresses[host] = (ip,)
            elif host not in self._look_ups:  # one that hangs is not asked again
                self._look_ups[host] = asyncio.ensure_future(self._look_up(host))
        waited = [task for host, task in self._look_ups.items() if host in self._hosts and host not in self._late]
        if waited:
            await asyncio.wait(waited, timeout=PATIENCE_SECONDS)
        return self.listed()

    def listed(self) -> tuple[list[FoundPod], Settings]:
        """The pods with the addresses of their host names that are known at this moment. A name that cannot be
        resolved keeps the addresses it had last."""
        self.news = False
        configs = {model.name: model.config.settings() for model in self._models}
        settings = {name: config for name, config in configs.items() if config}
        return _pods(self._models, self._addresses), settings

    @property
    def complete(self) -> bool:
        """Whether no name is still in its first look-up: until then, pods may be missing from what is listed."""
        first = self._hosts.intersection(self._look_ups).difference(self._addresses)
        return first <= self._late

    def cure(self) -> str:
        """What to do where the file has come to no pods."""
        lost = sorted(host for host in self._hosts if not self._addresses.get(host))
        if not lost:
            return f"list some in {self.path}"
        more = f" and {len(lost) - _TOLD} more" if len(lost) > _TOLD else ""
        return f"see that {', '.join(lost[:_TOLD])}{more} can be resolved here, or correct {self.path}"

    async def stop(self) -> None:
        """End the look-ups; one that hangs keeps its thread until it is answered."""
        for task in self._look_ups.values():
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look_up(self, host: str) -> None:
        ask = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        answer = asyncio.get_running_loop().run_in_executor(self._threads, ask)
        try:
            await asyncio.wait([answer], timeout=LOOK_UP_SECONDS)
            if not answer.done():
                self._late.add(host)
                self.news = True
                _warn(host, f"no answer within {LOOK_UP_SECONDS:.0f} s")
            found = await answer
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a name at all
            _warn(host, getattr(error, "strerror", None) or str(error))
        else:
            v4 = sorted({str(entry[4][0]) for entry in found if entry[0] == socket.AF_INET})
            v6 = sorted({str(entry[4][0]) for entry in found if entry[0] == socket.AF_INET6})
            self._addresses[host] = tuple(v4 or v6)
        finally:
            answer.cancel()
            self._late.discard(host)
            del self._look_ups[host]
            self.news = True


def _warn(host: str, why: str) -> None:
    log.warning("host name cannot be resolved", host=host, error=why)


def fixed_names(models: Iterable[ModelEntry]) -> dict[str, str]:
    """The names of the pods by host:port as the file has it; empty where a name depends on how many addresses a host
    name has."""
    models = tuple(models)
    lines = _lines(models)
    hosts = {endpoint.address: parse_address(endpoint.address).place for endpoint, *_ in lines}
    literal = {host: (host,) for host in hosts.values() if is_ip(host)}
    names = dict.fromkeys(hosts, "")
    if len(literal) == len(set(hosts.values())):
        by_address = {pod.address: pod.name for pod in _pods(models, literal)}
        names = {text: by_address[join_address(host, parse_address(text).port)] for text, host in hosts.items()}
    else:
        given = Counter(endpoint.name for endpoint, *_ in lines)
        for endpoint, *_ in lines:
            if endpoint.name and given[endpoint.name] == 1 and hosts[endpoint.address] in literal:
                names[endpoint.address] = endpoint.name
    return names


def _lines(models: Iterable[ModelEntry]) -> list[tuple[Endpoint, ModelEntry, str, str]]:
    """(endpoint, model, role, roleset) of every line of the file."""
    lines = []
    for model in models:
        lines += [(endpoint, model, "", "") for endpoint in model.endpoints]
        for roleset in model.rolesets:
            lines += [(endpoint, model, "prefill", roleset.name) for endpoint in roleset.prefill]
            lines += [(endpoint, model, "decode", roleset.name) for endpoint in roleset.decode]
    return lines


def _pods(models: Iterable[ModelEntry], addresses: Mapping[str, tuple[str, ...]]) -> list[FoundPod]:
    """The pods of the file, one for each of the `addresses` of a host."""
    pods: dict[str, FoundPod] = {}
    names_taken: set[str] = set()
    for number, (endpoint, model, role, roleset) in enumerate(_lines(models)):
        _, host, port = parse_address(endpoint.address)
        labels = {**model.labels, **endpoint.labels}
        names = (model.name, *model.adapters, *endpoint.adapters, *claims_of(labels))
        ips = addresses.get(host, ())
        for ip in ips:
            address = join_address(ip, port)
            known = pods.get(address)
            if known is not None:
                name = known.name
            else:
                name = endpoint.name or pod_name(model.name, host if len(ips) == 1 else ip, number)
                while name in names_taken:  # only where the file gives it twice, or to a host with several addresses
                    name = f"{name}-{address}"
                names_taken.add(name)
            metrics_port = endpoint.metrics_port or model.metrics_port or port
            pods[address] = FoundPod(
                address=address,
                name=name,
                models=tuple(dict.fromkeys((*(known.models if known else ()), *names))),
                engine=model.engine,
                host=host,
                metrics_address=join_address(ip, metrics_port),
                role=role,
                roleset=roleset,
                labels={**known.labels, **labels} if known else labels,
                draining=endpoint.draining or (known is not None and known.draining),
            )
    return list(pods.values())


def pod_name(model: str, host: str, number: int) -> str:
    """What AIBrix calls the pod of the endpoint with this number, counted over the whole file from 0."""
    name = model.lower().replace("/", "-").replace("_", "-").strip("-")[:MAX_MODEL_LENGTH_IN_NAMES].rstrip("-")
    return f"{name}-{host.replace('.', '-')}-{number}"
