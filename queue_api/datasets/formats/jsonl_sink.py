"""JSON Lines as an output: an object to a line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from queue_api.datasets.formats.row_sink import MadeRow, RowSink, WrittenRow, written_row
from queue_api.wire.errors import DatasetError

__all__ = ["JsonLinesSink"]

logger = logging.getLogger(__name__)

LEAST_FREE_BYTES = 2**16
FULL_DEVICE = os.makedev(1, 7)
"""/dev/full, which takes nothing."""


class JsonLinesSink(RowSink):
    """Appends lines to a file and makes them durable; `-` is stdout.

    :raises DatasetError: the file can't be written, is another's, or is being written
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(str(path))
        self._path = path
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

    def info(self) -> os.stat_result:
        return os.fstat(self._file.fileno())

    def append(self, rows: Sequence[MadeRow]) -> None:
        try:
            self._file.write(b"".join(row.line for row in rows))
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DatasetError(f"can't write {self._path}: {error.strerror or error}") from None
        self._note_made(rows)

    def written(self) -> Iterator[WrittenRow]:
        return (known for known, _ in self._lines())

    def drop(self, is_unwanted: Callable[[int], bool]) -> None:
        if not self._durable or self._path == "-":
            raise DatasetError(f"rows can't be taken out of {self._path}: it isn't a file")
        try:
            self._replace(is_unwanted)
        except OSError as error:
            raise DatasetError(f"can't write {self._path}: {error.strerror or error}") from None

    def close(self, *, keep_empty: bool = True) -> None:
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
            self._forget_rows()
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
    except (ValueError, RecursionError):
        return None
    return written_row(row) if isinstance(row, dict) else None
