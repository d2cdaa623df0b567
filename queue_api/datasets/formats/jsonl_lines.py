"""Lines of a file, a pipe or the standard input, in constant memory and without threads."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from queue_api.wire.errors import DatasetError

__all__ = [
    "MAX_LINE_BYTES",
    "Line",
    "LineSplitter",
    "count_lines",
    "file_blocks",
    "file_lines",
    "open_input",
    "read_block",
    "read_lines",
]

MAX_LINE_BYTES = 16 * 2**20
BLOCK_BYTES = 2**18

Line = tuple[int, bytes | None]
"""(number from 1, UTF-8 without the line's end); None for one beyond MAX_LINE_BYTES."""


class LineSplitter:
    """Makes lines of blocks. Lines end in LF, CR LF or, where there is no LF, in CR.

    UTF-16 and UTF-32 are known by their byte order mark or their zeros, and become UTF-8. A line
    beyond MAX_LINE_BYTES is read past, never held. Blank lines are counted and left out.
    """

    def __init__(self) -> None:
        self._number = 0
        self._rest = b""
        self._too_long = False
        self._has_begun = False
        self._decoder: codecs.IncrementalDecoder | None = None
        self._ends_in_cr: bool | None = None
        """None: no end of a line has been seen yet."""

    def feed(self, block: bytes) -> list[Line]:
        """The lines that end in this block."""
        if not self._has_begun:
            self._rest += block
            if len(self._rest) < 4:
                return []
            block = self._begin()
        return self._split(self._in_utf8(block))

    def finish(self) -> list[Line]:
        """The last line, if it has no end."""
        block = b"" if self._has_begun else self._begin()
        last = self._split(self._in_utf8(block, final=True))
        if self._too_long or self._rest.strip():
            last.append((self._number + 1, None if self._too_long else self._rest))
        return last

    def _begin(self) -> bytes:
        """Look which encoding it is; returns what is there of the first line."""
        self._has_begun = True
        start, self._rest = self._rest, b""
        encoding = json.detect_encoding(start)
        if encoding.startswith(("utf-16", "utf-32")):
            self._decoder = codecs.getincrementaldecoder(encoding)(errors="surrogatepass")
        # a byte order mark isn't part of the first line
        return start.removeprefix(codecs.BOM_UTF8)

    def _in_utf8(self, block: bytes, *, final: bool = False) -> bytes:
        if self._decoder is None:
            return block
        try:
            return self._decoder.decode(block, final).encode(errors="surrogatepass")
        except UnicodeDecodeError:
            self._decoder.reset()
            return b"\xff"  # which isn't UTF-8 either, so that the line is told to be wrong

    def _split(self, block: bytes) -> list[Line]:
        data = self._rest + block
        if self._ends_in_cr is None:
            if b"\n" in block:
                self._ends_in_cr = False
            elif b"\r" in data[:-1]:
                self._ends_in_cr = True
        if self._ends_in_cr:
            data = data.replace(b"\r", b"\n")
        *lines, rest = data.split(b"\n")
        found: list[Line] = []
        for line in lines:
            self._number += 1
            if self._too_long or len(line) > MAX_LINE_BYTES:
                found.append((self._number, None))
            elif line.strip():
                found.append((self._number, line))
            self._too_long = False
        if self._too_long or len(rest) > MAX_LINE_BYTES:
            rest, self._too_long = b"", True
        self._rest = rest
        return found


async def read_lines(path: Path | str) -> AsyncGenerator[Line, None]:
    """Each line that isn't blank; `-` is stdin.

    :raises DatasetError: the file can't be opened or read
    """
    fd = open_input(path)
    try:
        splitter = LineSplitter()
        while block := await read_block(fd, path):
            for line in splitter.feed(block):
                yield line
        for line in splitter.finish():
            yield line
    finally:
        os.close(fd)


def open_input(path: Path | str) -> int:
    """A file descriptor to read from, ours to close; `-` is stdin.

    :raises DatasetError: it can't be opened
    """
    try:
        if path != "-":
            return os.open(path, os.O_RDONLY)
        if sys.stdin is None:
            raise DatasetError("can't read the standard input: it is closed")
        return os.dup(sys.stdin.fileno())
    except OSError as error:
        raise DatasetError(f"can't read {path}: {error.strerror or error}") from None


async def read_block(fd: int, path: Path | str) -> bytes:
    """What there is next, once there is something; empty at the end.

    :raises DatasetError: it can't be read
    """
    await _until_readable(fd)
    try:
        return os.read(fd, BLOCK_BYTES)
    except OSError as error:
        raise DatasetError(f"can't read {path}: {error.strerror or error}") from None


async def _until_readable(fd: int) -> None:
    """Wait for a pipe or terminal to have something, leaving the loop to others meanwhile."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:
        # the kernel's word for a regular file, which is always readable
        await asyncio.sleep(0)
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def file_blocks(fd: int, start: int = 0) -> Iterator[bytes]:
    """The blocks of a regular file from `start` on, without moving where others read it.

    :raises OSError: the file can't be read
    """
    while block := os.pread(fd, BLOCK_BYTES, start):
        start += len(block)
        yield block


def count_lines(path: Path | str) -> int:
    """How many lines read_lines gives; for a thread, since it reads the whole file.

    :raises OSError: the file can't be read
    """
    with Path(path).open("rb") as file:
        return sum(1 for _ in file_lines(file.fileno()))


def file_lines(fd: int, start: int = 0) -> Iterator[Line]:
    """The lines of a regular file from `start` on.

    :raises OSError: the file can't be read
    """
    splitter = LineSplitter()
    for block in file_blocks(fd, start):
        yield from splitter.feed(block)
    yield from splitter.finish()
