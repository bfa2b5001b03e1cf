"""Prefill on one pod, decode on another: the bodies both get, the charges, and what happens when one fails. The pods
are a fake that answers as a test tells it to."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import fleet
import orjson
import pytest
from exchanges import REQUEST_ID, Contract, Said, Stream, response_with
from fleet import BUFFERED, DUPLEX, NONE, STREAMED, chat, loads, make_record, read, request_body, request_headers

from router.errors import RequestError
from router.fleet import Pod
from router.handover import PrefillFailed, Prefills, members, rewritten
from router.prefixes import Prefixes
from router.replies import RESPONSE_NAMESPACE
from router.scheduler import Scheduler
from router.strategies import Context
from state.catalog import PodRecord
from state.ledger import Entry

PARAMS = {"do_remote_prefill": True, "remote_engine_id": "e", "remote_block_ids": [1, 2], "remote_host": "localhost"}
SKELETON = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Pods:
    """Stands for the pods that prefill. `answers` are given in order, the last again and again: bytes, or a failure."""

    def __init__(self, *answers: bytes | str) -> None:
        self.answers = list(answers) or [orjson.dumps({"choices": [], "kv_transfer_params": PARAMS})]
        self.asked: list[tuple[str, str, dict[str, str], dict[str, Any]]] = []
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.tasks: set[asyncio.Task[str]] = set()
        self.during: Callable[[], None] = lambda: None

    async def post(
        self, pod: Pod, path: str, headers: Mapping[str, str], body: bytes, written: Callable[[], None] | None = None
    ) -> bytes:
        self.asked.append((pod.name, path, dict(headers), orjson.loads(body)))
        self.during()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "unreachable":
            raise PrefillFailed("failed")
        if written is not None:
            written()
        await self.hold.wait()
        if isinstance(answer, str):
            raise PrefillFailed(answer)
        return answer

    async def start(self, work: Callable[[Callable[[], None]], Coroutine[Any, Any, str]]) -> str:
        under_way = asyncio.Event()
        task = asyncio.ensure_future(work(under_way.set))
        self.tasks.add(task)
        waiting = asyncio.ensure_future(under_way.wait())
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        return task.result() if task.done() else ""

    def tell(self, pod: Pod, path: str, body: bytes) -> None:
        self.told.append((pod.name, path, orjson.loads(body)))

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.asked]


def roleset(prefill: int = 2, decode: int = 2, name: str = "rs", first: int = 0, **changes: Any) -> list[PodRecord]:
    """Pods from slot `first` on: those that prefill, then those that decode."""
    roles = ["prefill"] * prefill + ["decode"] * decode
    return [make_record(first + i, role=role, roleset=name, **changes) for i, role in enumerate(roles)]


def router(pods: Pods, records: list[PodRecord] | None = None, **options: Any) -> Contract:
    contract = Contract(records=roleset() if records is None else records, strategy="pd", **options)
    contract.scheduler.prefills = Prefills(pods)
    return contract


def waiting(stream: Stream, body: bytes, modes: tuple[int, int] | None = None, **headers: str) -> Awaitable[Any]:
    """What the stream waits for when it has the body."""
    stream.exchange.receive(request_headers(modes=modes, **headers))
    reply = stream.exchange.receive(request_body(body, modes=modes))
    assert isinstance(reply, Awaitable)
    return reply


async def said(
    contract: Contract, body: bytes | None = None, accounting: str = "stream", **headers: str
) -> tuple[Stream, Said]:
    """A stream after its request."""
    stream = contract.exchange(accounting)
    (reply,) = read(await waiting(stream, chat() if body is None else body, **headers))
    return stream, Said(reply)


async def test_the_prompt_is_prefilled_and_what_that_says_goes_to_the_decode_pod_of_the_same_roleset() -> None:
    pods = Pods()
    contract = router(pods, roleset(1, 1, "a") + roleset(1, 1, "b", first=2))
    sent = chat(
        text="prompt", max_tokens=70, stream=True, stream_options={"include_usage": True}, min_tokens=3, top_p=1
    )
    stream, reply = await said(contract, sent, authorization="Bearer k")
    (prefill, path, headers, asked), *others = pods.asked
    assert not others and path == "/v1/chat/completions"
    assert headers == {
        "content-type": "application/json", "x-request-id": REQUEST_ID, "authorization": "Bearer k",
    }  # fmt: skip
    messages = orjson.loads(sent)["messages"]
    assert asked == {
        "model": "llama", "messages": messages, "top_p": 1, "stream": False,
        "max_tokens": 1, "max_completion_tokens": 1, "kv_transfer_params": SKELETON,
    }  # fmt: skip
    number = int(prefill.removeprefix("pod-"))
    assert reply.headers["target-pod"] == f"10.0.0.{number + 2}:8000"
    assert reply.body.startswith(sent[:-1] + b',"kv_transfer_params":')
    assert orjson.loads(reply.body)["kv_transfer_params"] == {**PARAMS, "remote_host": f"10.0.0.{number + 1}"}
    assert reply.headers["content-length"] == str(len(reply.body))
    response = stream.send(response_with())
    assert response.headers["prefill-target-pod"] == prefill
    assert response.headers["prefill-target-pod-ip"] == f"10.0.0.{number + 1}"
    assert response.headers["target-pod"] == f"pod-{number + 1}"
    assert response.headers["routing-strategy"] == "pd"
    assert contract.counted("prefills") == {("ok",): 1.0}


async def test_by_access_log_the_prefill_pod_is_told_in_the_metadata_and_the_charge_is_left_to_the_log() -> None:
    pods = Pods()
    contract = router(pods)
    stream, reply = await said(contract, accounting="access-log")
    told = dict(reply.message.dynamic_metadata[RESPONSE_NAMESPACE].items())
    number = int(pods.names[0].removeprefix("pod-"))
    assert told == {"prefill-target-pod": pods.names[0], "prefill-target-pod-ip": f"10.0.0.{number + 1}"}
    assert stream.finished
    stream.exchange.close()
    assert contract.in_flight == 1
    assert sum(loads(contract.tables, Entry.REQUESTS_HELD)) == 0


@pytest.mark.parametrize("accounting", ["stream", "access-log"])
async def test_both_legs_are_charged_with_the_choice_and_the_prefill_is_given_back_with_its_answer(
    accounting: str,
) -> None:
    pods = Pods()
    contract = router(pods, roleset(1, 1))
    pods.during = lambda: seen.append((loads(contract.tables)[:2], loads(contract.tables, Entry.REQUESTS_HELD)[:2]))
    seen: list[tuple[list[int], list[int]]] = []
    _, reply = await said(contract, accounting=accounting)
    assert seen == [([1, 1], [1, 1])]
    assert loads(contract.tables)[:2] == [0, 1]
    assert loads(contract.tables, Entry.PROMISED)[1] == 0
    assert loads(contract.tables, Entry.PROMISED)[0] > 0
    assert reply.kind == "request_body"


async def test_a_burst_is_spread_over_the_pods_of_both_roles() -> None:
    pods = Pods()
    pods.hold.clear()
    contract = router(pods, roleset(4, 4))
    streams = [contract.exchange() for _ in range(16)]
    replies = [
        asyncio.ensure_future(waiting(stream, chat(text=f"{i}" * 400)))  # type: ignore[arg-type]
        for i, stream in enumerate(streams)
    ]
    assert loads(contract.tables)[:8] == [4] * 8
    pods.hold.set()
    await asyncio.gather(*replies)
    assert loads(contract.tables)[:8] == [0, 0, 0, 0, 4, 4, 4, 4]


async def test_a_prompt_goes_where_its_beginning_was_prefilled() -> None:
    pods = Pods()
    contract = router(pods, roleset(4, 2))
    context = Context(prefixes=Prefixes.of(contract.tables))
    contract.scheduler = Scheduler(contract.tables, "pd", contract.clock.__next__, context)
    contract.scheduler.prefills = Prefills(pods)
    texts = [f"You are assistant {number}, who knows the rules. " * 200 for number in range(4)]
    for turn in range(3):
        for text in texts:
            await said(contract, chat(text=text + "and so on " * turn))
    assert pods.names[:4] == pods.names[4:8] == pods.names[8:]
    assert len(set(pods.names)) == 4


@pytest.mark.parametrize("failure", ["failed", "timeout"])
async def test_a_prefill_that_fails_is_tried_on_another_pod_of_the_roleset(failure: str) -> None:
    pods = Pods(failure, orjson.dumps({"kv_transfer_params": PARAMS}))
    contract = router(pods, roleset(2, 1) + roleset(2, 0, "other", first=3))
    stream, reply = await said(contract)
    assert sorted(pods.names) == ["pod-0", "pod-1"]
    number = int(pods.names[1].removeprefix("pod-"))
    assert orjson.loads(reply.body)["kv_transfer_params"]["remote_host"] == f"10.0.0.{number + 1}"
    assert stream.send(response_with()).headers["prefill-target-pod"] == pods.names[1]
    assert contract.counted("prefills") == {(failure,): 1.0, ("ok",): 1.0}
    failed, succeeded = loads(contract.tables, Entry.FAILED), loads(contract.tables, Entry.SUCCEEDED)
    assert (failed[1 - number], succeeded[number]) == (1, 1)
    assert loads(contract.tables)[:3] == [0, 0, 1]


async def test_when_nobody_prefills_vllms_decode_pod_gets_the_request_as_it_came() -> None:
    pods = Pods("failed")
    contract = router(pods)
    stream, reply = await said(contract)
    assert len(pods.asked) == 2
    assert not reply.common.HasField("body_mutation")
    assert reply.headers["target-pod"] in ("10.0.0.3:8000", "10.0.0.4:8000")
    assert "prefill-target-pod" not in stream.send(response_with()).headers
    assert contract.counted("undivided") == {("failed",): 1.0}
    stream.exchange.close()
    assert contract.in_flight == 0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("refused", "refused"), (b"{}", "nothing"), (b'{"kv_transfer_params":null}', "nothing"), (b"<html>", "nothing")],
)
async def test_a_prefill_that_another_pod_would_not_do_better_is_not_tried_again(
    answer: bytes | str, reason: str
) -> None:
    pods = Pods(answer)
    contract = router(pods)
    _, reply = await said(contract)
    assert len(pods.asked) == 1 and not reply.common.HasField("body_mutation")
    assert contract.counted("undivided") == {(reason,): 1.0}
    assert sum(loads(contract.tables, Entry.FAILED)) == 0


INJECTED = {
    "kv_transfer_params": {"remote_host": "10.9.9.9"}, "disagg_prefill_resp": {}, "disaggregated_params": {},
    "bootstrap_host": "10.9.9.9", "bootstrap_port": 1, "bootstrap_room": 7,
}  # fmt: skip


@pytest.mark.parametrize("answer", ["failed", orjson.dumps({"kv_transfer_params": PARAMS})])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_cannot_say_itself_where_a_cache_lies_nor_which_pods_it_gets(answer: Any, n: int) -> None:
    pods = Pods(answer)
    contract = router(pods)
    headers = {"target_pod": "10.9.9.9:1", "prefill_target_pod": "x", "prefill_target_pod_ip": "10.9.9.9"}
    _, reply = await said(contract, chat(n=n, **INJECTED), **headers)
    assert b"10.9.9.9" not in reply.body and reply.body
    given = orjson.loads(reply.body)
    assert given.keys() & INJECTED.keys() <= {"kv_transfer_params"}
    for *_, asked in pods.asked:
        assert asked["kv_transfer_params"] == SKELETON and b"10.9.9.9" not in orjson.dumps(asked)
    assert reply.headers["target-pod"] in ("10.0.0.3:8000", "10.0.0.4:8000")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat(n=2)),
        ("/v1/completions", orjson.dumps({"model": "llama", "prompt": ["a", "b"]})),
        ("/v1/completions", orjson.dumps({"model": "llama", "prompt": [[1, 2], [3]]})),
        ("/v1/completions", orjson.dumps({"model": "llama", "prompt": "a", "best_of": 3})),
        ("/v1/completions", orjson.dumps({"model": "llama", "prompt": "a", "echo": True})),
        ("/v1/embeddings", orjson.dumps({"model": "llama", "input": "a"})),
        ("/v1/responses", orjson.dumps({"model": "llama", "input": "a"})),
    ],
)
async def test_what_cannot_be_handed_over_goes_whole_to_a_decode_pod(path: str, body: bytes) -> None:
    pods = Pods()
    contract = router(pods)
    stream = contract.exchange()
    stream.exchange.receive(request_headers(path))
    reply = stream.exchange.receive(request_body(body))
    assert isinstance(reply, Awaitable)
    (message,) = read(await reply)
    assert Said(message).headers["target-pod"] in ("10.0.0.3:8000", "10.0.0.4:8000")
    assert not pods.asked and not message.request_body.response.HasField("body_mutation")
    assert contract.counted("undivided") == {("indivisible",): 1.0}
    assert sum(loads(contract.tables)) == 1


@pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2, 3], [[1, 2, 3]]])
async def test_text_completions_are_handed_over_too(prompt: Any) -> None:
    pods = Pods()
    contract = router(pods)
    stream = contract.exchange()
    stream.exchange.receive(request_headers("/v1/completions?x=1"))
    reply = stream.exchange.receive(request_body(orjson.dumps({"model": "llama", "prompt": prompt})))
    assert isinstance(reply, Awaitable)
    await reply
    ((_, path, _, asked),) = pods.asked
    assert path == "/v1/completions" and "max_completion_tokens" not in asked and asked["prompt"] == prompt


@pytest.mark.parametrize(
    "records",
    [
        [make_record(0), make_record(1)],
        roleset(2, 0),
        roleset(0, 2),
        roleset(1, 0, "a") + roleset(0, 1, "b", first=1),
        roleset(1, 0, "a", engine="vllm") + roleset(0, 1, "a", first=1, engine="sglang"),
        roleset(1, 1, ""),
    ],
    ids=["no roles", "no decode", "no prefill", "apart", "two engines", "no roleset"],
)
async def test_without_a_roleset_that_has_both_nobody_is_chosen(records: list[PodRecord]) -> None:
    answer = router(Pods(), records).routed().last
    assert (answer.status, answer.error["message"]) == (503, "error on selecting target pod")
    assert answer.headers["x-error-routing"] == "true"


async def test_a_label_filter_is_for_the_pods_of_both_roles() -> None:
    records = roleset(1, 1, "a") + roleset(1, 1, "b", first=2)
    pods = Pods()
    contract = router(pods, records)
    for _ in range(6):
        await said(contract, external_filter="roleset-name=b")
    assert set(pods.names) == {"pod-2"}
    assert contract.routed(external_filter="role-name=decode").last.status == 503


@pytest.mark.parametrize("asked", ["pd", "pd,least-request", "pd:2"])
async def test_it_can_be_asked_for_like_any_other(asked: str) -> None:
    pods = Pods()
    contract = router(pods)
    contract.scheduler.default_strategy = "random"
    await said(contract, routing_strategy=asked)
    assert len(pods.asked) == 1


async def test_a_profile_may_name_it_and_limit_the_models_rate() -> None:
    profile = {"profiles": {"default": {"routingStrategy": "pd", "requestsPerSecond": 1}}}
    pods = Pods()
    contract = router(pods, settings={"llama": profile})
    contract.scheduler.default_strategy = "random"
    await said(contract)
    assert len(pods.asked) == 1
    assert contract.routed().last.status == 429


# -- ends


@pytest.mark.parametrize("accounting", ["stream", "access-log"])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_client_that_leaves_ends_the_prefill_and_gives_both_charges_back(accounting: str, begun: bool) -> None:
    pods = Pods()
    pods.hold.clear()
    contract = router(pods)
    stream = contract.exchange(accounting)
    reply = asyncio.ensure_future(waiting(stream, chat()))  # type: ignore[arg-type]
    if begun:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert contract.in_flight == 2
    reply.cancel()
    stream.exchange.close()
    await asyncio.wait([reply])
    assert reply.cancelled()
    assert contract.in_flight == 0 and sum(loads(contract.tables, Entry.REQUESTS_HELD)) == 0
    assert contract.counted("prefills") == ({("cancelled",): 1.0} if begun else {})
    assert sum(loads(contract.tables, Entry.FAILED)) == 0
    assert {status for _, status in contract.counted("finished")} == {"499"}


async def test_pods_that_came_and_went_meanwhile_are_seen_by_the_second_try() -> None:
    pods = Pods("failed", orjson.dumps({"kv_transfer_params": PARAMS}))
    contract = router(pods, roleset(2, 1))
    first, second = roleset(2, 1)[0], roleset(2, 1)[1]

    def change() -> None:
        tables = contract.tables
        gone = next(record for record in (first, second) if record.name != pods.names[0])
        new = make_record(5, role="prefill", roleset="rs")
        tables.pods.claim(5, new.generation)
        fleet.set_row(tables, 5)
        kept = [record for record in roleset(2, 1) if record.name != gone.name]
        tables.catalog.publish(fleet.CatalogDocument((*kept, new)))
        pods.during = lambda: None

    pods.during = change
    await said(contract)
    assert pods.names[1] == "pod-5"


async def test_a_receipt_can_be_asked_for() -> None:
    pods = Pods()
    contract = router(pods, explain=True)
    only = contract.routed(x_pointsman_explain="only").last
    assert only.status == 200 and not pods.asked and contract.in_flight == 0
    stream, _ = await said(contract, x_pointsman_explain="1")
    headers = stream.send(response_with()).headers
    assert orjson.loads(headers["x-pointsman-decision"])["strategy"] == "pd" and headers["prefill-target-pod"]


# -- modes


async def test_in_full_duplex_the_new_body_is_given_back_in_pieces() -> None:
    contract = router(Pods())
    stream = contract.exchange()
    sent = chat(text="x" * 100_000)
    reply = await waiting(stream, sent, (DUPLEX, NONE))
    headers, *pieces = read(reply)
    body = b"".join(piece.request_body.response.body_mutation.streamed_response.body for piece in pieces)
    assert body.startswith(sent[:-1]) and "kv_transfer_params" in orjson.loads(body)
    assert Said(headers).headers["content-length"] == str(len(body))
    assert pieces[-1].request_body.response.body_mutation.streamed_response.end_of_stream


async def test_a_body_that_envoy_sends_on_in_pieces_cannot_be_changed() -> None:
    contract = router(Pods())
    stream = contract.exchange()
    stream.send(request_headers(modes=(STREAMED, NONE)))
    assert stream.send(request_body(chat(), modes=(STREAMED, NONE))).status == 503
    assert contract.in_flight == 0
    stream.exchange.close()
    assert contract.counted("finished") == {}


async def test_an_envoy_that_says_how_it_is_set_up_gets_the_same() -> None:
    contract = router(Pods())
    (reply,) = read(await waiting(contract.exchange(), chat(), (BUFFERED, NONE)))
    assert Said(reply).headers["content-length"] == str(len(Said(reply).body))


# -- other hand-overs


async def test_neuron_gets_the_whole_answer_of_the_prefill() -> None:
    answer = {"id": "x", "choices": [{"text": "a"}]}
    pods = Pods(orjson.dumps(answer))
    contract = router(pods, roleset(1, 1, labels={"model.aibrix.ai/kv-connector-type": "nixl"}))
    _, reply = await said(contract)
    ((*_, asked),) = pods.asked
    assert "kv_transfer_params" not in asked
    assert orjson.loads(reply.body)["disagg_prefill_resp"] == answer


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize(
    ("path", "tokens_as"), [("/v1/chat/completions", "prompt_token_ids"), ("/v1/completions", "prompt")]
)
async def test_tensorrt_gets_the_parameters_of_the_context_and_its_tokens(
    above: bool, path: str, tokens_as: str
) -> None:
    context = {"request_type": "context_only", "ctx_request_id": (1 << 62) + 1, "encoded_opaque_state": "AA=="}
    choice: dict[str, Any] = {"index": 0} if above else {"index": 0, "disaggregated_params": context}
    answer = {"choices": [choice], "prompt_token_ids": [5, 6], **({"disaggregated_params": context} if above else {})}
    pods = Pods(orjson.dumps(answer))
    contract = router(pods, roleset(1, 1, engine="trtllm"))
    stream = contract.exchange()
    stream.exchange.receive(request_headers(path))
    sent = {
        "model": "llama",
        "prompt": "p",
        "messages": [{"role": "user", "content": "p"}],
        "max_completion_tokens": 9,
        "disaggregated_params": {"x": 1},
    }
    reply = stream.exchange.receive(request_body(orjson.dumps(sent)))
    assert isinstance(reply, Awaitable)
    (message,) = read(await reply)
    ((*_, asked),) = pods.asked
    assert asked["disaggregated_params"]["request_type"] == "context_only" and asked["max_tokens"] == 1
    assert 1 << 42 <= asked["disaggregated_params"]["disagg_request_id"] < 1 << 63
    assert "max_completion_tokens" not in asked and "kv_transfer_params" not in asked
    given = orjson.loads(Said(message).body)
    assert given["disaggregated_params"] == {**context, "request_type": "generation_only"}
    assert given[tokens_as] == [5, 6] and given["max_completion_tokens"] == 9


def sglang(prefill: int = 2, decode: int = 1, **labels: str) -> list[PodRecord]:
    return roleset(prefill, decode, engine="sglang", labels=labels)


async def test_sglangs_pods_get_the_request_at_the_same_time_and_a_room_to_meet_in() -> None:
    pods = Pods(b"{}")
    pods.hold.clear()
    contract = router(pods, sglang(1, **{"model.aibrix.ai/sglang-bootstrap-port": "9100"}))
    _, reply = await said(contract, chat(max_tokens=50, rid="mine", bootstrap_room=1))
    ((_, _, _, asked),) = pods.asked
    given = orjson.loads(reply.body)
    for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid"):
        assert asked[name] == given[name]
    assert (given["bootstrap_host"], given["bootstrap_port"]) == ("10.0.0.1", 9100)
    assert 1 < given["bootstrap_room"] < 1 << 63 and given["rid"].startswith(REQUEST_ID)
    assert (given["max_tokens"], asked["max_tokens"]) == (50, 1)
    assert loads(contract.tables)[:2] == [1, 1]
    pods.hold.set()
    await asyncio.wait(pods.tasks)
    assert loads(contract.tables)[:2] == [0, 1] and not pods.told


async def test_a_prefill_pod_of_sglang_that_cannot_be_reached_is_passed_over() -> None:
    pods = Pods("unreachable", b"{}")
    contract = router(pods, sglang())
    _, reply = await said(contract)
    assert len(set(pods.names)) == 2
    number = int(pods.names[1].removeprefix("pod-"))
    assert orjson.loads(reply.body)["bootstrap_host"] == f"10.0.0.{number + 1}"
    assert not pods.told


@pytest.mark.parametrize("accounting", ["stream", "access-log"])
async def test_where_no_prefill_pod_of_sglang_can_be_reached_the_request_is_refused(accounting: str) -> None:
    pods = Pods("unreachable")
    contract = router(pods, sglang())
    stream, reply = await said(contract, accounting=accounting)
    assert (reply.status, reply.error["code"]) == (503, "service_unavailable")
    assert len(pods.asked) == 2 and contract.in_flight == 0
    stream.exchange.close()
    assert contract.in_flight == 0 and sum(loads(contract.tables, Entry.REQUESTS_HELD)) == 0


async def test_a_prefill_of_sglang_that_fails_later_is_told_to_the_decode_pod() -> None:
    pods = Pods("failed")
    pods.hold.clear()
    contract = router(pods, sglang(1))
    _, reply = await said(contract)
    pods.hold.set()
    await asyncio.wait(pods.tasks)
    assert pods.told == [("pod-1", "/abort_request", {"rid": orjson.loads(reply.body)["rid"]})]
    assert loads(contract.tables, Entry.FAILED)[0] == 1


async def test_a_prefill_of_sglang_that_waits_too_long_does_not_count_against_its_pod() -> None:
    """It waits for the decode pod, and the client may have left that."""
    pods = Pods("timeout")
    pods.hold.clear()
    contract = router(pods, sglang(1))
    await said(contract)
    pods.hold.set()
    await asyncio.wait(pods.tasks)
    assert sum(loads(contract.tables, Entry.FAILED)) == 0
    assert loads(contract.tables)[:2] == [0, 1]
    assert contract.counted("prefills") == {("timeout",): 1.0}


async def test_rooms_that_a_client_names_twice_are_refused() -> None:
    contract = router(Pods(), sglang())
    _, reply = await said(contract, chat()[:-1] + b',"bootstrap_room":1,"bootstrap_room":2}')
    assert (reply.status, reply.error["message"]) == (
        400, 'duplicate top-level key "bootstrap_room" in SGLang request body',
    )  # fmt: skip
    assert contract.in_flight == 0


async def test_an_engine_whose_hand_over_is_not_known() -> None:
    contract = router(Pods(), roleset(1, 1, engine="xllm"))
    _, reply = await said(contract)
    assert reply.status == 503 and "xllm" in reply.error["message"]
    assert contract.in_flight == 0


# -- the JSON


@pytest.mark.parametrize(
    "text",
    [
        '{}',
        ' { } ',
        '{"a":1}',
        '{ "a" : [1, {"b": "}"}] ,\n\t"b":"\\"}\\ud83d", "a" : 1.50e3, "\\u0063": null}',
        '{"big": 123456789012345678901234567890, "e": "ü€😀", "x": {"a": {"a": 1}}}',
    ],
)  # fmt: skip
def test_members_stay_as_they_were_written(text: str) -> None:
    parts = members(text.encode())
    assert [part in text for _, part in parts] == [True] * len(parts)
    document = orjson.loads(text.replace("\\ud83d", "."))
    assert {name for name, _ in parts} == set(document)
    again = rewritten(parts, frozenset(), {})
    assert orjson.loads(again.replace(b"\\ud83d", b".")) == document
    without = rewritten(parts, frozenset({"a", "c"}), {"new": [1]})
    left = {name: value for name, value in document.items() if name not in ("a", "c")}
    assert orjson.loads(without.replace(b"\\ud83d", b".")) == {**left, "new": [1]}


def test_a_body_that_cannot_be_taken_apart_is_refused() -> None:
    with pytest.raises(RequestError):
        members(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
