"""Chat messages to text, by the model's chat template."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import GenerationRequest

__all__ = ["render_chat"]

Messages = list[dict[str, Any]]


def render_chat(tokenizer: Any, request: GenerationRequest) -> str:
    """The text of a request's messages, with the beginning of the answer's turn behind them.

    With `continue_final_message` the last turn stays open instead. What the template makes nothing
    of is refused: the model would never see it.

    :param tokenizer: transformers'
    :raises InvalidRequestError: there is no template, it refuses the messages, or it has no use
        for a part of the request
    """
    if not tokenizer.chat_template:
        raise InvalidRequestError(
            "the model has no chat template; give 'prompt' instead of 'messages'"
        )
    given_messages = request.messages or ()
    messages = [_as_dict(message.model_dump(exclude_none=True)) for message in given_messages]
    given = request.chat_template_kwargs or {}
    kwargs: dict[str, Any] = {
        **given,
        "continue_final_message": request.continue_final_message,
        "add_generation_prompt": not request.continue_final_message,
    }
    if request.tools:
        kwargs["tools"] = request.tools
    try:
        _check_names(tokenizer, given, kwargs.get("tools"))
        text = _apply(tokenizer, messages, kwargs)
    except InvalidRequestError:
        raise
    except Exception as error:  # a template is a program of the model's author
        raise InvalidRequestError(f"the chat template refuses the messages: {error}") from error
    for place, message in enumerate(messages):
        if isinstance(parts := message.get("content"), list) and not _shows(parts, text):
            raise InvalidRequestError(
                f"the model's chat template takes 'messages[{place}].content' as one string: join "
                "the texts of its parts"
            )
    for where, fewer_messages, fewer_kwargs in _without_each(messages, kwargs):
        try:
            has_effect = _apply(tokenizer, fewer_messages, fewer_kwargs) != text
        except Exception:  # it can't do without
            has_effect = True
        if not has_effect:
            raise InvalidRequestError(
                f"the model's chat template makes nothing of {where}: leave it out, or write what "
                "it says into a 'content'"
            )
    return text


def _apply(tokenizer: Any, messages: Messages, kwargs: Mapping[str, Any]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    return text


def _shows(parts: list[dict[str, Any]], text: str) -> bool:
    """True if these parts' texts stand in `text`, and not Python's or JSON's notation of them."""
    texts = [part["text"] for part in parts]
    if not all(part.strip() in text for part in texts):
        return False
    notation = re.compile("""['"]type['"]: ?['"]text['"]""")
    return bool(notation.search("".join(texts))) or not notation.search(text)


def _as_dict(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: OpenAI writes a call's arguments as JSON."""
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_with_arguments(call) for call in calls]
        if not message["content"]:
            del message["content"]
    return message


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _check_names(tokenizer: Any, given: Mapping[str, Any], tools: object) -> None:
    """See that the template has all variables that the request sets."""
    if not given:
        return
    template = tokenizer.get_chat_template(None, tools)
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    for name in given:
        if name in reserved or not re.search(rf"\b{re.escape(name)}\b", template):
            raise InvalidRequestError(
                f"'chat_template_kwargs' has {name!r:.60}, which the model's chat template "
                "doesn't know: leave it out"
            )


def _without_each(
    messages: Messages, kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Messages, Mapping[str, Any]]]:
    """Each part that a template may pass over, and the rest without it.

    A tool's answer may name its tool and call: templates that go by the order need neither.
    """
    if "tools" in kwargs:
        yield "'tools'", messages, {k: v for k, v in kwargs.items() if k != "tools"}
    seen = set()
    for place, message in enumerate(messages):
        role = message["role"]
        for key in ("name", "tool_calls", "reasoning_content"):
            is_answer = role in {"tool", "function", "ipython"} and key == "name"
            if key not in message or is_answer or (role, key) in seen:
                continue
            seen.add((role, key))
            fewer = [
                {k: v for k, v in other.items() if k != key or other["role"] != role}
                for other in messages
            ]
            yield f"'messages[{place}].{key}'", fewer, kwargs
