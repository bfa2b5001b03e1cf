"""A request in two legs: one pod prefills its prompt, another decodes (`pd`).

    vLLM      the prefill pod is asked for one token; what its answer says of where the KV cache lies
              (`kv_transfer_params`) goes into the body for the decode pod, which fetches it from there
    TensorRT  the same with `disaggregated_params`
    SGLang    both get the body with the same `bootstrap_room` at the same time, and meet there by themselves

If a prefill fails, another pod of the roleset is asked once. If that fails too, the decode pod gets the whole request;
SGLang's cannot prefill, so the request is refused. A prefill of SGLang that fails when both have been asked
is told to the decode pod (`/abort_request`), which would wait for it.

What goes to either pod are the members of the client's JSON as they came, byte for byte, without those that are taken
away and with ours at the end. The client's own hand-over fields never reach a pod.
"""

import secrets
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from json import JSONDecoder
from typing import Any, Final, Protocol

import orjson

from router.bodies import Body
from router.errors import bad_body, no_prefill, not_selected, repeated_key
from router.fleet import Candidates, Pod
from router.strategies.pd import Legs, Pd
from state.series import PREFILL_BUCKETS, Histogram, Series

SHFS: Final = "shfs"
NIXL: Final = "nixl"
CONNECTORS: Final = (SHFS, NIXL)
"""AIBrix's names for how vLLM's pods hand over: by `kv_transfer_params`, which is what vLLM's own connectors take, its
NixlConnector included; or by the whole answer in `disagg_prefill_resp`, which is vLLM on Neuron."""
_TRTLLM: Final = "trtllm"
"""TensorRT-LLM, which has one way."""
CONNECTOR_LABEL: Final = "model.aibrix.ai/kv-connector-type"
BOOTSTRAP_PORT_LABEL: Final = "model.aibrix.ai/sglang-bootstrap-port"
BOOTSTRAP_PORT: Final = 8998
ABORT_PATH: Final = "/abort_request"

_BOOTSTRAP: Final = frozenset({"bootstrap_host", "bootstrap_port", "bootstrap_room"})
_OURS: Final = _BOOTSTRAP | {"kv_transfer_params", "disagg_prefill_resp", "disaggregated_params"}
"""Members that no client may set."""
_OF_THE_ANSWER: Final = frozenset({"max_tokens", "max_completion_tokens", "min_tokens", "stream", "stream_options"})
_SKELETON: Final = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_LEAST_ID: Final = 1 << 42
"""TensorRT-LLM's ids of requests that go through several pods begin here; below are each pod's own."""
_BLANKS: Final = " \t\n\r"
_value_at: Final = JSONDecoder(strict=False, parse_int=str, parse_float=str).raw_decode


class PrefillFailed(Exception):
    """A pod has not prefilled. `result` is one of `failed`, `timeout`, and `refused` where the request is to blame."""

    def __init__(self, result: str) -> None:
        super().__init__(result)
        self.result = result


class Sender(Protocol):
    """What sends HTTP for us."""

    def post(
        self, pod: Pod, path: str, headers: Mapping[str, str], body: bytes, written: Callable[[], None] | None = None
    ) -> Awaitable[bytes]:
        """The body of a good answer; `written` is called once the request is on its way. Raises PrefillFailed."""

    def start(self, work: Callable[[Callable[[], None]], Coroutine[Any, Any, str]]) -> Awaitable[str]:
        """Begin something and wait until it calls what it is given, or ends: its result if it has ended, else nothing.
        It is not waited for any longer; if whoever waits is cancelled meanwhile, so is the work."""

    def tell(self, pod: Pod, path: str, body: bytes) -> None:
        """Post in the background, more than once."""


class Prefills:
    """What all requests of a process share."""

    def __init__(self, sender: Sender, connector: str = SHFS) -> None:
        self.sender = sender
        self.connector = connector
        self._seconds: Histogram | None = None

    def count(self, series: Series, result: str, seconds: float) -> None:
        """One prefill is over."""
        series.add(1.0, "prefills", result)
        if self._seconds is None:
            self._seconds = Histogram(series, "prefill_seconds", buckets=PREFILL_BUCKETS)
        self._seconds.observe(seconds)


