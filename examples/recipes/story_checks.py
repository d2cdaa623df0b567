"""Checks for stories.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def names_both(text: str, columns: Mapping[str, Any]) -> str | None:
    """A reason if the story leaves one of its words out."""
    for name in ("word", "other"):
        if columns[name].lower() not in text.lower():
            return f"it doesn't mention {columns[name].lower()}"
    return None
