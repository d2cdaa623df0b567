"""WrittenAnswers: what a pass that is done said to each row, read where it is kept."""

from __future__ import annotations

import json
import mmap
from array import array
from pathlib import Path
from typing import Any

__all__ = ["WrittenAnswers"]

_NONE = 2**64 - 1


class WrittenAnswers:
    """The lines of a pass that is done, found by row; 8 bytes each are held."""

    def __init__(self, path: Path) -> None:
        self._places = array("Q")
        place = 0
        with path.open("rb") as file:
            for line in file:
                row = json.loads(line)["row"]
                if row >= len(self._places):
                    self._places.extend([_NONE] * (row + 1 - len(self._places)))
                self._places[row] = place
                place += len(line)
            # its rows are read in another order than it has them: each a seek and a read otherwise
            self._content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if place else b""

    def get(self, row: int) -> dict[str, Any] | None:
        """What the file has of a row."""
        if row >= len(self._places) or self._places[row] == _NONE:
            return None
        place = self._places[row]
        end = self._content.find(b"\n", place)
        found: dict[str, Any] = json.loads(self._content[place:end])
        return found

    def close(self) -> None:
        """Let go of the file."""
        if isinstance(self._content, mmap.mmap):
            self._content.close()