class Handover:
    """One request's: await it."""

    def __init__(
        self,
        prefills: Prefills,
        strategy: Pd,
        legs: Legs,
        decode: Pod,
        *,
        series: Series,
        clock: Callable[[], float],
        candidates: Callable[[], Candidates | None],
        body: bytes,
        parsed: Body,
        path: str,
        headers: Mapping[str, str],
    ) -> None:
        """`candidates` gives those of the model as they are by then; `path` and `headers` are for the prefill pod."""
        self._prefills = prefills
        self._strategy = strategy
        self._legs = legs
        self._decode = decode
        self._series = series
        self._clock = clock
        self._candidates = candidates
        self._body = body
        self._parsed = parsed
        self._path = path
        self._headers = headers
        self._parts: list[tuple[str, str]] | None = None

    def __await__(self) -> Generator[Any, None, bytes | None]:
        """The body for the decode pod, None for the client's own. Raises RequestError."""
        return self._run().__await__()

    async def _run(self) -> bytes | None:
        legs = self._legs
        if legs.pod is None:
            self._goes_whole("indivisible")
            return self._whole()
        if legs.engine in ("vllm", _TRTLLM):
            return await self._by_answer()
        if legs.engine == "sglang":
            return await self._by_sglang()
        legs.release()
        raise no_prefill(legs.engine)

    # -- vLLM, TensorRT-LLM

    async def _by_answer(self) -> bytes | None:
        legs, result = self._legs, ""
        while legs.pod is not None:
            connector = legs.pod.record.labels.get(CONNECTOR_LABEL) or self._prefills.connector
            if legs.engine == _TRTLLM:
                connector = _TRTLLM
            result, answer = await self.attempt(self._prefill_body(_question(connector)))
            if result == "ok":
                more = _handed_over(answer, connector, legs.pod, self._parsed.kind)
                if more:
                    return rewritten(self._members(), _OURS | frozenset(more), more)
                result = "nothing"
            if result in ("nothing", "refused") or not self._try_another():
                break
        legs.pod = None
        self._goes_whole(result)
        return self._whole()

    def _prefill_body(self, more: Mapping[str, Any]) -> bytes:
        added: dict[str, Any] = {"max_tokens": 1}
        if self._parsed.kind == "chat" and self._legs.engine != _TRTLLM:  # which refuses it
            added["max_completion_tokens"] = 1
        added |= {"stream": False, **more}
        return rewritten(self._members(), _OURS | _OF_THE_ANSWER | frozenset(added), added)

    def _whole(self) -> bytes | None:
        """The client's body without what it must not say."""
        document = self._parsed.json
        if document is None or _OURS.isdisjoint(document):
            return None
        return rewritten(self._members(), _OURS, {})

    def _members(self) -> list[tuple[str, str]]:
        if self._parts is None:
            self._parts = members(self._body)
        return self._parts

    def _goes_whole(self, why: str) -> None:
        self._series.add(1.0, "undivided", why)

    # -- SGLang

    async def _by_sglang(self) -> bytes:
        parts = self._members()
        keys = [key for key, _ in parts]
        for key in sorted(_BOOTSTRAP):
            if keys.count(key) > 1:
                self._legs.release()
                raise repeated_key(key)
        legs = self._legs
        while legs.pod is not None:
            more = {
                "bootstrap_host": _host(legs.pod),
                "bootstrap_port": _bootstrap_port(legs.pod),
                "bootstrap_room": secrets.randbits(63),
                # What an abort names; no client can guess it.
                "rid": f"{self._headers['x-request-id']}-{secrets.token_hex(8)}",
            }
            beside = _Beside(self, self._prefill_body(more), str(more["rid"]))
            if await self._prefills.sender.start(beside.run) in ("", "ok"):
                return rewritten(parts, _OURS | frozenset(more), more)
            if not self._try_another():
                break
        raise not_selected()

    def abort(self, rid: str) -> None:
        """The decode pod would wait for a prefill that does not come."""
        self._prefills.sender.tell(self._decode, ABORT_PATH, orjson.dumps({"rid": rid}))

    # -- both

    async def attempt(self, body: bytes, written: Callable[[], None] | None = None) -> tuple[str, bytes]:
        """Send the prompt to the pod that is charged with it: what became of it, and the answer."""
        legs, started = self._legs, self._clock()
        assert legs.pod is not None
        result, answer = "cancelled", b""
        try:
            answer = await self._prefills.sender.post(legs.pod, self._path, self._headers, body, written)
            result = "ok"
        except PrefillFailed as error:
            result = error.result
        finally:
            legs.release(ok=self._credit(result))
            self._prefills.count(self._series, result, self._clock() - started)
        return result, answer

    def _credit(self, result: str) -> bool | None:
        """Whether the pod is well, as far as that tells."""
        if result == "cancelled" or (result == "timeout" and self._legs.engine == "sglang"):
            return None  # SGLang's waits for the decode pod, whose client may have left
        return result not in ("failed", "timeout")

    def _try_another(self) -> bool:
        return len(self._legs.tried) < 2 and self._strategy.again(self._legs, self._candidates(), self._clock())


