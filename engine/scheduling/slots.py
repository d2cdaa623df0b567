"""The allocator of the KV pools' slots: the same ranges in every stage."""

from __future__ import annotations

import bisect

__all__ = ["SlotAllocator"]


class SlotAllocator:
    """Hands out contiguous ranges of slots, the lowest that fits.

    Invariant: `_free` holds the free ranges as (first, length), sorted, none empty and no two
    touching; free and used ranges together cover all slots exactly once.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free: list[tuple[int, int]] = [(0, num_slots)]
        self._used: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return self.num_slots - sum(self._used.values())

    def allocate(self, length: int) -> int | None:
        """First slot of a free range of `length` (at least 1), or None if there is none."""
        for i, (first, room) in enumerate(self._free):
            if room >= length:
                self._free[i : i + 1] = [(first + length, room - length)] if room > length else []
                self._used[first] = length
                return first
        return None

    def free(self, first: int) -> None:
        """Give back the range that `allocate` returned.

        :raises KeyError: if no range in use begins there
        """
        length = self._used.pop(first)
        i = bisect.bisect(self._free, (first, 0))
        end = first + length
        if i < len(self._free) and self._free[i][0] == end:
            end += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == first:
            i -= 1
            first = self._free.pop(i)[0]
        self._free.insert(i, (first, end - first))

    def extend(self, first: int, length: int) -> int:
        """Add free slots behind a range until it has `length`, or as far as they go.

        :returns: the range's new length; the old one if that is `length` or more
        :raises KeyError: if no range in use begins there
        """
        used = self._used[first]
        end = first + used
        i = bisect.bisect(self._free, (end, 0))
        if used >= length or i == len(self._free) or self._free[i][0] != end:
            return used
        room = self._free[i][1]
        taken = min(room, length - used)
        self._free[i : i + 1] = [(end + taken, room - taken)] if room > taken else []
        self._used[first] = used + taken
        return used + taken

    def shrink(self, first: int, length: int) -> None:
        """Give back all but the first `length` (at least 1) slots of a range.

        :raises KeyError: if no range in use begins there
        """
        rest = self._used[first] - length
        if rest:
            self._used[first] = length
            self._used[first + length] = rest
            self.free(first + length)
