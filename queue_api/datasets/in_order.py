"""Answered rows in the order of the input."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from queue_api.datasets.columns import Row

__all__ = ["InOrder"]


class InOrder:
    """Holds answered rows back until all before them are written.

    How many that may be, whoever asks for rows decides: a row that is held counts as one that is
    still asked for.

    :param is_written: whether a row is in the output already
    """

    def __init__(self, is_written: Callable[[int], bool]) -> None:
        self._is_written = is_written
        self._next = 0
        self._held: dict[int, tuple[Row, bytes]] = {}
        self._arrived: deque[tuple[str, int]] = deque()
        """Entry of the stream and index of each, as they came."""
        self._through: str | None = None
        self._unplaced = 0

    def __len__(self) -> int:
        return len(self._held)

    def put(self, row: Row, raw: bytes, entry: str | None) -> None:
        """Take an answered row.

        :param entry: where in the stream its result stands; None: an earlier process read it there
        """
        self._held[row.index] = (row, raw)
        self._unplaced += entry is None
        self._arrived.append((entry or "", row.index))

    def take(self) -> list[tuple[Row, bytes]]:
        """The rows whose turn it is; they count as written from now on."""
        found = []
        while True:
            if self._next in self._held:
                found.append(self._held.pop(self._next))
            elif not self._is_written(self._next):
                break
            self._next += 1
        return found

    def through(self) -> str | None:
        """Up to which entry of the stream all rows have been taken, as far as that is known."""
        while self._arrived and self._arrived[0][1] not in self._held:
            entry, _ = self._arrived.popleft()
            self._unplaced -= not entry
            # an entry holds several results
            if entry and not (self._arrived and self._arrived[0][0] == entry):
                self._through = entry
        return None if self._unplaced else self._through
