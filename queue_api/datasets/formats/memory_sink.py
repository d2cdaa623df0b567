"""Rows that are given back instead of being written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.datasets.formats.object_source import library_of
from queue_api.datasets.formats.packages import import_pyarrow
from queue_api.datasets.formats.row_sink import (
    MadeRow,
    OutputFile,
    RowSink,
    WrittenRow,
    written_row,
)

__all__ = ["MemorySink"]


class MemorySink(RowSink):
    """Holds rows as lines of JSON; what dies with the process is lost."""

    format = "memory"
    is_durable = False

    def __init__(self) -> None:
        super().__init__("rows")
        self._lines: dict[int, bytes] = {}

    def given_back(self, like: object) -> Any:
        """The rows in the order of the input: a table of the kind of `like`, else a list of dicts.

        :raises MissingExtraError: a table needs pyarrow
        """
        rows = [_columns(self._lines[index]) for index in sorted(self._lines)]
        library = library_of(like)
        if library == "pandas":
            import pandas

            return pandas.DataFrame(rows)
        if library == "polars":
            import polars

            return polars.DataFrame(rows, infer_schema_length=None)
        if library == "datasets":
            import datasets

            return datasets.Dataset.from_list(rows)
        if library == "pyarrow":
            return import_pyarrow("a table").Table.from_pylist(rows)
        return rows

    def written(self) -> Iterator[WrittenRow]:
        found = (written_row(_columns(line)) for line in self._lines.values())
        return (row for row in found if row is not None)

    def finish(self) -> None:
        """It is in its last form."""

    def files(self) -> list[OutputFile]:
        return []

    def close(self, *, keep_empty: bool = True) -> None:
        """The rows stay until they are given back."""

    def info(self) -> os.stat_result:
        return Path(os.devnull).stat()  # which no input is

    def _write(self, rows: Sequence[MadeRow]) -> list[None]:
        self._lines |= {row.index: row.line for row in rows}
        return [None] * len(rows)

    def _drop(self, is_unwanted: Callable[[int], bool]) -> None:
        kept = [row for row in self.written() if not is_unwanted(row.index)]
        lines = {row.index: self._lines[row.index] for row in kept}
        self._forget_rows()
        for row in kept:
            self._note_found(row, None)
        self._lines = lines


def _columns(line: bytes) -> dict[str, Any]:
    return JsonRecordReader().read(line).read
