"""The JSON that vLLM's OpenAI server speaks: errors, answers whole and in chunks, models, embeddings.

A chunk is put together from bytes made once per request; token text is ASCII that needs no escapes, see `pod_text`.
"""

import base64
import random
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

VERSION = "0.32.0"
DONE = b"data: [DONE]\n\n"


class ApiError(Exception):
    """An answer in vLLM's error shape."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "BadRequestError", message, param)


def unknown_model(model: object) -> ApiError:
    return ApiError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")


class Usage(NamedTuple):
    prompt: int
    completion: int
    cached: int | None = None  # None: not told, as in chunks

    def json(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
        }
        if self.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        return usage


class Api(NamedTuple):
    """What tells chat from text completion on the wire."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    before_text: bytes
    after_text: bytes
    is_chat: bool


CHAT = Api(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    b',"delta":{"content":"',
    b'"},"logprobs":null,"finish_reason":%b,"stop_reason":null,"token_ids":null}]',
    True,
)
COMPLETION = Api(
    "cmpl-",
    "text_completion",
    "text_completion",
    b',"text":"',
    b'","logprobs":null,"finish_reason":%b,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]',
    False,
)


class Chunks:
    """Makes the server-sent events of one streamed answer."""

    def __init__(self, api: Api, answer_id: str, created: int, model: str) -> None:
        start = orjson.dumps({"id": answer_id, "object": api.chunk_object, "created": created, "model": model})
        self._head = b"data: " + start[:-1] + b',"choices":'
        self._before = api.before_text
        self._after = api.after_text % b"null"
        self._last = api.after_text

    def role(self, index: int, usage: Usage | None) -> bytes:
        delta = b'[{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' % index
        return self._head + delta + _tail(usage)

    def text(self, index: int, text: str, finish_reason: str | None, usage: Usage | None) -> bytes:
        after = self._after if finish_reason is None else self._last % b'"%b"' % finish_reason.encode()
        return b'%b[{"index":%d%b%b%b%b' % (self._head, index, self._before, text.encode(), after, _tail(usage))

    def usage(self, usage: Usage) -> bytes:
        return self._head + b"[]" + _tail(usage)


def _tail(usage: Usage | None) -> bytes:
    return b"}\n\n" if usage is None else b',"usage":%b}\n\n' % orjson.dumps(usage.json())


def whole(
    api: Api,
    answer_id: str,
    created: int,
    model: str,
    texts: Sequence[tuple[str, str]],
    usage: Usage,
    kv_transfer_params: dict[str, Any] | None = None,
) -> bytes:
    """`texts` are (text, finish reason), one per choice."""
    choices = []
    for index, (text, finish_reason) in enumerate(texts):
        choice: dict[str, Any] = {"index": index}
        if api.is_chat:
            choice["message"] = {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning": None,
            }
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": finish_reason, "stop_reason": None, "token_ids": None}
        if not api.is_chat:
            choice |= {"prompt_logprobs": None, "prompt_token_ids": None}
        choices.append(choice)
    answer: dict[str, Any] = {
        "id": answer_id,
        "object": api.whole_object,
        "created": created,
        "model": model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": None,
        "usage": usage.json(),
    }
    if api.is_chat:
        answer |= {"prompt_logprobs": None, "prompt_token_ids": None}
    answer["kv_transfer_params"] = kv_transfer_params
    return orjson.dumps(answer)


def models(names: Sequence[str], created: int, max_model_len: int) -> bytes:
    """The first is the model served, the others its adapters."""
    return orjson.dumps(
        {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": created,
                    "owned_by": "vllm",
                    "root": name,
                    "parent": names[0] if name != names[0] else None,
                    "max_model_len": max_model_len if name == names[0] else None,
                    "permission": [
                        {
                            "id": f"modelperm-{name}",
                            "object": "model_permission",
                            "created": created,
                            "allow_create_engine": False,
                            "allow_sampling": True,
                            "allow_logprobs": True,
                            "allow_search_indices": False,
                            "allow_view": True,
                            "allow_fine_tuning": False,
                            "organization": "*",
                            "group": None,
                            "is_blocking": False,
                        }
                    ],
                }
                for name in names
            ],
        }
    )


def embeddings(
    answer_id: str, created: int, model: str, inputs: Sequence[tuple[int, int]], dimensions: int, as_base64: bool
) -> bytes:
    """`inputs` are (seed of the vector, tokens), one per text. The vectors have length 1 and mean nothing."""
    data = []
    for index, (seed, _) in enumerate(inputs):
        chance = random.Random(seed)
        vector = [chance.uniform(-1, 1) for _ in range(dimensions)]
        length = sum(x * x for x in vector) ** 0.5
        vector = [x / length for x in vector]
        packed: str | list[float] = vector
        if as_base64:
            packed = base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode()
        data.append({"index": index, "object": "embedding", "embedding": packed})
    tokens = sum(tokens for _, tokens in inputs)
    return orjson.dumps(
        {
            "id": answer_id,
            "object": "list",
            "created": created,
            "model": model,
            "data": data,
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            },
        }
    )
