"""Which format an input is in: told by its content first, then by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from queue_api.datasets.formats.byte_input import ByteInput, open_bytes
from queue_api.datasets.formats.compression import decompressed, name_inside
from queue_api.datasets.formats.csv_source import CsvSource
from queue_api.datasets.formats.json_source import JsonSource
from queue_api.datasets.formats.jsonl_source import JsonLinesSource
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.formats.text_encoding import start_in_utf8
from queue_api.datasets.formats.text_source import TextSource

__all__ = ["FORMATS", "open_source"]

FORMATS: tuple[type[RowSource], ...] = (TextSource, JsonSource, CsvSource)
"""What an input is compared with, in this order, before it is taken for JSON Lines."""


def open_source(path: Path | str) -> RowSource:
    """The rows of a file, a pipe or, as `-`, the standard input.

    :raises DatasetError: it can't be opened
    """
    data = open_bytes(path)
    try:
        return _source_of(data) if data.is_repeatable else PipeSource(data)
    except BaseException:
        data.close()
        raise


class PipeSource(RowSource):
    """An input whose first bytes, and so the format, may be long in coming."""

    _known: RowSource | None = None

    @classmethod
    def fits(cls, start: bytes, name: str) -> bool:  # noqa: ARG003
        return False

    def records(self) -> Iterator[Record]:
        self._known = _source_of(self.data)
        yield from self._known.records()

    def advice(self, lines: Sequence[bytes | None]) -> str:
        return "" if self._known is None else self._known.advice(lines)

    def place(self, number: int) -> str:
        return super().place(number) if self._known is None else self._known.place(number)


def _source_of(packed: ByteInput) -> RowSource:
    data = decompressed(packed)
    start, name = start_in_utf8(data.start()), name_inside(data.name)
    kinds = (kind for kind in FORMATS if kind.fits(start, name))
    return next(kinds, JsonLinesSource)(data)
