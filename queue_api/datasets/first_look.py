"""The first rows of an input, judged before anything is started."""

from __future__ import annotations

from queue_api.datasets.columns import Row, RowParser
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.formats.unreadable import LINE_BYTES, why_unreadable
from queue_api.datasets.layout.hints import missing_column
from queue_api.wire.errors import DatasetError, RequestError

__all__ = ["FirstLook"]

LOOK_AT_ROWS = 1000
LOOK_AT_BYTES = 8 * 2**20
"""Of what can be read only once so much is held at most, to be looked at."""


class FirstLook:
    """Looks for a row that can be read, and for the columns that the layout names."""

    def __init__(self, source: RowSource, parser: RowParser) -> None:
        self._source = source
        self._parser = parser
        self._missing = dict(parser.layout.named_columns)
        self._undefined = set(parser.template_columns)
        self._columns: dict[str, None] = {}
        self._seen: list[Row] = []
        self._first_lines: list[bytes | None] = []
        self._num_rows = self._num_bytes = 0
        self.how_read = ""
        """Where the first readable row has its prompt; empty if none was seen."""

    def take(self, record: Record) -> bool:
        """Look at the next row; True if there is nothing more to look for."""
        row = self._parser.parse(record)
        self._num_rows += 1
        self._num_bytes += record.num_bytes or len(record.raw or b"")
        for name in record.read:
            self._missing.pop(name, None)
            self._undefined.discard(name)
        if self._num_rows <= LOOK_AT_ROWS:
            self._columns |= dict.fromkeys(record.read)
        if not isinstance(row.request, RequestError):
            self.how_read = self.how_read or self._parser.how_read(record)
        elif len(self._seen) < LOOK_AT_ROWS:
            self._seen.append(row)
            self._first_lines.append(record.raw and record.raw[:LINE_BYTES])
        return bool(self.how_read) and not self._missing

    @property
    def is_enough(self) -> bool:
        """True if more rows wouldn't change the judgement, or can't be waited for."""
        is_much = self._num_rows >= LOOK_AT_ROWS
        is_named_wrong = self._missing or (self._undefined and not self.how_read)
        if is_named_wrong and self._columns:
            return is_much or not self._source.is_repeatable
        is_much = is_much or self._num_bytes >= LOOK_AT_BYTES
        return is_much and not self._source.is_repeatable

    def judge(self) -> None:
        """Say what is wrong with the rows.

        :raises DatasetError: they lack a column that was named, or none can be read
        """
        name = self._source.name
        if self._missing and self._columns:
            column, use = next(iter(self._missing.items()))
            raise DatasetError(missing_column(name, column, use, self._columns))
        if self._undefined and self._columns and not self.how_read:
            column = min(self._undefined)
            raise DatasetError(missing_column(name, column, "a template", self._columns))
        if self._seen and not self.how_read:
            raise DatasetError(
                why_unreadable(
                    name,
                    self._seen,
                    self._num_rows,
                    self._source.advice(self._first_lines),
                    knows_prompt=self._parser.layout.names_prompt,
                )
            )
