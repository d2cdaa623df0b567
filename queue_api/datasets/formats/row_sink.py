"""RowSink: the seam behind which a format of outputs stands."""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from queue_api.datasets.formats.digests import MODULUS, content_digest, short_of
from queue_api.datasets.formats.json_record import dump_row
from queue_api.datasets.formats.maker import Maker

__all__ = [
    "CERTIFICATE",
    "MadeRow",
    "OutputFile",
    "RowSink",
    "WrittenRow",
    "written_row",
]

CERTIFICATE = ".certificate.json"
"""What the name of an output's certificate adds to the output's."""

# A row is a number: what made it (48 bits), who made it (14 bits), an error bit and one that it is
# there. A million rows take 8 MB.
_IS_THERE, _IS_ERROR = 1 << 63, 1 << 62
_MAKER_SHIFT, _MOST_MAKERS = 48, 1 << 14
_MARK = (1 << _MAKER_SHIFT) - 1
_UNKNOWN = 0
"""The mark of a row that doesn't say what made it."""


@dataclass(slots=True)
class MadeRow:
    """A row to write."""

    index: int
    fingerprint: str
    columns: Mapping[str, Any]
    """What JSON can say, or RawJson."""
    number: int = 0
    """Of its record in the input."""
    raw: bytes | None = None
    """Of a row that couldn't be read: as the input has it."""
    line: bytes = field(init=False, repr=False)
    """The columns as a line of JSON."""
    content: int = field(init=False, repr=False)
    """Their content digest."""

    def __post_init__(self) -> None:
        self.line = dump_row(self.columns)
        self.content = content_digest(self.index, self.columns)


@dataclass(frozen=True)
class WrittenRow:
    """What a row of an output says of itself."""

    index: int
    id: str
    fingerprint: str
    maker: Maker
    is_error: bool
    columns: Mapping[str, Any]
    has_input: bool = True
    """Whether the input's columns are among these."""


@dataclass(frozen=True)
class OutputFile:
    """One of the files that an output consists of."""

    name: str
    rows: int
    num_bytes: int
    sha256: str
    first_row: int | None = None
    last_row: int | None = None
    """Where it has a range of its own."""


