"""RowSelection: which rows of an input are asked for, and in which order."""

from __future__ import annotations

import heapq
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from queue_api.wire.errors import ConfigurationError

__all__ = ["RowSelection"]

_KEYS = 2**64


@dataclass(frozen=True)
class RowSelection:
    """A sample of the rows, then perhaps shuffled, then the first so many of them.

    The same rows of the same input for the same seed; a larger sample has those of a smaller one.

    :raises ConfigurationError: a number that is out of range, or two that exclude each other
    """

    limit: int | None = None
    """At most so many rows."""
    sample: int | None = None
    """So many rows, drawn at random."""
    sample_percent: float | None = None
    """Each row with this probability."""
    shuffle: bool = False
    """Ask in another order than the input's."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, number in (("limit", self.limit), ("sample", self.sample)):
            if number is not None and number < 1:
                raise ConfigurationError(f"the {name} is {number}: must be at least 1")
        if self.sample_percent is not None and not 0 < self.sample_percent <= 100:
            raise ConfigurationError(
                f"the sample is {self.sample_percent:g}%: must be more than 0 and at most 100"
            )
        if self.sample is not None and self.sample_percent is not None:
            raise ConfigurationError("give a number of rows to sample or a percentage, not both")

    @property
    def is_all(self) -> bool:
        """True if it takes every row, in order."""
        return self == RowSelection(seed=self.seed)

    @property
    def needs_count(self) -> bool:
        """True if how many rows there are has to be known first, as of a pipe it isn't."""
        return self.shuffle or self.sample is not None

    def identity(self) -> list[str]:
        """What tells it from others; nothing if it takes every row."""
        return [] if self.is_all else [json.dumps(asdict(self))]

    def numbers(self, total: int) -> Sequence[int]:
        """The rows of an input of `total` in the order in which they are asked for; 8 bytes each,
        besides those of the sample."""
        chosen: Sequence[int] = range(total)
        if self.sample is not None:
            drawn = heapq.nsmallest(self.sample, chosen, key=self._key)
            chosen = array("Q", sorted(drawn))
        elif self.sample_percent is not None:
            chosen = array("Q", filter(self.draws, chosen))
        if self.shuffle:
            mixed = array("Q", chosen)
            random.Random(self.seed).shuffle(mixed)
            chosen = mixed
        return chosen if self.limit is None else chosen[: self.limit]

    def passing(self) -> Iterator[bool]:
        """For each row in order whether it is taken, until there can be no more; where no count is
        needed."""
        number = taken = 0
        while self.limit is None or taken < self.limit:
            is_taken = self.sample_percent is None or self.draws(number)
            yield is_taken
            taken += is_taken
            number += 1

    def draws(self, number: int) -> bool:
        """True if the percentage takes that row."""
        return self._key(number) * 100 < (self.sample_percent or 0) * _KEYS

    def _key(self, number: int) -> int:
        """A random number of 64 bits of a row's; SplitMix64 (Steele, Lea and Flood, 2014)."""
        mixed = (self.seed * 0xD1342543DE82EF95 + number * 0x9E3779B97F4A7C15 + 1) % _KEYS
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % _KEYS
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % _KEYS
        return mixed ^ mixed >> 31
