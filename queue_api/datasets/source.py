"""The input of a dataset: opened once, looked at before anything is started, then read."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from queue_api.datasets.columns import Row, RowParser
from queue_api.datasets.formats.jsonl_lines import (
    Line,
    LineSplitter,
    file_lines,
    open_input,
    read_block,
)
from queue_api.datasets.formats.unreadable import LINE_BYTES, check_format, why_unreadable
from queue_api.wire.errors import DatasetError, RequestError
from queue_api.wire.schemas import SamplingParams

__all__ = ["RowSource"]

SAMPLES, SAMPLE_BYTES = 16, 4096
LOOK_AT_ROWS = 1000
LOOK_AT_BYTES = 8 * 2**20
"""Of what can be read only once so much is held at most, to be looked at."""


class RowSource:
    """A file, a pipe or, as `-`, the standard input.

    :raises DatasetError: it can't be opened
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._fd = open_input(path)
        self.info = os.fstat(self._fd)
        self._ahead: list[bytes] = []
        """Blocks that were read to look at them."""
        self.is_file = stat.S_ISREG(self.info.st_mode)
        """True if it can be read more than once."""
        if stat.S_ISDIR(self.info.st_mode):
            os.close(self._fd)
            raise DatasetError(f"can't read {path}: Is a directory")
        # the standard input may be a file that others have read a part of
        self._start = os.lseek(self._fd, 0, os.SEEK_CUR) if self.is_file else 0

    def close(self) -> None:
        os.close(self._fd)

    async def look(
        self, defaults: SamplingParams | None = None, fields: frozenset[str] | None = None
    ) -> None:
        """See that there is a row that can be read; all of a file is looked at to find one.

        :raises DatasetError: there are rows and none can be read; says what there is instead
        """
        parser = RowParser(defaults, warn=_say_nothing, fields=fields)
        splitter, seen, first_lines = LineSplitter(), list[Row](), list[bytes | None]()
        num_rows, num_bytes = 0, 0
        position = self._start
        while True:
            block = await self._next_block(position)
            if num_bytes == 0:
                check_format(block, self.path)
            position += len(block)
            num_bytes += len(block)
            for number, line in splitter.feed(block) if block else splitter.finish():
                row = parser.parse(number, line)
                num_rows += 1
                if not isinstance(row.request, RequestError):
                    return
                if len(seen) < LOOK_AT_ROWS:
                    seen.append(row)
                    first_lines.append(None if line is None else line[:LINE_BYTES])
            is_enough = num_rows >= LOOK_AT_ROWS or num_bytes >= LOOK_AT_BYTES
            if not block or (is_enough and not self.is_file):
                break
        if seen:
            raise DatasetError(why_unreadable(self.path, seen, first_lines, num_rows))

    async def _next_block(self, position: int) -> bytes:
        """The next to look at; of a file without moving where it is read."""
        if self.is_file:
            try:
                return os.pread(self._fd, 2**18, position)
            except OSError as error:
                raise DatasetError(f"can't read {self.path}: {error.strerror or error}") from None
        block = await read_block(self._fd, self.path)
        self._ahead.append(block)
        return block

    async def lines(self) -> AsyncGenerator[Line, None]:
        """Each line that isn't blank, once.

        :raises DatasetError: it can't be read
        """
        splitter = LineSplitter()
        while block := await self._read():
            for line in splitter.feed(block):
                yield line
        for line in splitter.finish():
            yield line

    async def _read(self) -> bytes:
        if self._ahead:
            return self._ahead.pop(0)
        return await read_block(self._fd, self.path)

    def lines_again(self) -> Iterator[Line]:
        """The lines of a file, as often as is wanted; `lines` isn't disturbed.

        :raises OSError: it can't be read
        """
        return file_lines(self._fd, self._start)

    def is_same_file(self, info: os.stat_result) -> bool:
        """True if what is written there is read here."""
        kind = stat.S_IFMT(info.st_mode)
        return kind in (stat.S_IFREG, stat.S_IFIFO) and os.path.samestat(self.info, info)

    def sample(self) -> str:
        """A digest of parts of a file, for what its size and time don't tell."""
        digest = hashlib.blake2b(digest_size=16)
        for part in range(SAMPLES):
            place = self._start + part * max(0, self.info.st_size - SAMPLE_BYTES) // (SAMPLES - 1)
            digest.update(os.pread(self._fd, SAMPLE_BYTES, place))
        return digest.hexdigest()

    async def rows(self, parser: RowParser) -> AsyncGenerator[Row, None]:
        """Its rows; what is wrong with one stands in its `request`."""
        async for number, line in self.lines():
            yield parser.parse(number, line)


def _say_nothing(_: str) -> None:
    """The rows are read again, and what there is to be told is told then."""
