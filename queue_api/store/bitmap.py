"""A growing set of small numbers, in the bit order of Redis bitmaps."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Bitmap"]


class Bitmap:
    """Which of the numbers from 0 on are in the set; one bit each."""

    def __init__(self, raw: bytes = b"") -> None:
        self._bits = bytearray(raw)
        self._count = int.from_bytes(raw, "big").bit_count()

    def __contains__(self, index: int) -> bool:
        place = index >> 3
        return place < len(self._bits) and bool(self._bits[place] & (0x80 >> (index & 7)))

    def __len__(self) -> int:
        return self._count

    def add(self, index: int) -> bool:
        """True if it wasn't in the set."""
        if index in self:
            return False
        place = index >> 3
        if place >= len(self._bits):
            # doubled, so that a million additions don't copy a million times
            self._bits.extend(bytes(max(place + 1 - len(self._bits), len(self._bits))))
        self._bits[place] |= 0x80 >> (index & 7)
        self._count += 1
        return True

    def missing(self, end: int, start: int = 0) -> Iterator[int]:
        """The numbers from `start` to before `end` that aren't in the set."""
        for index in range(start, end):
            if index not in self:
                yield index
