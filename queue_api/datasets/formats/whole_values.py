"""What of a row's values no table can say as it is."""

from __future__ import annotations

import json
from typing import Any

from queue_api.datasets.formats.json_record import dump_row
from queue_api.datasets.formats.record import RawJson
from queue_api.datasets.formats.row_sink import MadeRow

__all__ = ["line_of_one_type"]


def line_of_one_type(row: MadeRow) -> bytes:
    """The row as a line; an object that has a key twice is a text in it, for a table would lose one
    of them."""
    twice = {
        name: str(value)
        for name, value in row.columns.items()
        if isinstance(value, RawJson) and _has_twice(value)
    }
    return dump_row({**row.columns, **twice}) if twice else row.line


def _has_twice(text: str) -> bool:
    found = False

    def pairs(items: list[tuple[str, Any]]) -> None:
        nonlocal found
        found = found or len(dict(items)) != len(items)

    json.loads(text, object_pairs_hook=pairs)
    return found
