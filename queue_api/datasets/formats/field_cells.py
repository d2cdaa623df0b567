"""Cells of tables in text that are fields of a request: numbers, lists, … of their text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.wire.sampling import SAMPLING_FIELDS
from queue_api.wire.schemas import GenerationRequest

__all__ = ["FieldReader"]

_PLAIN = frozenset({"id", "prompt", "metadata"})
"""Text whatever it looks like."""
_TEXT_OR_LIST = frozenset({"stop", "stop_strings", "bad_words"})
"""A list only if it looks like one."""
_FIELDS = frozenset({*GenerationRequest.model_fields, *SAMPLING_FIELDS}) - _PLAIN
_CONSTANTS = {"true": True, "false": False}


class FieldReader:
    """Reads the fields among the columns of rows of texts."""

    def __init__(self, columns: list[str]) -> None:
        self._fields = [name for name in columns if name in _FIELDS]
        self._reader = JsonRecordReader()

    def read(self, cells: dict[str, str | None]) -> dict[str, Any]:
        """The same columns, with the fields' values; what can't be read as one stays a text."""
        if not self._fields:
            return cells
        return {**cells, **{name: self._value(name, cells) for name in self._fields}}

    def _value(self, name: str, cells: Mapping[str, str | None]) -> Any:
        cell = cells[name]
        text = (cell or "").strip()
        if not text or (name in _TEXT_OR_LIST and text[0] != "["):
            return cell
        if text.lower() in _CONSTANTS:
            return _CONSTANTS[text.lower()]
        found = self._reader.read(f"{{{json.dumps(name)}: {text}}}".encode(errors="replace"))
        if found.error is not None or found.ambiguous or found.read.keys() != {name}:
            return cell
        value = found.read[name]
        # a column of integers that lacks some is one of decimals to many who write tables
        return int(value) if isinstance(value, float) and value.is_integer() else value