class RowSink(ABC):
    """An output in one format, each row of which is there once, whatever happens to the process.

    One that is there is continued: what a crash tore is cut off, and the rows in it are known. Two
    sinks of one output exclude each other.
    """

    format: str
    """Its name in certificates."""
    is_durable = True
    """Whether it is a file or folder that stays, and so can have a certificate."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_changed = False
        """Whether anything was written since it was opened."""
        self._forget_rows()

    def append(self, rows: Sequence[MadeRow]) -> None:
        """Write rows; when this returns they are on disk.

        :raises DatasetError: no space, closed pipe, …
        """
        if not rows:
            return
        self.withdraw_certificate()
        for row, digest in zip(rows, self._write(rows), strict=True):
            self._note_made(row, digest)

    @abstractmethod
    def written(self) -> Iterator[WrittenRow]:
        """Every row of the output; reads all of it."""

    def drop(self, is_unwanted: Callable[[int], bool]) -> None:
        """Take rows out of the output, all in one instant.

        :raises DatasetError: no space, or rows can't be taken out of it
        """
        self.withdraw_certificate()
        self._drop(is_unwanted)

    @abstractmethod
    def finish(self) -> None:
        """Bring a complete output into its last form; rows may be appended to it again.

        :raises DatasetError: no space, …
        """

    @abstractmethod
    def files(self) -> list[OutputFile]:
        """What it consists of on disk; right after `finish`."""

    @abstractmethod
    def close(self, *, keep_empty: bool = True) -> None:
        """Close it; without `keep_empty` one that was made here and has no row is removed.

        :raises DatasetError: as append; of what it couldn't write, a part is still at hand
        """

    @abstractmethod
    def info(self) -> os.stat_result:
        """Of the file or folder that is written."""

    @property
    def certificate(self) -> Path:
        """Where what is said of the whole output stands: beside it."""
        return Path(f"{self.name.rstrip('/')}{CERTIFICATE}")

    def withdraw_certificate(self) -> None:
        """Take it away before the output changes: it isn't of that any more."""
        if not self.has_changed and self.is_durable:
            with contextlib.suppress(OSError):
                self.certificate.unlink()
        self.has_changed = True

    @abstractmethod
    def _write(self, rows: Sequence[MadeRow]) -> Sequence[int | None]:
        """`append`; returns the digest of each row as this format writes it, or None if that of its
        content is to stand for it."""

    @abstractmethod
    def _drop(self, is_unwanted: Callable[[int], bool]) -> None:
        """`drop`."""

    def __contains__(self, row: int) -> bool:
        return row < len(self._marks) and self._marks[row] != 0

    @property
    def end(self) -> int:
        """The row behind the last one that is written."""
        return len(self._marks)

    @property
    def rows(self) -> int:
        """How many rows are written."""
        return self._rows

    @property
    def errors(self) -> int:
        """How many rows with an error were there when it was opened, or are left of them."""
        return self._errors

    @property
    def error_codes(self) -> Counter[str]:
        """Of all rows that are written, with an error."""
        return self._error_codes

    @property
    def content(self) -> int:
        """The sum of the rows' content digests, which doesn't depend on their order."""
        return self._content

    @property
    def makers(self) -> set[Maker]:
        """The models that made rows which were there when it was opened."""
        return set(self._makers[1:])

    def has_other(self, row: int, fingerprint: str) -> bool:
        """True if the row is written, but of something else, or without a word of what."""
        return row in self and self._marks[row] & _MARK != _mark(fingerprint)

    def has_error(self, row: int) -> bool:
        """True if the row was there, with an error, when the output was opened."""
        return row in self and bool(self._marks[row] & _IS_ERROR)

    def maker(self, row: int) -> Maker:
        """The model that made a row which was there when the output was opened."""
        return self._makers[self._marks[row] >> _MAKER_SHIFT & (_MOST_MAKERS - 1)]

    def find(self, row: int) -> WrittenRow | None:
        """What the output says of a row; reads all of it."""
        return next((found for found in self.written() if found.index == row), None)

    @property
    def digests(self) -> array[int]:
        """Of each row up to `end`, as this format writes it; 0 where there is none."""
        return self._digests

    def _forget_rows(self) -> None:
        self._marks = array("Q")
        self._digests = array("Q")
        self._makers = [Maker()]
        self._rows = self._errors = self._content = 0
        self._error_codes = Counter[str]()

    def _note_found(self, known: WrittenRow, digest: int | None) -> None:
        """Remember a row that is there."""
        if known.maker not in self._makers and len(self._makers) < _MOST_MAKERS:
            self._makers.append(known.maker)
        maker = self._makers.index(known.maker) if known.maker in self._makers else 0
        mark = _mark(known.fingerprint) | maker << _MAKER_SHIFT
        content = content_digest(known.index, known.columns)
        mark |= _IS_ERROR * known.is_error
        self._note(known.index, mark, digest, content, known.columns)
        self._errors += known.is_error

    def _note_made(self, row: MadeRow, digest: int | None) -> None:
        """Remember a row that has been written."""
        self._note(row.index, _mark(row.fingerprint), digest, row.content, row.columns)

    def _note(
        self, row: int, mark: int, digest: int | None, content: int, columns: Mapping[str, Any]
    ) -> None:
        if row >= len(self._marks):
            missing = row + 1 - len(self._marks)
            self._marks.extend([0] * missing)
            self._digests.extend([0] * missing)
        self._rows += self._marks[row] == 0
        self._marks[row] = mark | _IS_THERE
        self._digests[row] = short_of(content) if digest is None else digest
        self._content = (self._content + content) % MODULUS
        if columns.get("finish_reason") == "error":
            self._error_codes[str(columns.get("error_code") or "")] += 1


def written_row(columns: Mapping[str, Any]) -> WrittenRow | None:
    """What the columns of a row that we wrote say; None if they aren't of one."""
    index, request_id = columns.get("row"), columns.get("id")
    if type(index) is not int or not 0 <= index < 2**31 or "id" not in columns:
        return None
    return WrittenRow(
        index=index,
        id=str(request_id),
        fingerprint=str(columns.get("fingerprint") or ""),
        maker=Maker(*(str(columns.get(name) or "") for name in ("model", "model_revision"))),
        is_error=columns.get("finish_reason") == "error",
        columns=columns,
    )


def _mark(fingerprint: str) -> int:
    if not fingerprint:
        return _UNKNOWN
    digest = hashlib.blake2b(fingerprint.encode(errors="replace"), digest_size=6).digest()
    return int.from_bytes(digest, "big") or 1
