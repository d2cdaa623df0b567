"""Arrow's IPC formats: the file (Feather, too) and the stream, which `datasets` writes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from queue_api.datasets.formats.arrow_records import (
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

__all__ = ["ArrowSource"]

_FILE, _STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_NO_MORE = _STREAM + bytes(4)
"""What a whole stream ends with."""


class ArrowSource(ByteSource):
    """Record batches, one at a time; how large they are is up to who wrote them."""

    unit = "row"

    @classmethod
    def fits(cls, start: bytes, name: str) -> bool:  # noqa: ARG003
        return start.startswith((_FILE, _STREAM))

    def records(self) -> Iterator[Record]:
        before = 0
        for batch in self._batches():
            yield from records_of(batch, before)
            before += batch.num_rows

    def count(self) -> int | None:
        return sum(batch.num_rows for batch in self._batches()) if self.is_repeatable else None

    def schema(self) -> pyarrow.Schema | None:
        if not self.is_repeatable:
            return None
        with self.data.file() as file, self._told(0):
            return self._open(file)[0]

    def _batches(self) -> Iterator[Any]:
        """:raises DatasetError: it is damaged or cut off, after all that can be read"""
        before = 0
        with self.data.file() as file:
            with self._told(before):
                schema, batches = self._open(file)
                check_names(schema, self.name)
            while True:
                with self._told(before):
                    batch = next(batches, None)
                    if batch is not None:
                        check_batch(batch)
                if batch is None:
                    break
                yield batch
                before += batch.num_rows
            if not _has_end(file):
                raise DatasetError(
                    f"{self.name} is an Arrow stream without its end, as of a file that was cut "
                    f"off; its {before:,} rows were read"
                )

    def _open(self, file: BinaryIO) -> tuple[Any, Iterator[Any]]:
        ipc = import_pyarrow(self.name).ipc
        if file.read(len(_FILE)) != _FILE:
            file.seek(0)
            stream = ipc.open_stream(file)
            return stream.schema, iter(stream)
        file.seek(0)
        reader = ipc.open_file(file)
        places = range(reader.num_record_batches)
        return reader.schema, (reader.get_batch(place) for place in places)

    @contextmanager
    def _told(self, before: int) -> Iterator[None]:
        """Tells of what Arrow finds wrong as of an error of ours."""
        damage = signs_of_damage(import_pyarrow(self.name))
        try:
            yield
        except damage as error:
            raise DatasetError(
                f"{self.name} is damaged Arrow or was cut off: {str(error).partition(chr(10))[0]}; "
                f"the {before:,} rows before that place were read"
            ) from None


def _has_end(file: BinaryIO) -> bool:
    """True of a file, which can't be opened without its end, and of a stream that has one."""
    file.seek(0)
    if file.read(len(_FILE)) == _FILE:
        return True
    file.seek(-len(_NO_MORE), io.SEEK_END)
    return file.read() == _NO_MORE
