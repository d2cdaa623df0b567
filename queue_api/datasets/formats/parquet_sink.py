"""Parquet as an output: a folder of files that are read as one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from queue_api.datasets.formats.packages import import_pyarrow
from queue_api.datasets.formats.part_sink import PartSink

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ParquetSink"]

BATCH_ROWS = 8192


class ParquetSink(PartSink):
    """Files `part-00000.parquet` and so on, of one schema when the run is complete."""

    format = "parquet"
    suffix = ".parquet"

    @staticmethod
    def write_part(path: Path, table: pa.Table) -> None:
        from pyarrow import parquet

        parquet.write_table(table, path, compression="zstd")

    @staticmethod
    def read_part(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow
            wanted = None if columns is None else [n for n in columns if n in there.names]
            is_empty = True
            for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
                is_empty = False
                yield import_pyarrow(path.name).Table.from_batches([batch])
            if is_empty:
                yield file.read(columns=wanted)

    @staticmethod
    def schema_of(path: Path) -> pa.Schema:
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            return file.schema_arrow
