"""Lines of a file, a pipe or the standard input, in constant memory and without threads."""

from __future__ import annotations

import asyncio
import codecs
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from queue_api.wire.errors import DatasetError

__all__ = ["MAX_LINE_BYTES", "count_lines", "read_lines"]

MAX_LINE_BYTES = 16 * 2**20
BLOCK_BYTES = 2**18


async def read_lines(path: Path | str) -> AsyncGenerator[tuple[int, bytes | None], None]:
    """(number from 1, line without its end) of each line that isn't blank; `-` is stdin.

    A line beyond MAX_LINE_BYTES is None: it is read past, never held.

    :raises DatasetError: the file can't be opened or read
    """
    try:
        fd = os.dup(sys.stdin.fileno()) if path == "-" else os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DatasetError(f"can't read {path}: {error.strerror or error}") from None
    try:
        number, rest, too_long = 0, codecs.BOM_UTF8, False
        while block := await _read(fd, path):
            if number == 0 and rest == codecs.BOM_UTF8:
                # a byte order mark isn't part of the first line
                block, rest = block.removeprefix(codecs.BOM_UTF8), b""
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                if too_long or len(line) > MAX_LINE_BYTES:
                    yield number, None
                elif line.strip():
                    yield number, line
                too_long = False
            if len(rest) > MAX_LINE_BYTES:
                rest, too_long = b"", True
        if number == 0 and rest == codecs.BOM_UTF8:
            return
        if too_long or rest.strip():
            yield number + 1, None if too_long else rest
    finally:
        os.close(fd)


async def _read(fd: int, path: Path | str) -> bytes:
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


def count_lines(path: Path | str) -> int:
    """How many lines read_lines gives; for a thread, since it reads the whole file.

    :raises OSError: the file can't be read
    """
    with Path(path).open("rb") as file:
        return sum(1 for line in file if line.strip())