class _Beside:
    """A prefill that the decode pod is asked at the same time as."""

    def __init__(self, handover: Handover, body: bytes, rid: str) -> None:
        self._handover = handover
        self._body = body
        self._rid = rid

    async def run(self, written: Callable[[], None]) -> str:
        """What became of it. Where the decode pod waits for it already, it hears of a failure."""
        told: list[bool] = []

        def on_its_way() -> None:
            told.append(True)
            written()

        result, _ = await self._handover.attempt(self._body, on_its_way)
        if told and result != "ok":
            self._handover.abort(self._rid)
        return result


def _question(connector: str) -> dict[str, Any]:
    """What tells a pod that another will decode."""
    if connector == _TRTLLM:
        number = _LEAST_ID + secrets.randbelow((1 << 63) - _LEAST_ID)
        return {"disaggregated_params": {"request_type": "context_only", "disagg_request_id": number}}
    return {} if connector == NIXL else {"kv_transfer_params": _SKELETON}


def _handed_over(answer: bytes, connector: str, pod: Pod, kind: str) -> dict[str, Any]:
    """What the decode pod has to be told; nothing where the prefill pod said nothing."""
    try:
        document = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return {}
    if type(document) is not dict:
        return {}
    if connector == NIXL:
        return {"disagg_prefill_resp": document}
    if connector == _TRTLLM:
        return _of_trtllm(document, kind)
    params = document.get("kv_transfer_params")
    if type(params) is not dict or not params:
        return {}
    return {"kv_transfer_params": {**params, "remote_host": _host(pod)}}


def _of_trtllm(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """The context's parameters, wherever they stand, and the prompt as it was tokenised there."""
    params = document.get("disaggregated_params")
    choices = document.get("choices")
    if params is None and type(choices) is list and choices and type(choices[0]) is dict:
        params = choices[0].get("disaggregated_params")
    if type(params) is not dict or not params:
        return {}
    found: dict[str, Any] = {"disaggregated_params": {**params, "request_type": "generation_only"}}
    tokens = document.get("prompt_token_ids")
    if type(tokens) is list:
        found["prompt_token_ids" if kind == "chat" else "prompt"] = tokens
    return found


def _host(pod: Pod) -> str:
    return pod.host_ip.strip("[]")


def _bootstrap_port(pod: Pod) -> int:
    said = pod.record.labels.get(BOOTSTRAP_PORT_LABEL, "")
    return int(said) if said.isascii() and said.isdigit() and 0 < int(said) < 65536 else BOOTSTRAP_PORT


def members(body: bytes) -> list[tuple[str, str]]:
    """Name and text, name included, of each member of a JSON object that was parsed before. Raises RequestError where
    it cannot be taken apart all the same."""
    text = body.decode()
    found = []
    try:
        place = _after_blanks(text, text.index("{") + 1)
        while text[place] != "}":
            start = place
            name, place = _value_at(text, place)
            _, end = _value_at(text, _after_blanks(text, _after_blanks(text, place) + 1))
            found.append((name, text[start:end]))
            place = _after_blanks(text, end)
            if text[place] == ",":
                place = _after_blanks(text, place + 1)
    except (ValueError, IndexError, RecursionError):
        raise bad_body() from None
    return found


def _after_blanks(text: str, place: int) -> int:
    while text[place] in _BLANKS:
        place += 1
    return place


def rewritten(parts: list[tuple[str, str]], without: frozenset[str], more: Mapping[str, Any]) -> bytes:
    """An object of these members, but for some, and of more."""
    kept = [text.encode() for name, text in parts if name not in without]
    kept += [b"%b:%b" % (orjson.dumps(name), orjson.dumps(value)) for name, value in more.items()]
    return b"{" + b",".join(kept) + b"}"
