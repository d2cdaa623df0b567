"""JSON Lines as an output: an object to a line, packed or not."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from queue_api.datasets.formats.digests import line_digest
from queue_api.datasets.formats.line_codec import DamagedMemberError, codec_of
from queue_api.datasets.formats.row_sink import (
    MadeRow,
    OutputFile,
    RowSink,
    WrittenRow,
    written_row,
)
from queue_api.wire.errors import DatasetError

__all__ = ["JsonLinesSink", "read_object", "sync_folder"]

logger = logging.getLogger(__name__)

LEAST_FREE_BYTES = 2**16
MEMBER_BYTES = 2**18
"""Of the lines that are packed together where many are written anew."""
FULL_DEVICE = os.makedev(1, 7)
"""/dev/full, which takes nothing."""


class JsonLinesSink(RowSink):
    """Appends lines to a file and makes them durable; `-` is stdout.

    A name that ends in .gz or .zst is packed: each append is a member, or frame, of its own.

    :raises DatasetError: the file can't be written, is another's, or is being written
    :raises MissingExtraError: what packs it isn't installed
    """

    format = "jsonl"

    def __init__(self, path: Path | str) -> None:
        super().__init__(str(path))
        self._path = path
        self._codec = codec_of(str(path))
        self._sha256 = hashlib.sha256()
        """Of all bytes of the file."""
        self._is_new = path != "-" and not os.path.lexists(path)
        try:
            self._file = self._open()
            mode = os.fstat(self._file.fileno()).st_mode
            self._is_file = stat.S_ISREG(mode)
            self.is_durable = self._is_file and path != "-"
            self._check_room()
            if self.is_durable:
                self._lock()
                self._recover()
            if not self.is_durable or not self._file.tell():
                self._put(self._codec.start)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DatasetError(f"can't write {path}: {error.strerror or error}") from None

    @staticmethod
    def dump(row: MadeRow) -> bytes:
        """The row as a line of this output."""
        return row.line

    @staticmethod
    def parse(line: bytes) -> WrittenRow | None:
        """What a line that we wrote says; None if it isn't one."""
        row = read_object(line)
        return None if row is None else written_row(row)

    def info(self) -> os.stat_result:
        return os.fstat(self._file.fileno())

    def written(self) -> Iterator[WrittenRow]:
        return (known for known, _ in self._lines())

    def finish(self) -> None:
        """It is in its last form after each append."""

    def files(self) -> list[OutputFile]:
        size = self._file.seek(0, os.SEEK_END)
        return [OutputFile(Path(self._path).name, self.rows, size, self._sha256.hexdigest())]

    def close(self, *, keep_empty: bool = True) -> None:
        try:
            if self._is_new and not self.rows and not keep_empty and self._is_file:
                with contextlib.suppress(FileNotFoundError):
                    Path(self._path).unlink()
            self._file.close()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DatasetError(f"can't write {self._path}: {error.strerror or error}") from None

    def _write(self, rows: Sequence[MadeRow]) -> list[int]:
        lines = [self.dump(row) for row in rows]
        try:
            if lines:
                self._put(self._codec.pack(b"".join(lines)))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DatasetError(f"can't write {self._path}: {error.strerror or error}") from None
        return [line_digest(line) for line in lines]

    def _put(self, data: bytes) -> None:
        if not data:
            return
        self._file.write(data)
        self._file.flush()
        if self._is_file:
            os.fsync(self._file.fileno())
        self._sha256.update(data)

    def _drop(self, is_unwanted: Callable[[int], bool]) -> None:
        if not self.is_durable:
            raise DatasetError(f"rows can't be taken out of {self._path}: it isn't a file")
        try:
            self._replace(is_unwanted)
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
        if self._is_file:
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
        """Learn which rows are there, and cut off what a crash tore."""
        self._fresh.unlink(missing_ok=True)  # of one that was killed in `_replace`
        self._file.seek(0)
        good, number, wrong = 0, 0, None
        held: list[tuple[WrittenRow, int]] = []
        """Rows of what may be torn."""
        try:
            for item in self._codec.read(self._file, self._sha256):
                if isinstance(item, int):
                    if wrong is not None:
                        break
                    good = item
                    for known, digest in held:
                        self._note_found(known, digest)
                    held.clear()
                    continue
                number += 1
                found = self.parse(item)
                if found is not None:
                    held.append((found, line_digest(item)))
                elif wrong is None:
                    wrong = number, item
            else:
                # what is packed and torn is known by what the file begins with
                if wrong is not None and (
                    self._codec.start or _is_torn(wrong[1], behind_rows=good > 0)
                ):
                    wrong = None
        except DamagedMemberError as error:
            raise self._is_damaged(error.offset) from None
        if wrong is not None:
            raise self._is_foreign(f"line {wrong[0]}")
        size = self._file.seek(0, os.SEEK_END)
        if good < size:
            self._cut(good, size)

    def _cut(self, good: int, size: int) -> None:
        start = self._codec.start
        if start and not self.rows:
            self._file.seek(0)
            if not start.startswith(self._file.read(size)[: len(start)]):
                raise self._is_foreign("what is torn at the beginning")
        logger.warning("%s: cut off %d bytes of a torn line", self._path, size - good)
        self._file.truncate(good)
        self._file.seek(good)

    def _is_foreign(self, what: str) -> DatasetError:
        return DatasetError(
            f"{what} of {self._path} isn't a row that batchmill wrote; choose another output file"
        )

    def _is_damaged(self, offset: int) -> DatasetError:
        if offset == 0:
            return DatasetError(
                f"{self._path} is there and isn't {self._codec.name} as its name says; choose "
                "another output file"
            )
        return DatasetError(
            f"{self._path} is damaged behind byte {offset}: batchmill verify says which rows are "
            f"lost, and `truncate -s {offset}` leaves those before it, to go on from"
        )

    @property
    def _fresh(self) -> Path:
        """Where the file is written anew: beside it, for only there it can take its place."""
        target = Path(os.path.realpath(self._path))
        return target.with_name(f".{target.name}.batchmill")

    def _lines(self) -> Iterator[tuple[WrittenRow, bytes]]:
        with Path(self._path).open("rb") as file:
            for line in self._codec.read(file):
                if not isinstance(line, int) and (known := self.parse(line)) is not None:
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
            self._sha256 = hashlib.sha256()
            for part in self._kept(is_unwanted):
                file.write(part)
                self._sha256.update(part)
            file.flush()
            os.fsync(file.fileno())
            fresh.rename(os.path.realpath(self._path))
            undo.pop_all()
        sync_folder(fresh.parent)
        self._file.close()
        self._file = file

    def _kept(self, is_unwanted: Callable[[int], bool]) -> Iterator[bytes]:
        """What the new file consists of."""
        yield self._codec.start
        held, num_bytes = list[bytes](), 0
        for known, line in self._lines():
            if is_unwanted(known.index):
                continue
            self._note_found(known, line_digest(line))
            held.append(line)
            num_bytes += len(line)
            if num_bytes >= MEMBER_BYTES:
                yield self._codec.pack(b"".join(held))
                held, num_bytes = [], 0
        if held:
            yield self._codec.pack(b"".join(held))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_torn(line: bytes, *, behind_rows: bool) -> bool:
    """True for what a crash may leave of a row at the end of a file; zeros are unwritten blocks."""
    if line.startswith(b"\0"):
        return not line.endswith(b"\n") and (behind_rows or not line.strip(b"\0"))
    if line.endswith(b"\n") or not line.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def read_object(line: bytes) -> dict[str, Any] | None:
    """The object that a line of JSON is; None if it isn't one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
