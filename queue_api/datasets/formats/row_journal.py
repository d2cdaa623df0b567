"""Rows on disk until the part that they belong to is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from queue_api.datasets.formats.jsonl_sink import read_object

__all__ = ["RowJournal"]


class RowJournal:
    """A file of lines that is appended to and then emptied; what a crash tore of it is cut off.

    :raises OSError: it can't be written
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+", buffering=0)
        self.rows = 0
        self.num_bytes = 0
        self._recover()

    def append(self, lines: list[bytes]) -> None:
        """Add whole lines; they are on disk then."""
        data = b"".join(lines)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), self.num_bytes)
            raise
        self.rows += len(lines)
        self.num_bytes += len(data)

    def read(self) -> bytes:
        """All of it."""
        self._file.seek(0)
        return self._file.readall()

    def objects(self) -> list[dict[str, Any]]:
        """The rows of it."""
        found = map(read_object, self.read().splitlines())
        return [row for row in found if row is not None]

    def clear(self) -> None:
        """Its rows are elsewhere."""
        self._file.truncate(0)
        os.fsync(self._file.fileno())
        self.rows = self.num_bytes = 0

    def close(self) -> None:
        """Let go of it."""
        self._file.close()

    def _recover(self) -> None:
        for line in self.read().splitlines(keepends=True):
            if not line.endswith(b"\n") or read_object(line) is None:
                break
            self.rows += 1
            self.num_bytes += len(line)
        self._file.truncate(self.num_bytes)
