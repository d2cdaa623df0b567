"""Each running sequence's range of slots: how long it is, how it grows, and when it moves.

A range begins with room for what is there and some more, for most sequences end before
`max_tokens`, and grows while the sequence does::

    slots    | prompt, new tokens | headroom | free, another's, or an ended one's |
    length   num_tokens + headroom, or an even share of all slots if that is more
    grows    in place into what is free or an ended one's; else by moving to a longer free range

With slots for all places at full length the share is the whole sequence, so nothing ever moves.
"""

from __future__ import annotations

from engine.batch import CacheCopy
from engine.requests.sequence import Sequence
from engine.scheduling.prefix_cache import PrefixCache
from engine.scheduling.slots import SlotAllocator

__all__ = ["HEADROOM", "SlotRanges"]

HEADROOM = 16
"""Tokens that a range has room for beyond those that are there, at least."""


class SlotRanges:
    """Opens, grows and closes the ranges of running sequences.

    A sequence in flight is never moved: what is in flight names its slots.

    :param prefixes: what of `allocator` is held, if sequences share prefixes
    :param num_places: sequences that may run at once
    """

    def __init__(
        self, allocator: SlotAllocator, prefixes: PrefixCache | None, num_places: int
    ) -> None:
        self._allocator = allocator
        self._prefixes = prefixes
        self._share = allocator.num_slots // num_places

    def open(self, sequence: Sequence) -> bool:
        """Give a sequence a range for its tokens and headroom; False if there is none."""
        if not self._place(sequence):
            return False
        if self._prefixes is not None:
            self._prefixes.hold(sequence)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """See that all tokens of a sequence, not in flight, have a slot; False if there is none.

        If it moves, its next micro-batch copies what is cached.
        """
        if self._extend(sequence):
            return True
        source = sequence.first_slot
        if not self._place(sequence):
            return False
        self._allocator.free(source)
        if self._prefixes is not None:
            self._prefixes.moved(sequence)
        if sequence.num_cached:
            destination, length = sequence.first_slot, sequence.num_cached
            sequence.copy = CacheCopy(source, destination, length, is_move=True)
        return True

    def close(self, sequence: Sequence) -> None:
        """Take a sequence's range back; what it holds may be retained."""
        if self._prefixes is not None:
            self._prefixes.free(sequence)
        else:
            self._allocator.free(sequence.first_slot)
        sequence.first_slot, sequence.num_slots = -1, 0

    def _lengths(self, sequence: Sequence) -> tuple[int, int]:
        """How long its range should be, and what will do.

        One that was preempted has shown that it is long: it waits for its whole length, and with it
        those behind. Given less it would be preempted over and over.
        """
        if sequence.is_preempted:
            return sequence.capacity, sequence.capacity
        least = sequence.num_tokens + max(HEADROOM, sequence.num_tokens // 4)
        return min(sequence.capacity, max(least, self._share)), min(sequence.capacity, least)

    def _extend(self, sequence: Sequence) -> bool:
        """Lengthen a range in place, into slots that are free or an ended sequence's."""
        if sequence.num_slots >= sequence.num_tokens:
            return True
        first, length = sequence.first_slot, self._lengths(sequence)[0]
        sequence.num_slots = self._allocator.extend(first, length)
        while sequence.num_slots < sequence.num_tokens:
            if self._prefixes is None or not self._prefixes.evict_at(first + sequence.num_slots):
                return False
            sequence.num_slots = self._allocator.extend(first, length)
        return True

    def _place(self, sequence: Sequence) -> bool:
        """Find a sequence a new range, if need be at the cost of ended ones."""
        prefixes = self._prefixes
        for length in self._lengths(sequence):
            retained = 0 if prefixes is None else prefixes.num_retained
            if self._allocator.num_free + retained < length:
                continue  # Others have to end first: to evict would win nothing.
            first_slot = self._allocator.allocate(length)
            while first_slot is None and prefixes is not None and prefixes.evict():
                first_slot = self._allocator.allocate(length)
            if first_slot is not None:
                sequence.first_slot, sequence.num_slots = first_slot, length
                return True
        return False
