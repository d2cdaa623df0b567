"""OpenAI's batch format as an output: a file of responses, and one of errors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from queue_api.datasets.formats.json_record import dump_row
from queue_api.datasets.formats.jsonl_sink import JsonLinesSink, read_object
from queue_api.datasets.formats.row_sink import MadeRow, WrittenRow, written_row

__all__ = ["BatchLinesSink"]

OWN = "batchmill"
"""The object of a line that says what no field of the format does; OpenAI's clients pass it by."""
_OWN_COLUMNS = (
    "row",
    "fingerprint",
    "finish_reason",
    "model",
    "model_revision",
    "worker",
    "attempt",
    "timings",
    "error",
    "error_code",
    "structured_output",
    "applied_defaults",
    "seed_key",
)
CHAT_URL = "/v1/chat/completions"


class BatchLinesSink(JsonLinesSink):
    """Lines of `id`, `custom_id`, `response` and `error`: BatchRequestOutput of OpenAI's API."""

    format = "openai"

    @staticmethod
    def dump(row: MadeRow) -> bytes:
        columns = row.columns
        given = columns.get("custom_id")
        line: dict[str, Any] = {
            "id": f"batch_req_{row.fingerprint}",
            "custom_id": str(columns["id"] if given is None else given),
            "response": None,
            "error": None,
            OWN: {name: columns[name] for name in _OWN_COLUMNS if name in columns},
        }
        if columns["finish_reason"] in ("stop", "length"):
            line["response"] = {
                "status_code": 200,
                "request_id": f"req_{row.fingerprint}",
                "body": _body(columns, row.fingerprint),
            }
        else:
            line["error"] = _error(columns, row.number)
        return dump_row(line)

    @staticmethod
    def parse(line: bytes) -> WrittenRow | None:
        found = read_object(line)
        own = found and found.get(OWN)
        if found is None or not isinstance(own, dict) or "custom_id" not in found:
            return None
        known = written_row({**own, "id": found["custom_id"], **_texts_of(found)})
        return known and replace(known, has_input=False)


def _error(columns: Mapping[str, Any], number: int) -> dict[str, Any]:
    """BatchError of OpenAI's API."""
    reason = columns["finish_reason"]
    return {
        "code": columns["error_code"] or f"batch_{reason}",
        "message": columns["error"] or f"the request was {reason}",
        "param": None,
        "line": number or None,
    }


def _body(columns: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """A ChatCompletion, or a Completion of a plain prompt."""
    is_chat = _is_chat(columns)
    samples = columns.get("outputs") or [{**columns, "index": 0}]
    usage = columns["usage"]
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{fingerprint}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": columns["model"],
        "choices": [(_chat_choice if is_chat else _text_choice)(sample) for sample in samples],
        "usage": {**usage, "total_tokens": sum(usage.values())},
        "system_fingerprint": columns["model_revision"] or None,
    }


def _is_chat(columns: Mapping[str, Any]) -> bool:
    if (url := columns.get("url")) is not None:
        return bool(url == CHAT_URL)
    return columns.get("prompt") is None


def _chat_choice(sample: Mapping[str, Any]) -> dict[str, Any]:
    logprobs = sample.get("logprobs")
    content = None if logprobs is None else [_chat_token(token) for token in logprobs]
    return {
        "index": sample["index"],
        "message": {"role": "assistant", "content": sample["text"], "refusal": None},
        "logprobs": None if content is None else {"content": content, "refusal": None},
        "finish_reason": sample["finish_reason"],
    }


def _chat_token(token: Mapping[str, Any]) -> dict[str, Any]:
    return {**_likely(token), "top_logprobs": [_likely(other) for other in token.get("top", ())]}


def _likely(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["token"]
    # a part of a character has no bytes that its text would tell
    as_bytes = None if "\ufffd" in text else list(text.encode(errors="surrogatepass"))
    return {"token": text, "logprob": token["logprob"], "bytes": as_bytes}


def _text_choice(sample: Mapping[str, Any]) -> dict[str, Any]:
    logprobs = sample.get("logprobs")
    return {
        "index": sample["index"],
        "text": sample["text"],
        "logprobs": None if logprobs is None else _text_logprobs(logprobs),
        "finish_reason": sample["finish_reason"],
    }


def _text_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    texts = [token["token"] for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in token.get("top", ())} for token in tokens
        ],
        "text_offset": [sum(map(len, texts[:place])) for place in range(len(texts))],
    }


def _texts_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the samples in a line's response."""
    response = line.get("response")
    try:
        choices = response["body"]["choices"] if response else []
        samples = [
            {
                "index": choice["index"],
                "text": str(
                    choice["message"]["content"] if "message" in choice else choice.get("text", "")
                ),
                "finish_reason": choice["finish_reason"],
            }
            for choice in choices
        ]
    except (KeyError, IndexError, TypeError):
        return {"text": ""}
    text = {"text": samples[0]["text"] if samples else ""}
    return {**text, "outputs": samples} if len(samples) > 1 else text
