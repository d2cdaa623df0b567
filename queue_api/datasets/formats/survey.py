"""The rows of an output as it lies there, right or wrong: nothing is cut off, none is refused."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from queue_api.datasets.formats.arrow_records import records_of
from queue_api.datasets.formats.datasets_sink import DatasetsSink
from queue_api.datasets.formats.digests import content_digest, line_digest, short_of
from queue_api.datasets.formats.errors_sink import ErrorRowsSink
from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.datasets.formats.jsonl_sink import JsonLinesSink
from queue_api.datasets.formats.line_codec import DamagedMemberError, codec_of
from queue_api.datasets.formats.openai_sink import BatchLinesSink
from queue_api.datasets.formats.output_columns import OUTPUT_COLUMNS
from queue_api.datasets.formats.packages import import_pyarrow
from queue_api.datasets.formats.parquet_sink import ParquetSink
from queue_api.datasets.formats.part_sink import LEDGER_COLUMNS, PartSink
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_sink import written_row
from queue_api.wire.errors import DatasetError

__all__ = ["Fault", "SeenFile", "SeenRow", "survey", "written_records"]

_LINES: Mapping[str, type[JsonLinesSink]] = {
    kind.format: kind for kind in (JsonLinesSink, BatchLinesSink, ErrorRowsSink)
}
_PARTS: Mapping[str, type[PartSink]] = {kind.format: kind for kind in (ParquetSink, DatasetsSink)}


@dataclass(frozen=True)
class SeenRow:
    """A row that can be read."""

    index: int
    digest: int
    place: str


@dataclass(frozen=True)
class SeenFile:
    """A file, behind its rows."""

    name: str
    sha256: str
    digest_is_of_all: bool
    """Whether the rows' digests are of all that is in it."""


@dataclass(frozen=True)
class Fault:
    """Something that isn't a row and isn't in its place."""

    what: str


def survey(output_format: str, path: Path) -> Iterator[SeenRow | SeenFile | Fault]:
    """What there is of an output.

    :raises DatasetError: it can't be read at all
    """
    try:
        if output_format in _LINES:
            yield from _lines(_LINES[output_format], path)
        else:
            yield from _parts(_PARTS[output_format], path)
    except OSError as error:
        raise DatasetError(f"can't read {path}: {error.strerror or error}") from None


def _lines(kind: type[JsonLinesSink], path: Path) -> Iterator[SeenRow | SeenFile | Fault]:
    number, good, held = 0, 0, list[tuple[int, bytes]]()
    with path.open("rb") as file:
        try:
            for item in codec_of(path.name).read(file):
                if isinstance(item, int):
                    good = item
                    for place, line in held:
                        yield _seen(kind, line, f"line {place} of {path.name}")
                    held.clear()
                else:
                    number += 1
                    held.append((number, item))
        except DamagedMemberError as error:
            yield Fault(f"{path.name} is damaged behind byte {error.offset}")
        else:
            if held:
                yield Fault(f"line {held[0][0]} of {path.name} is torn")
            elif good < path.stat().st_size:
                yield Fault(f"{path.name} is torn behind byte {good}")
        file.seek(0)
        yield SeenFile(path.name, hashlib.file_digest(file, "sha256").hexdigest(), True)


def _seen(kind: type[JsonLinesSink], line: bytes, place: str) -> SeenRow | Fault:
    found = kind.parse(line)
    if found is None:
        return Fault(f"{place} isn't a row that batchmill wrote")
    return SeenRow(found.index, line_digest(line), place)


def _parts(kind: type[PartSink], folder: Path) -> Iterator[SeenRow | SeenFile | Fault]:
    refusals = (import_pyarrow(folder.name).ArrowException, ValueError, KeyError, OSError)
    for path in sorted(entry for entry in folder.iterdir() if kind.is_part(entry.name)):
        try:
            for table in kind.read_part(path, LEDGER_COLUMNS):
                table.validate(full=True)  # what is damaged mustn't be followed to anywhere
                for row in table.to_pylist():
                    found = written_row(row)
                    if found is None:
                        yield Fault(f"{path.name} has a row that batchmill didn't write")
                        continue
                    digest = short_of(content_digest(found.index, row))
                    yield SeenRow(found.index, digest, path.name)
        except refusals as error:
            yield Fault(f"{path.name} can't be read: {str(error).splitlines()[0]}")
        with path.open("rb") as file:
            yield SeenFile(path.name, hashlib.file_digest(file, "sha256").hexdigest(), False)


def written_records(
    output_format: str, path: Path, wanted: Container[int]
) -> Iterator[tuple[int, Record]]:
    """Rows of an output, as far as they can be read: number and columns; of errors apart, those of
    the input, too.

    :raises DatasetError: it can't be read at all
    """
    try:
        if output_format in _LINES:
            yield from _line_records(_LINES[output_format], path, wanted)
        else:
            yield from _part_records(_PARTS[output_format], path, wanted)
    except OSError as error:
        raise DatasetError(f"can't read {path}: {error.strerror or error}") from None


def _line_records(
    kind: type[JsonLinesSink], path: Path, wanted: Container[int]
) -> Iterator[tuple[int, Record]]:
    reader = JsonRecordReader()
    with path.open("rb") as file, contextlib.suppress(DamagedMemberError):
        for line in codec_of(path.name).read(file):
            found = None if isinstance(line, int) else kind.parse(line)
            if isinstance(line, int) or found is None or found.index not in wanted:
                continue
            record = reader.read(line)
            if not found.has_input:  # the columns are elsewhere in the line
                record.shown = record.read = dict(found.columns)
            elif isinstance(given := record.read.get("input"), dict) and kind is ErrorRowsSink:
                own = {n: value for n, value in record.read.items() if n in OUTPUT_COLUMNS}
                record.shown = record.read = {**given, **own}
            yield found.index, record


def _part_records(
    kind: type[PartSink], folder: Path, wanted: Container[int]
) -> Iterator[tuple[int, Record]]:
    refusals = (import_pyarrow(folder.name).ArrowException, ValueError, KeyError)
    for path in sorted(entry for entry in folder.iterdir() if kind.is_part(entry.name)):
        with contextlib.suppress(*refusals):
            for table in kind.read_part(path):
                table.validate(full=True)
                for batch in table.to_batches():
                    for record in records_of(batch, 0):
                        found = written_row(record.read)
                        if found is not None and found.index in wanted:
                            yield found.index, record
