"""CSV: a table in text, its columns' names in the first row."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from queue_api.datasets.formats.byte_source import ByteSource
from queue_api.datasets.formats.compression import name_inside
from queue_api.datasets.formats.field_cells import FieldReader
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.text_encoding import start_in_utf8, utf8_blocks
from queue_api.datasets.formats.text_lines import MAX_LINE_BYTES
from queue_api.wire.errors import DatasetError, InvalidRequestError

__all__ = ["CsvSource", "TsvSource", "is_table"]

_SEPARATORS = ",\t;|"
_SEPARATOR_OF = {".tsv": "\t", ".tab": "\t", ".psv": "|"}
_NAME = re.compile(r"\w([\w .:/()#-]{0,62}[\w.)])?")
"""What the name of a column looks like, where nothing else says that it is one."""
_ROWS_LOOKED_AT = 5


class CsvSource(ByteSource):
    """Rows of cells between commas, tabs, semicolons or bars, quoted by `"` where need be.

    Cells are texts, ids, too; an empty one is null. Those of a request's fields are read as JSON.
    """

    separator = ""
    """What parts cells; empty: what the first row says."""

    @classmethod
    def fits(cls, start: bytes, name: str) -> bool:
        if start.lstrip()[:1] in (b"{", b"[", b"") or b"\0" in start:
            return False
        return name.lower().endswith((".csv", ".tsv", ".tab", ".psv")) or is_table(start)

    def records(self) -> Iterator[Record]:
        rows = self._rows()
        header = next(rows, None)
        if header is None:
            return
        names = self._names(header)
        fields = FieldReader(names)
        for row in rows:
            if row.wrong or len(row.cells) != len(names):
                yield row.refused(len(names))
                continue
            cells = {name: cell or None for name, cell in zip(names, row.cells, strict=True)}
            yield Record(row.number, cells, fields.read(cells), num_bytes=row.size)

    def count(self) -> int | None:
        return max(0, sum(1 for _ in self._rows()) - 1) if self.is_repeatable else None

    def _names(self, header: _Row) -> list[str]:
        """:raises DatasetError: they don't name each column"""
        if header.wrong:
            raise DatasetError(f"can't read the names of columns in {self.name}: {header.wrong}")
        if twice := [name for name in header.cells if header.cells.count(name) > 1]:
            raise DatasetError(
                f"{self.name} has the column {twice[0]!r:.80} twice: give each a name of its own"
            )
        return header.cells

    def _rows(self) -> Iterator[_Row]:
        separator = self.separator or _separator(start_in_utf8(self.data.start()), self.name)
        # the limit is the process's: it must hold what ours lets through
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        lines = _Lines(self.data.blocks(), self.name)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        while True:
            number = lines.begin()
            cells, wrong = list[str](), ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if lines.have_ended:
                    raise lines.never_closed() from None
                wrong = f"not CSV: {error}"
            if wrong or lines.wrong or any(cells):
                yield _Row(number, cells, lines.wrong or wrong, lines.taken)


class TsvSource(CsvSource):
    """The same with tabs."""

    separator = "\t"


class _Row:
    """A row as it was found."""

    def __init__(self, number: int, cells: list[str], wrong: str, lines: list[str]) -> None:
        self.number, self.cells, self.wrong = number, cells, wrong
        self._lines = lines

    @property
    def size(self) -> int:
        return sum(map(len, self._lines))

    def refused(self, num_columns: int) -> Record:
        """A row that can't be read."""
        told = self.wrong or f"has {len(self.cells)} cells, where the header has {num_columns}"
        if len(self._lines) > 1:
            told = f"(with the {len(self._lines) - 1} lines after it) {told}"
        raw = "".join(self._lines).encode(errors="surrogateescape")
        return Record(self.number, error=InvalidRequestError(told), raw=raw)


