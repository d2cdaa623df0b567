"""Lines of OpenAI's batch format: `custom_id`, `method`, `url` and the request's `body`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.foreign_fields import INSTEAD
from queue_api.wire.sampling import SAMPLING_FIELDS

__all__ = ["BATCH_COLUMNS", "batch_request", "is_batch_line", "without_prompt"]

BATCH_COLUMNS = frozenset({"custom_id", "method", "url", "body"})
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
_PROMPTS = {CHAT_URL: "messages", TEXT_URL: "prompt"}
_OWN = SAMPLING_FIELDS | {"return_token_ids"}
_OWN_OF_CHATS = _OWN | {"tools", "chat_template_kwargs", "continue_final_message"}
_WITHOUT_EFFECT = frozenset(
    {
        *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "stream_options"),
    }
)
"""Fields that say nothing of the text."""
_AS_HERE: Mapping[str, tuple[object, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "suffix": ("",),
}
"""Fields that only these values of can be had: those that count without them."""


def is_batch_line(columns: Mapping[str, Any]) -> bool:
    """True if a row with a `body` is a line of the format, right or wrong."""
    if columns.get("prompt") is not None or columns.get("messages") is not None:
        return False
    url = columns.get("url")
    return columns.get("custom_id") is not None or (isinstance(url, str) and url.startswith("/v1/"))


def without_prompt(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A line's columns, of the body only the model."""
    body = columns.get("body")
    model = body.get("model") if isinstance(body, Mapping) else None
    return {**columns, "body": {"model": model}}


def batch_request(columns: Mapping[str, Any], tell_once: Callable[[str], None]) -> dict[str, Any]:
    """The fields of the request that a line asks for, but for its id; unchecked.

    :raises InvalidRequestError: a line that isn't complete, another address, or a field that has
        no counterpart here
    """
    url = _url(columns)
    body = _body(columns)
    fields = _known(body, url)
    _rename_limit(fields)
    _join_logprobs(fields, url)
    if url == TEXT_URL:
        _take_best_of(fields, body)
        fields["prompt"] = _prompt(fields.get("prompt"))
    elif not isinstance(fields.get("messages"), list):
        raise InvalidRequestError("'body' has no list of 'messages'")
    else:
        fields["messages"] = [_message(message) for message in fields["messages"]]
    if model := body.get("model"):
        tell_once(f"lines ask for the model {model!r:.60}: this run's model answers them")
    if not fields.keys() & {"max_tokens", "max_new_tokens"}:
        tell_once(
            "lines without 'max_tokens' or 'temperature' have those of this command's options, "
            "else batchmill's (128, and 0, which is greedy), not OpenAI's"
        )
    return fields


def _url(columns: Mapping[str, Any]) -> str:
    if columns.get("custom_id") is None:
        raise InvalidRequestError("'custom_id' is missing")
    method, url = columns.get("method"), columns.get("url")
    if method is not None and method != "POST":
        raise InvalidRequestError(f"'method' is {method!r:.40}: must be POST")
    if url is None:
        raise InvalidRequestError("'url' is missing")
    if url not in _PROMPTS:
        raise InvalidRequestError(
            f"'url' is {url!r:.60}: batchmill answers {CHAT_URL} and {TEXT_URL}"
        )
    return str(url)


def _body(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    body = columns.get("body")
    if isinstance(body, str):
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(body)
    if not isinstance(body, Mapping):
        raise InvalidRequestError(f"'body' is {body!r:.60}: must be an object")
    return body


def _known(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The fields that are asked for and that there are here; some under other names."""
    own = _OWN_OF_CHATS if url == CHAT_URL else _OWN
    also = {"max_completion_tokens", "top_logprobs"} if url == CHAT_URL else {"best_of"}
    fields = {}
    for name, value in body.items():
        if value is None or name in _WITHOUT_EFFECT or value in _AS_HERE.get(name, ()):
            continue
        if name not in own and name not in also and name != _PROMPTS[url]:
            hint = INSTEAD.get(name)
            raise InvalidRequestError(
                f"'body' has {name!r:.60}, {value!r:.40}: "
                + (hint or f"batchmill has no such field for {url}")
            )
        fields[name] = value
    return fields


def _rename_limit(fields: dict[str, Any]) -> None:
    if (limit := fields.pop("max_completion_tokens", None)) is None:
        return
    if fields.setdefault("max_tokens", limit) != limit:
        raise InvalidRequestError(
            "give 'max_tokens' or 'max_completion_tokens' in 'body', not both"
        )


def _join_logprobs(fields: dict[str, Any], url: str) -> None:
    """Of chats `logprobs` says whether, and `top_logprobs` how many; of texts, as here, the first
    says both."""
    if url != CHAT_URL:
        return
    wanted, most = fields.pop("logprobs", False), fields.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise InvalidRequestError(f"'logprobs' in 'body' is {wanted!r:.40}: must be true or false")
    if wanted:
        fields["logprobs"] = most or 0
    elif most is not None:
        raise InvalidRequestError("'top_logprobs' in 'body' needs 'logprobs': true")


def _take_best_of(fields: dict[str, Any], body: Mapping[str, Any]) -> None:
    best_of = fields.pop("best_of", None)
    if best_of is not None and best_of != (body.get("n") or 1):
        raise InvalidRequestError(f"'best_of' in 'body' is {best_of!r:.40}: {INSTEAD['best_of']}")


def _prompt(prompt: object) -> object:
    if prompt is None:
        raise InvalidRequestError("'body' has no 'prompt'")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise InvalidRequestError(
                f"'prompt' in 'body' is a list of {len(prompt)}: write each prompt on a line of "
                "its own"
            )
        return prompt[0]
    return prompt


def _message(message: object) -> object:
    """A message as it is checked: without what answers of OpenAI's have and nothing says."""
    if not isinstance(message, Mapping):
        return message
    fields = {k: v for k, v in message.items() if not (k in _OF_ANSWERS and not v)}
    if fields.get("role") == "developer":
        fields["role"] = "system"
    return fields


_OF_ANSWERS = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls"})
