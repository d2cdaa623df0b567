"""Plain text: a prompt to a line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from queue_api.datasets.formats.byte_source import ByteSource
from queue_api.datasets.formats.csv_source import is_table
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.text_lines import MAX_LINE_BYTES, lines_of
from queue_api.wire.errors import InvalidRequestError

__all__ = ["TextSource"]

_JSON = re.compile(rb'\s*(\{\s*["}]|\[\s*[{\]])')


class TextSource(ByteSource):
    """Each line is the column `prompt`; blank ones are left out."""

    @classmethod
    def fits(cls, start: bytes, name: str) -> bool:
        """By its name alone; JSON or a table that is called so isn't meant to be asked by lines."""
        is_text = name.lower().endswith(".txt") and b"\0" not in start
        return is_text and not _JSON.match(start) and not is_table(start)

    def records(self) -> Iterator[Record]:
        for number, line in lines_of(self.data.blocks()):
            yield _record(number, line)

    def count(self) -> int | None:
        return sum(1 for _ in lines_of(self.data.blocks())) if self.is_repeatable else None


def _record(number: int, line: bytes | None) -> Record:
    if line is None:
        error = InvalidRequestError(f"longer than {MAX_LINE_BYTES} bytes")
        return Record(number, error=error)
    try:
        columns = {"prompt": line.removesuffix(b"\r").decode()}
    except UnicodeDecodeError as wrong:
        return Record(number, error=InvalidRequestError(f"not text: {wrong}"), raw=line)
    return Record(number, columns, columns, raw=line)
