"""Which format an input is in: told by its content first, then by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

from queue_api.datasets.formats.arrow_source import ArrowSource
from queue_api.datasets.formats.byte_input import ByteInput, open_bytes
from queue_api.datasets.formats.byte_source import ByteSource
from queue_api.datasets.formats.compression import decompressed, name_inside
from queue_api.datasets.formats.csv_source import CsvSource, TsvSource
from queue_api.datasets.formats.data_files import local_files
from queue_api.datasets.formats.joined_source import JoinedSource
from queue_api.datasets.formats.json_source import JsonSource
from queue_api.datasets.formats.jsonl_source import JsonLinesSource
from queue_api.datasets.formats.object_source import Rows, is_table, source_of_object
from queue_api.datasets.formats.parquet_source import ParquetSource
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.remote_input import (
    RemoteInput,
    is_address,
    local_path,
    remote_files,
)
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.formats.text_encoding import start_in_utf8
from queue_api.datasets.formats.text_source import TextSource
from queue_api.wire.errors import ConfigurationError, DatasetError

__all__ = ["FORMATS", "FORMAT_NAMES", "Inputs", "is_files", "open_source"]

FORMATS: tuple[type[ByteSource], ...] = (
    ParquetSource,
    ArrowSource,
    TextSource,
    JsonSource,
    CsvSource,
)
"""What an input is compared with, in this order, before it is taken for JSON Lines."""
_NAMED: dict[str, type[ByteSource]] = {
    "jsonl": JsonLinesSource,
    "json": JsonSource,
    "csv": CsvSource,
    "tsv": TsvSource,
    "parquet": ParquetSource,
    "arrow": ArrowSource,
    "txt": TextSource,
}
FORMAT_NAMES = tuple(_NAMED)
"""What `format` may be."""

Inputs = Path | str | Sequence[Path | str]
"""Files, patterns in quotes, folders, addresses, or, alone, a pipe or `-`."""


def open_source(
    inputs: Inputs | Rows,
    *,
    format: str | None = None,  # noqa: A002 - as on the command line
    output: Path | str = "",
) -> RowSource:
    """The rows of files, one after the other, of a pipe or, as `-`, of the standard input; or rows
    that are Python's.

    :param format: one of FORMAT_NAMES; None: what the content of each is
    :param output: what is written; where a pattern or folder has it, too, it is left out
    :raises DatasetError: they can't be opened
    :raises ConfigurationError: there is no such format
    """
    if format is not None and format not in _NAMED:
        raise ConfigurationError(f"no format {format!r}: there are {', '.join(FORMAT_NAMES)}")
    if is_files(inputs):
        return _open_files(inputs, format, str(output))
    if format is not None:
        raise ConfigurationError("'format' is of files; the input is rows")
    return source_of_object(inputs)


def _open_files(inputs: Inputs, format: str | None, output: str) -> RowSource:  # noqa: A002
    given = [inputs] if isinstance(inputs, Path | str) else list(inputs)
    names = [local_path(str(each)) for each in given]
    files = [file for name in names for file in _files_of(name, output)]
    if len(files) == 1:
        return _open_one(files[0], format)
    if not files:
        raise DatasetError("no input is given")
    _check_many(files)
    waits = any(map(is_address, files))
    return JoinedSource(" ".join(names), files, lambda file: _open_one(file, format), waits=waits)


def is_files(inputs: Inputs | Rows) -> TypeGuard[Inputs]:
    """Whether they are names, and not rows themselves."""
    if isinstance(inputs, Path | str):
        return True
    if not isinstance(inputs, Sequence) or isinstance(inputs, bytes):
        return False
    return not is_table(inputs) and all(isinstance(each, Path | str) for each in inputs)


def _files_of(name: str, output: str) -> list[str]:
    if is_address(name):
        return remote_files(name)
    return [name] if name == "-" else local_files(name, output)


def _check_many(files: Sequence[str]) -> None:
    """:raises DatasetError: one can't be read beside others"""
    seen = set[str]()
    for file in files:
        if file in seen:
            raise DatasetError(f"{file} is given twice")
        seen.add(file)
        if not is_address(file) and (file == "-" or not Path(file).is_file()):
            is_there = file == "-" or Path(file).exists()
            told = "it can be read only once, give it alone" if is_there else "no such file"
            raise DatasetError(f"can't read {file} as one of several inputs: {told}")


def _open_one(name: str, format: str | None) -> RowSource:  # noqa: A002
    data = RemoteInput(name) if is_address(name) else open_bytes(name)
    try:
        return _source_of(data, format) if data.is_repeatable else PipeSource(data, format)
    except BaseException:
        data.close()
        raise


class PipeSource(ByteSource):
    """An input whose first bytes, and so the format, may be long in coming."""

    def __init__(self, data: ByteInput, format: str | None) -> None:  # noqa: A002
        super().__init__(data)
        self._format = format
        self._known: RowSource | None = None

    def records(self) -> Iterator[Record]:
        self._known = _source_of(self.data, self._format)
        yield from self._known.records()

    def advice(self, lines: Sequence[bytes | None]) -> str:
        return "" if self._known is None else self._known.advice(lines)

    def place(self, number: int) -> str:
        return super().place(number) if self._known is None else self._known.place(number)


def _source_of(packed: ByteInput, format: str | None) -> RowSource:  # noqa: A002
    data = decompressed(packed)
    if format is not None:
        return _NAMED[format](data)
    start, name = start_in_utf8(data.start()), name_inside(data.name)
    kinds = (kind for kind in FORMATS if kind.fits(start, name))
    return next(kinds, JsonLinesSource)(data)
