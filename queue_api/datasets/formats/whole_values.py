"""What of a row's values no table can say as it is."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from queue_api.datasets.formats.json_record import dump_row
from queue_api.datasets.formats.record import RawJson
from queue_api.datasets.formats.row_sink import MadeRow

__all__ = ["line_of_one_type"]


def line_of_one_type(row: MadeRow, decimals: Collection[str] = ()) -> bytes:
    """The row as a line; an object that has a key twice is a text in it, for a table would lose one
    of them, and so is a number in a column of decimals, for the digits."""
    texts = {
        name: str(value)
        for name, value in row.columns.items()
        if isinstance(value, RawJson) and (name in decimals or _has_twice(value))
    }
    return dump_row({**row.columns, **texts}) if texts else row.line


def _has_twice(text: str) -> bool:
    found = False

    def pairs(items: list[tuple[str, Any]]) -> None:
        nonlocal found
        found = found or len(dict(items)) != len(items)

    json.loads(text, object_pairs_hook=pairs)
    return found
