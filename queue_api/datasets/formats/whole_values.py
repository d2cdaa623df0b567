"""What of a row's values no table can say as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from queue_api.datasets.formats.record import RawJson

__all__ = ["in_one_type"]


def in_one_type(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns; an object that has a key twice is a text, for a table would lose one of them."""
    raw = {name for name, value in columns.items() if isinstance(value, RawJson)}
    if not raw:
        return columns
    return {
        name: str(value) if name in raw and _has_twice(value) else value
        for name, value in columns.items()
    }


def _has_twice(text: str) -> bool:
    found = False

    def pairs(items: list[tuple[str, Any]]) -> None:
        nonlocal found
        found = found or len(dict(items)) != len(items)

    json.loads(text, object_pairs_hook=pairs)
    return found
