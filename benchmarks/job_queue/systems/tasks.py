"""The work, as each library wants it."""

from __future__ import annotations

from typing import Any


def first_word(prompt: str) -> str:
    return prompt.split(None, 1)[0]


async def first_word_in_context(_: dict[str, Any], prompt: str) -> str:
    """For arq and saq, which pass a context first."""
    return first_word(prompt)
