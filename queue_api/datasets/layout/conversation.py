"""The messages in a column: OpenAI's form or ShareGPT's, as a list or as its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from queue_api.wire.errors import InvalidRequestError

__all__ = ["MOST_TURNS", "messages_of", "turns_of", "without_answer"]

MOST_TURNS = 64
"""Each is a pass over the input."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Who speaks, in files of ShareGPT's form, and the role that this is."""


def messages_of(value: object, column: str) -> list[Any]:
    """The messages in OpenAI's form; each is checked later, as those of a request are.

    :raises InvalidRequestError: there are none, or a turn is neither of OpenAI's nor of ShareGPT's
        form
    """
    if isinstance(value, str):
        value = _parsed(value, column)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not isinstance(value, list):
        raise InvalidRequestError(f"column {column!r} is {value!r:.60}, not a list of messages")
    if not value:
        raise InvalidRequestError(f"column {column!r} has no messages")
    return [_message(turn, f"{column}[{place}]") for place, turn in enumerate(value)]


def without_answer(messages: Sequence[Any]) -> Sequence[Any]:
    """The messages up to the last that isn't the assistant's.

    :raises InvalidRequestError: they are all the assistant's
    """
    end = len(messages)
    while (
        end
        and isinstance(messages[end - 1], Mapping)
        and (messages[end - 1].get("role") == "assistant")
    ):
        end -= 1
    if not end:
        raise InvalidRequestError("all messages are the assistant's: there is none to answer")
    return messages[:end]


def turns_of(value: object, column: str) -> list[str]:
    """The user's turns.

    :raises InvalidRequestError: there are none, or too many, or one isn't a text
    """
    if isinstance(value, str):
        value = _parsed(value, column)
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"column {column!r} is {value!r:.60}, not a list of turns")
    if len(value) > MOST_TURNS:
        raise InvalidRequestError(
            f"column {column!r} has {len(value)} turns; the limit is {MOST_TURNS}"
        )
    for place, turn in enumerate(value):
        if not isinstance(turn, str) or not turn:
            raise InvalidRequestError(f"'{column}[{place}]' is {turn!r:.60}: a turn is a text")
    return value


def _parsed(text: str, column: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        hint = (
            "it looks like Python's notation: write it with json.dumps"
            if text.lstrip().startswith(("[{'", "{'"))
            else "if it is a prompt: --prompt-column"
        )
        raise InvalidRequestError(
            f"column {column!r} is {text!r:.60}, not a list; {hint}"
        ) from None


def _message(turn: object, place: str) -> Any:
    """:raises InvalidRequestError: a turn of ShareGPT's form that can't be understood"""
    if not isinstance(turn, Mapping):
        raise InvalidRequestError(
            f"'{place}' is {turn!r:.60}: a message is an object with 'role' and 'content'; if "
            "these are the user's turns, each asked after the answer to the last: --turns-column"
        )
    speaker = turn.get("from")
    if speaker is None or turn.get("role") is not None:
        return turn
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise InvalidRequestError(
            f"'{place}' is from {speaker!r:.40}; known are {', '.join(sorted(_ROLES))}"
        )
    value = turn.get("value")
    if not isinstance(value, str):
        raise InvalidRequestError(f"'{place}' has {value!r:.60} as its 'value': must be a text")
    if speaker.lower() == "function_call":
        return {"role": role, "content": None, "tool_calls": _calls(value, place)}
    return {"role": role, "content": value}


def _calls(value: str, place: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise InvalidRequestError(
            f"'{place}' is {value!r:.60}: a function call is JSON with 'name' and 'arguments'"
        )
    return [{"type": "function", "function": dict(call)} for call in calls]
