"""The output of a dataset run: each row once, whatever happens to the process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from queue_api.datasets.maker import Maker
from queue_api.wire.errors import DatasetError

__all__ = ["RowWriter", "WrittenRow"]

logger = logging.getLogger(__name__)

LEAST_FREE_BYTES = 2**16
FULL_DEVICE = os.makedev(1, 7)
"""/dev/full, which takes nothing."""

# A row is a number: what made it (48 bits), who made it (14 bits), an error bit and one that it is
# there. A million rows take 8 MB.
_IS_THERE, _IS_ERROR = 1 << 63, 1 << 62
_MAKER_SHIFT, _MOST_MAKERS = 48, 1 << 14
_MARK = (1 << _MAKER_SHIFT) - 1
_UNKNOWN = 0
"""The mark of a row that doesn't say what made it."""


@dataclass(frozen=True)
class WrittenRow:
    """What a line of an output says of itself."""

    index: int
    id: str
    fingerprint: str
    maker: Maker
    is_error: bool
    columns: dict[str, Any]


class RowWriter:
    """Appends lines to a file and makes them durable; `-` is stdout.

    A file that is there is continued: a torn last line (of a crash) is cut off, and the rows in
    it are known. Two writers of one file exclude each other.

    :raises DatasetError: the file can't be written, is another's, or is being written
    """

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._marks = array("Q")
        self._makers = [Maker()]
        self.rows = 0
        """How many rows are written."""
        self.errors = 0
        """How many rows with an error were in the file when it was opened, or are left of them."""
        self._is_new = path != "-" and not os.path.lexists(path)
        try:
            self._file = self._open()
            mode = os.fstat(self._file.fileno()).st_mode
            self._durable = stat.S_ISREG(mode)
            self._check_room()
            if self._durable and path != "-":
                self._lock()
                self._recover()
        except OSError as error:
            raise DatasetError(f"can't write {path}: {error.strerror or error}") from None

    def __contains__(self, row: int) -> bool:
        return row < len(self._marks) and self._marks[row] != 0

    @property
    def end(self) -> int:
        """The row behind the last one that is written."""
        return len(self._marks)

    @property
    def makers(self) -> set[Maker]:
        """The models that made rows of the file when it was opened."""
        return set(self._makers[1:])

    def has_other(self, row: int, fingerprint: str) -> bool:
        """True if the row is written, but of something else, or without a word of what."""
        return row in self and self._marks[row] & _MARK != _mark(fingerprint)

    def has_error(self, row: int) -> bool:
        """True if the row was written with an error before the file was opened."""
        return row in self and bool(self._marks[row] & _IS_ERROR)

    def maker(self, row: int) -> Maker:
        """The model that made a row which was there when the file was opened."""
        return self._makers[self._marks[row] >> _MAKER_SHIFT & (_MOST_MAKERS - 1)]

    def info(self) -> os.stat_result:
        """Of the file that is written."""
        return os.fstat(self._file.fileno())

    def append(self, lines: Sequence[tuple[int, str, bytes]]) -> None:
        """Write (row, fingerprint, line) of each; when this returns they are on disk.

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
        for row, fingerprint, _ in lines:
            self._note(row, _mark(fingerprint))

    def find(self, row: int) -> WrittenRow | None:
        """What the file says of a row; reads all of it."""
        return next((found for found, _ in self._lines() if found.index == row), None)

    def drop(self, is_unwanted: Callable[[int], bool]) -> None:
        """Take rows out of the file, all in one instant.

        :raises DatasetError: no space, or it isn't a file
        """
        if not self._durable or self._path == "-":
            raise DatasetError(f"rows can't be taken out of {self._path}: it isn't a file")
        try:
            self._replace(is_unwanted)
        except OSError as error:
            raise DatasetError(f"can't write {self._path}: {error.strerror or error}") from None

    def close(self, *, keep_empty: bool = True) -> None:
        """Close the file; without `keep_empty` one that was made here and has no row is removed.

        :raises DatasetError: as append; of what it couldn't write, a part is still at hand
        """
        try:
            if self._is_new and not self.rows and not keep_empty and self._durable:
                with contextlib.suppress(FileNotFoundError):
                    Path(self._path).unlink()
            self._file.close()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DatasetError(f"can't write {self._path}: {error.strerror or error}") from None

    def _open(self) -> BinaryIO:
        if self._path == "-":
            if sys.stdout is None:
                raise DatasetError("can't write to the standard output: it is closed")
            return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        path = Path(self._path)
        if path.exists() and not path.is_file():
            return path.open("wb")  # a pipe or a device
        return path.open("ab+")

    def _check_room(self) -> None:
        """:raises OSError: nothing can be written; better told before a model is loaded"""
        info = os.fstat(self._file.fileno())
        is_full = info.st_rdev == FULL_DEVICE and stat.S_ISCHR(info.st_mode)
        if self._durable:
            room = os.fstatvfs(self._file.fileno())
            is_full = room.f_blocks > 0 and room.f_bavail * room.f_frsize < LEAST_FREE_BYTES
        if is_full:
            self.close(keep_empty=False)
            raise OSError(28, "No space left on device")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._is_being_written() from None
        if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):  # noqa: PTH116
            raise self._is_being_written()  # its rows were just put into a new file

    def _is_being_written(self) -> DatasetError:
        return DatasetError(f"another process is writing {self._path}")

    def _recover(self) -> None:
        self._fresh.unlink(missing_ok=True)  # of one that was killed in `drop`
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, 1):
            known = _read_row(line)
            if known is not None and line.endswith(b"\n"):
                self._note_found(known)
                good += len(line)
            elif known is None and not _is_torn(line):
                raise DatasetError(
                    f"line {number} of {self._path} isn't a row that batchmill wrote; "
                    "choose another output file"
                )
            else:
                logger.warning("%s: cut off a torn line of %d bytes", self._path, len(line))
                self._file.truncate(good)

    @property
    def _fresh(self) -> Path:
        """Where the file is written anew: beside it, for only there it can take its place."""
        target = Path(os.path.realpath(self._path))
        return target.with_name(f".{target.name}.batchmill")

    def _lines(self) -> Iterator[tuple[WrittenRow, bytes]]:
        with Path(self._path).open("rb") as file:
            for line in file:
                if (known := _read_row(line)) is not None:
                    yield known, line

    def _replace(self, is_unwanted: Callable[[int], bool]) -> None:
        """Copy what stays to a new file, and put that in the old one's place.

        Whoever looks, and whenever it is broken off, finds one of the two, whole.
        """
        fresh = self._fresh
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(fresh.open("wb+"))
            undo.callback(fresh.unlink, missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
            self._marks, self._makers = array("Q"), [Maker()]
            self.rows = self.errors = 0
            for known, line in self._lines():
                if not is_unwanted(known.index):
                    file.write(line)
                    self._note_found(known)
            file.flush()
            os.fsync(file.fileno())
            fresh.rename(os.path.realpath(self._path))
            undo.pop_all()
        _sync_folder(fresh.parent)
        self._file.close()
        self._file = file

    def _note_found(self, known: WrittenRow) -> None:
        if known.maker not in self._makers and len(self._makers) < _MOST_MAKERS:
            self._makers.append(known.maker)
        maker = self._makers.index(known.maker) if known.maker in self._makers else 0
        mark = _mark(known.fingerprint) | maker << _MAKER_SHIFT
        self._note(known.index, mark | _IS_ERROR * known.is_error)
        self.errors += known.is_error

    def _note(self, row: int, mark: int) -> None:
        if row >= len(self._marks):
            self._marks.extend([0] * (row + 1 - len(self._marks)))
        self.rows += self._marks[row] == 0
        self._marks[row] = mark | _IS_THERE


def _mark(fingerprint: str) -> int:
    if not fingerprint:
        return _UNKNOWN
    digest = hashlib.blake2b(fingerprint.encode(errors="replace"), digest_size=6).digest()
    return int.from_bytes(digest, "big") or 1


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_torn(line: bytes) -> bool:
    """True for what a crash may leave of a row at the end of a file; zeros are unwritten blocks."""
    if line.endswith(b"\n") or not line.startswith((b"{", b"\0")):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _read_row(line: bytes) -> WrittenRow | None:
    """What a line that we wrote says; None if it isn't one."""
    try:
        row = json.loads(line)
        index, request_id = row["row"], row["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if type(index) is not int or not 0 <= index < 2**31:
        return None
    return WrittenRow(
        index=index,
        id=str(request_id),
        fingerprint=str(row.get("fingerprint") or ""),
        maker=Maker(*(str(row.get(name) or "") for name in ("model", "model_revision"))),
        is_error=row.get("finish_reason") == "error",
        columns=row,
    )
