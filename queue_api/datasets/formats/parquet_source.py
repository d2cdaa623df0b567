"""Parquet: a table in row groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from queue_api.datasets.formats.arrow_records import (
    MOST_ROWS,
    check_batch,
    check_names,
    records_of,
    signs_of_damage,
)
from queue_api.datasets.formats.byte_source import ByteSource
from queue_api.datasets.formats.packages import import_pyarrow
from queue_api.datasets.formats.record import Record
from queue_api.wire.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["ParquetSource"]

BATCH_BYTES = 4 * 2**20
READ_BYTES = 2**18
"""Of each column so much is read at a time, not all that a row group has of it."""


class ParquetSource(ByteSource):
    """Row groups a bounded part at a time, however large they are."""

    unit = "row"

    @classmethod
    def fits(cls, start: bytes, name: str) -> bool:  # noqa: ARG003
        return start.startswith(b"PAR1")

    def records(self) -> Iterator[Record]:
        damage = signs_of_damage(import_pyarrow(self.name))
        before = 0
        with self._file() as file:
            batches = file.iter_batches(batch_size=_rows_at_a_time(file.metadata))
            while True:
                try:
                    batch = next(batches, None)
                    if batch is not None:
                        check_batch(batch)
                except damage as error:
                    raise DatasetError(
                        f"{self.name} is damaged Parquet: {_first_line(error)}; the {before:,} "
                        "rows before that place were read"
                    ) from None
                if batch is None:
                    return
                yield from records_of(batch, before)
                before += batch.num_rows

    def count(self) -> int | None:
        if not self.is_repeatable:
            return None
        with self._file() as file:
            return int(file.metadata.num_rows)

    def schema(self) -> pyarrow.Schema | None:
        if not self.is_repeatable:
            return None
        with self._file() as file:
            return file.schema_arrow

    @contextmanager
    def _file(self) -> Iterator[Any]:
        """:raises DatasetError: it isn't whole"""
        lib = import_pyarrow(self.name)
        with self.data.file() as bytes_:
            try:
                file = lib.parquet.ParquetFile(bytes_, buffer_size=READ_BYTES, pre_buffer=False)
                check_names(file.schema_arrow, self.name)
            except signs_of_damage(lib) as error:
                raise DatasetError(
                    f"{self.name} isn't whole Parquet, whose end says where its rows are: "
                    f"{_first_line(error)}"
                ) from None
            with file:
                yield file


def _rows_at_a_time(metadata: Any) -> int:
    groups = (metadata.row_group(place) for place in range(metadata.num_row_groups))
    each = sum(int(group.total_byte_size) for group in groups) // max(1, int(metadata.num_rows))
    return max(1, min(MOST_ROWS, BATCH_BYTES // max(1, each)))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
