"""Record: a row as its file has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from queue_api.wire.errors import InvalidRequestError

__all__ = ["RawJson", "Record"]


class RawJson(str):
    """A value as JSON text, where Python's would be another: a decimal of many digits, or an
    object that has a key twice."""

    __slots__ = ()


@dataclass(slots=True)
class Record:
    """A row as its file has it, before anyone asks what its columns mean."""

    number: int = 0
    """Its line, row, … from 1, for messages; RowSource.place says what of. Grows from row to row;
    what is left out, as blank lines are, counts."""
    shown: dict[str, Any] = field(default_factory=dict)
    """The columns to write again: what JSON can say, or RawJson. What can't be written isn't among
    them."""
    read: dict[str, Any] = field(default_factory=dict)
    """The same as Python reads them."""
    ambiguous: frozenset[str] = frozenset()
    """Columns with an object that has a key twice."""
    error: InvalidRequestError | None = None
    """Why the row can't be answered; the columns are those that are fine."""
    raw: bytes | None = None
    """The row as the file has it, where that is text; None, too, for one that is too long."""
    num_bytes: int = 0
    """About how much memory it takes, where `raw` doesn't tell."""
    row: int | None = None
    """Its place among all rows, from 0, where that isn't its place among those that are read."""
