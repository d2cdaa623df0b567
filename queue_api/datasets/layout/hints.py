"""Which option reads a file whose columns aren't batchmill's own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from queue_api.datasets.layout.layout import quoted

__all__ = ["instead", "is_chat", "missing_column", "which_option"]

_SYSTEMS = ("system", "system_prompt", "system_message")
_CHATS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
_PROMPTS = (
    *("question", "query", "instruction", "inputs", "input", "problem", "text", "content"),
    *("user_input", "user_prompt", "prompts", "goal", "request"),
)
"""Columns that public files have their prompts in, the likeliest first."""


def which_option(rows: Sequence[Mapping[str, Any]]) -> str:
    """What to say of rows with neither a prompt nor messages: the option that reads them.

    :param rows: the columns of some
    """
    columns = {name: row[name] for row in reversed(rows) for name in row}
    plain = {name.lower(): name for name in columns}
    if chat := _first(name for name, value in columns.items() if is_chat(value)):
        return f"to read its chats: --messages-column {_shown(chat)}"
    if texts := _first(name for name, value in columns.items() if _is_texts(value)):
        return f"if those are turns, asked one after the other: --turns-column {_shown(texts)}"
    if "instruction" in plain and "input" in plain:
        first, second = plain["instruction"], plain["input"]
        return f"to join these: --template $'{{{{ {first} }}}}\\n\\n{{{{ {second} or \"\" }}}}'"
    if chat := _first(plain[name] for name in _CHATS if name in plain):
        return f"if they are chats: --messages-column {_shown(chat)}"
    if prompt := _first(plain[name] for name in _PROMPTS if name in plain):
        return f"if that is the prompt: --prompt-column {_shown(prompt)}"
    return (
        "say where the prompt is: --prompt-column NAME, --messages-column NAME or "
        "--template '… {{ NAME }} …'"
    )


def instead(column: str, *, names_prompt: bool) -> str:
    """Which option reads a column that has no effect; empty if none does, or nobody knows.

    :param names_prompt: an option says already where the prompt is
    """
    plain = column.lower().replace("-", "_")
    if plain in _SYSTEMS:
        return f"--system '{{{{ {column} }}}}' sends it"
    if names_prompt:
        return ""
    if plain in _CHATS:
        return f"--messages-column {_shown(column)} reads it"
    return f"--prompt-column {_shown(column)} reads it" if plain == "inputs" else ""


def missing_column(source: str, column: str, use: str, columns: Iterable[str]) -> str:
    """What to say of a column that was named and that the first rows don't have."""
    there = [*columns]
    close = difflib.get_close_matches(column, there, n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"the first rows of {source} have no column {column!r}, named for {use}{meant}; "
        f"their columns are {quoted(there) or 'none'}"
    )


def is_chat(value: object) -> bool:
    """True if it looks like the turns of a chat."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ({"role", "content"} <= first.keys() or "from" in first)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _first(names: Iterable[str]) -> str:
    return next(iter(names), "")


def _shown(name: str) -> str:
    return name if name.replace("_", "").isalnum() else repr(name)
