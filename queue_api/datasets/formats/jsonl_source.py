"""JSON Lines: an object to a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from queue_api.datasets.formats.byte_source import ByteSource
from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.text_lines import lines_of
from queue_api.datasets.formats.unreadable import (
    check_format,
    list_in_object,
    what_text_is,
)

__all__ = ["JsonLinesSource"]


class JsonLinesSource(ByteSource):
    """What is in no other format counts as JSON Lines, each line of which may be wrong."""

    def records(self) -> Iterator[Record]:
        check_format(self.data.start(), self.name)
        reader = JsonRecordReader()
        for number, line in lines_of(self.data.blocks()):
            yield reader.read(line, number)

    def advice(self, lines: Sequence[bytes | None]) -> str:
        texts = [line for line in lines if line is not None]
        if texts:
            return what_text_is(self.name, texts)
        return list_in_object(self.name, self.data.start()) if self.is_repeatable else ""

    def count(self) -> int | None:
        return sum(1 for _ in lines_of(self.data.blocks())) if self.is_repeatable else None
