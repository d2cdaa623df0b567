"""The output of a dataset run: each row once, whatever happens to the process."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import sys
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from queue_api.wire.errors import DatasetError

__all__ = ["RowWriter"]

logger = logging.getLogger(__name__)


class RowWriter:
    """Appends lines to a file and makes them durable; `-` is stdout.

    A file that is there is continued: a torn last line (of a crash) is cut off, and the rows in
    it are known. Two writers of one file exclude each other.

    :raises DatasetError: the file can't be written, is another's, or is being written
    """

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._ids = array("Q")
        """By row: a checksum of its id, with a bit above that says that it is there."""
        self.rows = 0
        """How many rows are written."""
        try:
            self._file = self._open()
            self._durable = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
            if self._durable and path != "-":
                self._lock()
                self._recover()
        except OSError as error:
            raise DatasetError(f"can't write {path}: {error.strerror or error}") from None

    def __contains__(self, row: int) -> bool:
        return row < len(self._ids) and self._ids[row] != 0

    def has_other(self, row: int, request_id: str) -> bool:
        """True if the row is written, with another id: the file belongs to another input."""
        return row in self and self._ids[row] != _mark(request_id)

    def append(self, lines: Sequence[tuple[int, str, bytes]]) -> None:
        """Write (row, id, line) of each; when this returns they are on disk.

        :raises DatasetError: no space, closed pipe, …
        """
        try:
            self._file.write(b"".join(line for _, _, line in lines))
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DatasetError(f"can't write {self._path}: {error.strerror or error}") from None
        for row, request_id, _ in lines:
            self._note(row, request_id)

    def close(self) -> None:
        """:raises DatasetError: as append; of what it couldn't write, a part is still at hand"""
        try:
            self._file.close()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DatasetError(f"can't write {self._path}: {error.strerror or error}") from None

    def _open(self) -> BinaryIO:
        if self._path == "-":
            return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        path = Path(self._path)
        if path.exists() and not path.is_file():
            return path.open("wb")  # a pipe or a device
        return path.open("ab+")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(f"another process is writing {self._path}") from None

    def _recover(self) -> None:
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, 1):
            known = _read_row(line)
            if known is not None and line.endswith(b"\n"):
                self._note(*known)
                good += len(line)
            elif known is None and not _is_torn(line):
                raise DatasetError(
                    f"line {number} of {self._path} isn't a row that batchmill wrote; "
                    "choose another output file"
                )
            else:
                logger.warning("%s: cut off a torn line of %d bytes", self._path, len(line))
                self._file.truncate(good)

    def _note(self, row: int, request_id: str) -> None:
        if row >= len(self._ids):
            self._ids.extend([0] * (row + 1 - len(self._ids)))
        self.rows += self._ids[row] == 0
        self._ids[row] = _mark(request_id)


def _mark(request_id: str) -> int:
    return zlib.crc32(request_id.encode(errors="replace")) | 1 << 32


def _is_torn(line: bytes) -> bool:
    """True for what a crash may leave of a row at the end of a file; zeros are unwritten blocks."""
    if line.endswith(b"\n") or not line.startswith((b"{", b"\0")):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _read_row(line: bytes) -> tuple[int, str] | None:
    """(row, id) of a line we wrote; None if it isn't one."""
    try:
        row = json.loads(line)
        index, request_id = row["row"], row["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (index, str(request_id)) if type(index) is int and 0 <= index < 2**31 else None