class _Lines(Iterator[str]):
    """Lines with their ends for csv.reader; remembers those of the current row."""

    def __init__(self, blocks: Iterable[bytes], name: str) -> None:
        self._lines = _lines(blocks)
        self._name = name
        self._number = 0
        self._first = 1
        self._size = 0
        self.have_ended = False
        self.wrong = ""
        """Why the row can't be read."""
        self.taken: list[str] = []

    def begin(self) -> int:
        """Begin a row; returns the number of its first line."""
        self.taken, self.wrong, self._size = [], "", 0
        self._first = self._number + 1
        return self._first

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.have_ended = True
            raise StopIteration
        self._number += 1
        self._size += len(line)
        if self._size > MAX_LINE_BYTES:
            if self.taken:
                raise self.never_closed()
            self.wrong = f"longer than {MAX_LINE_BYTES} bytes"
            return "\n"
        if not line.isascii() and not _is_unicode(line):
            self.wrong = "not UTF-8, nor UTF-16 or UTF-32"
        self.taken.append(line)
        return line

    def never_closed(self) -> DatasetError:
        """What to say where a quoted cell has no end."""
        return DatasetError(
            f"{self._name} has a quote in the row of line {self._first} that isn't closed: the "
            'file was cut off, or a quote in a cell isn\'t doubled (""); the rows before were read'
        )


def is_table(start: bytes) -> bool:
    """True if a text begins like a table of several columns, the first row of which names them; one
    line alone could be anything.

    :param start: UTF-8, the last line of which may be cut off
    """
    rows = _first_rows(start, _separator(start, ""))
    if len(rows) < 2 or len(rows[0]) < 2 or len(set(rows[0])) < len(rows[0]):
        return False
    is_header = all(
        _NAME.fullmatch(name) or (name == "" and not i) for i, name in enumerate(rows[0])
    )
    return is_header and all(len(row) == len(rows[0]) for row in rows[1:])


def _separator(start: bytes, name: str) -> str:
    """That of the name, if it parts the first row; else what parts the most cells in it, so that
    the next rows have as many."""
    named = _SEPARATOR_OF.get(Path(name_inside(name)).suffix.lower())

    def worth(separator: str) -> tuple[bool, bool, int]:
        rows = _first_rows(start, separator)
        num_cells = len(rows[0]) if rows else 0
        is_even = num_cells > 1 and all(len(row) == num_cells for row in rows[1:])
        return num_cells > 1 and separator == named, is_even, num_cells

    return max(_SEPARATORS, key=worth)


def _first_rows(start: bytes, separator: str) -> list[list[str]]:
    """The first rows that are whole; of one line without an end, that line."""
    text = start.decode(errors="replace")
    lines = list(io.StringIO(text, newline=""))
    if len(lines) > 1 and not lines[-1].endswith(("\n", "\r")):
        lines.pop()
    rows: list[list[str]] = []
    try:
        for row in csv.reader(lines, delimiter=separator, strict=True):
            if row:
                rows.append(row)
            if len(rows) >= _ROWS_LOOKED_AT:
                break
    except csv.Error:
        pass
    return rows


def _lines(blocks: Iterable[bytes]) -> Iterator[str]:
    """Each with its end, LF, CR LF or CR; of one that is too long, more than may be of one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    rest, is_too_long = "", False
    for block in utf8_blocks(blocks):
        lines = list(io.StringIO(rest + decoder.decode(block), newline=""))
        # a CR may be half a CR LF
        rest = lines.pop() if lines and not lines[-1].endswith("\n") else ""
        if is_too_long and lines:
            lines[0], is_too_long = "x" * (MAX_LINE_BYTES + 1), False
        yield from lines
        if len(rest) > MAX_LINE_BYTES or is_too_long:
            rest, is_too_long = "", True
    rest += decoder.decode(b"", final=True)
    if rest or is_too_long:
        yield rest if not is_too_long else "x" * (MAX_LINE_BYTES + 1)


def _is_unicode(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True
