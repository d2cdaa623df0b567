"""Where bytes of inputs come from: files, pipes, the standard input."""

from __future__ import annotations

import hashlib
import io
import os
import select
import stat
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from queue_api.wire.errors import DatasetError

__all__ = [
    "BLOCK_BYTES",
    "START_BYTES",
    "ByteInput",
    "FileInput",
    "PipeInput",
    "Window",
    "open_bytes",
    "spooled",
]

BLOCK_BYTES = 2**18
START_BYTES = 4096
"""So much is looked at to tell a format, or less where that has not come yet."""
SAMPLES, SAMPLE_BYTES = 16, 4096


class ByteInput(ABC):
    """Bytes that are read in blocks.

    :raises DatasetError: from every method that reads: it can't be read
    """

    is_repeatable = True
    """True if it can be read more than once."""
    waits = True
    """True if bytes may be long in coming."""

    def __init__(self, name: str) -> None:
        self.name = name
        """As the user gave it."""
        self.before_waiting: Callable[[], None] = lambda: None
        """Called in the reading thread before it waits for more to come."""

    @abstractmethod
    def start(self) -> bytes:
        """The first bytes, without moving where `blocks` begins."""

    @abstractmethod
    def blocks(self) -> Iterator[bytes]:
        """All of it, from the first byte on; of what isn't repeatable, once."""

    @abstractmethod
    def file(self) -> BinaryIO:
        """All of it as a file that can seek, the caller's to close; of what isn't repeatable,
        instead of `blocks`."""

    @abstractmethod
    def identity(self) -> list[str]:
        """What tells this content from another, without reading all of it."""

    def is_same_file(self, info: os.stat_result) -> bool:  # noqa: ARG002
        """True if what is written there is read here."""
        return False

    @abstractmethod
    def interrupt(self) -> None:
        """Make `blocks` that waits for more end as if there were none; for another thread."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


class _Descriptor(ByteInput):
    """An open file descriptor, which it closes."""

    def __init__(self, name: str, fd: int) -> None:
        super().__init__(name)
        self._fd = fd
        self._info = os.fstat(fd)

    def is_same_file(self, info: os.stat_result) -> bool:
        kind = stat.S_IFMT(info.st_mode)
        return kind in (stat.S_IFREG, stat.S_IFIFO) and os.path.samestat(self._info, info)

    def close(self) -> None:
        os.close(self._fd)

    def _unreadable(self, error: OSError) -> DatasetError:
        return DatasetError(f"can't read {self.name}: {error.strerror or error}")


class FileInput(_Descriptor):
    """A regular file, read from where the descriptor stands, without moving it."""

    waits = False

    def __init__(self, name: str, fd: int) -> None:
        super().__init__(name, fd)
        # the standard input may be a file that others have read a part of
        self._first = os.lseek(fd, 0, os.SEEK_CUR)

    def start(self) -> bytes:
        return self._read(0, START_BYTES)

    def blocks(self) -> Iterator[bytes]:
        position = 0
        while block := self._read(position, BLOCK_BYTES):
            position += len(block)
            yield block

    def file(self) -> BinaryIO:
        return io.BufferedReader(Window(self._fd, self._first), BLOCK_BYTES)

    def identity(self) -> list[str]:
        """Path, size, time and parts of the content, for what those don't tell."""
        digest = hashlib.blake2b(digest_size=16)
        rest = max(0, self._info.st_size - SAMPLE_BYTES)
        for part in range(SAMPLES):
            digest.update(self._read(part * rest // (SAMPLES - 1), SAMPLE_BYTES))
        info = [str(self._info.st_size), str(self._info.st_mtime_ns), digest.hexdigest()]
        return info if self.name == "-" else [os.path.realpath(self.name), *info]

    def interrupt(self) -> None:
        """Nothing is waited for."""

    def _read(self, position: int, size: int) -> bytes:
        try:
            return os.pread(self._fd, size, self._first + position)
        except OSError as error:
            raise self._unreadable(error) from None


class Window(io.RawIOBase):
    """A file from a place in it on, by a descriptor that others read, too."""

    def __init__(self, fd: int, first: int) -> None:
        self._fd, self._first, self._position = fd, first, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = os.pread(self._fd, len(buffer), self._first + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self._position, os.fstat(self._fd).st_size - self._first)[whence]
        self._position = base + offset
        return self._position


class PipeInput(_Descriptor):
    """A pipe, a FIFO, a terminal: read once, as it comes."""

    is_repeatable = False

    def __init__(self, name: str, fd: int) -> None:
        super().__init__(name, fd)
        self._ahead: list[bytes] = []
        self._has_ended = False
        self._woken, self._wake = os.pipe()

    def start(self) -> bytes:
        """What there is once a line has come, or enough bytes, or no more will."""
        found = b"".join(self._ahead)
        while len(found) < START_BYTES and b"\n" not in found and (block := self._read()):
            self._ahead.append(block)
            found += block
        return found

    def blocks(self) -> Iterator[bytes]:
        while self._ahead:
            yield self._ahead.pop(0)
        while block := self._read():
            yield block

    def file(self) -> BinaryIO:
        return spooled(self)

    def identity(self) -> list[str]:
        return []

    def interrupt(self) -> None:
        os.write(self._wake, b"\0")

    def close(self) -> None:
        super().close()
        os.close(self._woken)
        os.close(self._wake)

    def _read(self) -> bytes:
        if self._has_ended:  # a terminal would wait for another end
            return b""
        block = self._next()
        self._has_ended = not block
        return block

    def _next(self) -> bytes:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        try:
            ready = poll.poll(0)
            if not ready:
                self.before_waiting()
                ready = poll.poll()
            if any(fd == self._woken for fd, _ in ready):
                return b""
            return os.read(self._fd, BLOCK_BYTES)
        except OSError as error:
            raise self._unreadable(error) from None


def spooled(data: ByteInput) -> BinaryIO:
    """All that comes, in a temporary file without a name.

    :raises DatasetError: there is no room for it
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller's to close
    try:
        for block in data.blocks():
            file.write(block)
        file.seek(0)
    except OSError as error:
        file.close()
        raise DatasetError(
            f"no room in {tempfile.gettempdir()} for what {data.name} brings: {error.strerror}"
        ) from None
    return file


def open_bytes(path: Path | str) -> ByteInput:
    """A file, a pipe or, as `-`, the standard input.

    :raises DatasetError: it can't be opened
    """
    name = str(path)
    try:
        if name == "-":
            if sys.stdin is None:
                raise DatasetError("can't read the standard input: it is closed")
            fd = os.dup(sys.stdin.fileno())
        else:
            fd = os.open(path, os.O_RDONLY)
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise DatasetError(f"can't read {path}: {error.strerror or error}") from None
    if stat.S_ISDIR(mode):
        os.close(fd)
        raise DatasetError(f"can't read {path}: Is a directory")
    return FileInput(name, fd) if stat.S_ISREG(mode) else PipeInput(name, fd)
