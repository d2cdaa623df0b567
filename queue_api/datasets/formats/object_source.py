"""Rows that are Python's: mappings, one after the other, and tables."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from queue_api.datasets.formats.arrow_records import check_names, records_of
from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.datasets.formats.packages import import_pyarrow
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource
from queue_api.wire.errors import DatasetError, InvalidRequestError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Rows", "is_table", "library_of", "source_of_object"]

Rows = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]
"""Mappings with a row's columns. Tables of pandas, Polars, Arrow and `datasets` are rows, too."""


_TABLES = {
    "pandas": ("DataFrame",),
    "polars": ("DataFrame", "LazyFrame"),
    "pyarrow": ("Table", "RecordBatch"),
    "datasets": ("Dataset",),
}
"""By library: its tables. Looked up by name, so that none has to be imported."""


def is_table(given: object) -> bool:
    """Whether it is a table that Arrow can take."""
    return bool(library_of(given))


def source_of_object(given: object) -> RowSource:
    """The rows of something that isn't a name of files.

    :raises DatasetError: it has no rows that we know
    """
    if is_table(given):
        return _TableSource(_arrow_of(given))
    if isinstance(given, AsyncIterable):
        return _MappingsSource(_Awaited(given))
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        return _MappingsSource(given)
    raise DatasetError(
        f"no rows in {type(given).__name__}: give names of files, mappings or a table"
    )


class _ObjectSource(RowSource):
    """What no bytes stand behind."""

    unit = "row"

    @property
    def name(self) -> str:
        return "rows"

    @property
    def is_repeatable(self) -> bool:
        return True

    @property
    def waits(self) -> bool:
        return False

    def identity(self) -> list[str]:
        """All of the content: nothing else tells of an object."""
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records():
            digest.update(repr((record.read, record.error and str(record.error))).encode())
        return [digest.hexdigest()]

    def is_same_file(self, info: os.stat_result) -> bool:  # noqa: ARG002
        return False

    def interrupt(self) -> None:
        """Nothing is waited for."""

    def close(self) -> None:
        """There is nothing to let go of."""


class _TableSource(_ObjectSource):
    def __init__(self, table: pyarrow.Table) -> None:
        super().__init__()
        check_names(table.schema, self.name)
        self._table = table

    def records(self) -> Iterator[Record]:
        before = 0
        for batch in self._table.to_batches():
            yield from records_of(batch, before)
            before += batch.num_rows

    def count(self) -> int:
        return int(self._table.num_rows)

    def schema(self) -> pyarrow.Schema:
        return self._table.schema


class _MappingsSource(_ObjectSource):
    """Mappings; a list or the like can be read again, others once, in a thread of their own."""

    def __init__(self, rows: Iterable[Any]) -> None:
        super().__init__()
        self._rows = rows

    @property
    def is_repeatable(self) -> bool:
        return isinstance(self._rows, AbstractSequence)

    @property
    def waits(self) -> bool:
        return not self.is_repeatable

    def records(self) -> Iterator[Record]:
        reader = JsonRecordReader()
        rows = iter(self._rows)
        number = 0
        while True:
            if self.waits:
                self._before_waiting()  # nobody knows how long the next one takes
            try:
                row = next(rows)
            except StopIteration:
                return
            number += 1
            yield _record(row, number, reader)

    def identity(self) -> list[str]:
        return super().identity() if self.is_repeatable else []

    @property
    def can_interrupt(self) -> bool:
        return isinstance(self._rows, _Awaited) or self.is_repeatable

    def interrupt(self) -> None:
        if isinstance(self._rows, _Awaited):
            self._rows.interrupt()


class _Awaited:
    """What an event loop's iterable gives, for another thread, which waits for it."""

    def __init__(self, rows: AsyncIterable[Any]) -> None:
        self._rows: AsyncIterator[Any] = aiter(rows)
        self._loop = asyncio.get_running_loop()
        self._next: Future[Any] | None = None
        self._is_interrupted = False

    def __iter__(self) -> Iterator[Any]:
        while not self._is_interrupted:
            self._next = asyncio.run_coroutine_threadsafe(_step(self._rows), self._loop)
            try:
                yield self._next.result()
            except (StopAsyncIteration, CancelledError):
                return

    def interrupt(self) -> None:
        self._is_interrupted = True
        if self._next is not None:
            self._next.cancel()


async def _step(rows: AsyncIterator[Any]) -> Any:
    return await anext(rows)


def _record(row: object, number: int, reader: JsonRecordReader) -> Record:
    if not isinstance(row, Mapping):
        told = f"not a mapping but {type(row).__name__}"
        return Record(number, error=InvalidRequestError(told))
    try:
        return reader.read(json.dumps(dict(row)).encode(), number)
    except (TypeError, ValueError, RecursionError):
        pass
    record = Record(number)
    for name, value in row.items():
        try:
            part = reader.read(json.dumps({name: value}).encode(), number)
        except (TypeError, ValueError, RecursionError) as error:
            told = f"column {name!r:.80} can't be written as JSON: {error}"
            record.error = record.error or InvalidRequestError(told)
        else:
            record.shown |= part.shown
            record.read |= part.read
    return record


def library_of(given: object) -> str:
    """The library whose table it is; empty if it is none."""
    library = type(given).__module__.partition(".")[0]
    return library if type(given).__name__ in _TABLES.get(library, ()) else ""


def _arrow_of(given: Any) -> pyarrow.Table:
    """:raises DatasetError: a column has values of several types"""
    pa = import_pyarrow("a table")
    library = library_of(given)
    try:
        if library == "pandas":
            return pa.Table.from_pandas(given, preserve_index=False)
        if library == "polars":
            return (given.collect() if hasattr(given, "collect") else given).to_arrow()
        if library == "datasets":
            return given.with_format("arrow")[:]
        return given if isinstance(given, pa.Table) else pa.Table.from_batches([given])
    except pa.ArrowException as error:
        raise DatasetError(f"the {library} table can't be read: {error}") from None
