"""A growing set of small numbers, in the bit order of Redis bitmaps."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Bitmap"]


_FULL = b"\xff" * 1024


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

    def count_below(self, end: int) -> int:
        """How many numbers from 0 to before `end` are in the set."""
        whole, rest = divmod(end, 8)
        count = int.from_bytes(self._bits[:whole], "big").bit_count()
        return count + sum(index in self for index in range(end - rest, end))

    def missing(self, end: int, start: int = 0) -> Iterator[int]:
        """The numbers from `start` to before `end` that aren't in the set."""
        place, last = start >> 3, (end + 7) >> 3
        while place < last:
            byte = self._bits[place] if place < len(self._bits) else 0
            if byte == 0xFF:
                # most of a run is done: so many numbers at a glance
                place = self._not_full(place, last)
                continue
            for index in range(max(start, place << 3), min(end, (place + 1) << 3)):
                if not byte & (0x80 >> (index & 7)):
                    yield index
            place += 1

    def _not_full(self, place: int, last: int) -> int:
        """The next byte, from `place` on, in which something is missing; `last` if none is."""
        while self._bits.startswith(_FULL, place) and place + len(_FULL) <= last:
            place += len(_FULL)
        while place < last and place < len(self._bits) and self._bits[place] == 0xFF:
            place += 1
        return place
