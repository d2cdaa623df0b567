"""ChosenSource: the rows of another source that a selection takes, in its order."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice

from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.formats.wrapped_source import WrappedSource
from queue_api.datasets.row_selection import RowSelection
from queue_api.wire.errors import DatasetError

__all__ = ["ChosenSource"]

MOST_READ_TO_COUNT = 10_000


class ChosenSource(WrappedSource):
    """Records with the number of their row in the whole input; memory for 8 bytes a row.

    A shuffled input is read once, into an unnamed temporary file of about its size, and from there
    in the other order.

    :raises DatasetError: the input can be read only once, and the selection needs more
    """

    def __init__(
        self, whole: RowSource, selection: RowSelection, numbers: Sequence[int] | None = None
    ) -> None:
        """:param numbers: the rows, if they are known; ascending unless it shuffles"""
        if selection.needs_count and not whole.is_repeatable:
            what = "shuffled" if selection.shuffle else "sampled by a number of rows"
            raise DatasetError(
                f"{whole.name} can be read only once, and so can't be {what}: write it into a file "
                "first, or sample a percentage"
            )
        super().__init__(whole)
        self._selection = selection
        self._numbers = numbers
        self._is_listed = selection.needs_count or numbers is not None
        self._is_interrupted = False

    @property
    def numbers(self) -> Sequence[int]:
        """The rows that are taken, in the order in which they come; the last ones may not be there.

        Reads all of the input, but for a limit alone.

        :raises DatasetError: it can't be read
        """
        if self._numbers is None:
            is_of_all = self._selection.needs_count or self._selection.sample_percent is not None
            total = (self._whole.count() if is_of_all else self._selection.limit) or 0
            self._numbers = self._selection.numbers(total)
        return self._numbers

    def records(self) -> Iterator[Record]:
        self._is_interrupted = False
        if self._selection.shuffle:
            yield from self._shuffled()
            return
        rows = zip(self._takes(), self._numbered(), strict=False)
        yield from (record for is_taken, record in rows if is_taken)

    def count(self) -> int | None:
        if not self.is_repeatable:
            return None
        if self._is_listed or self._selection.sample_percent is not None:
            return len(self.numbers)
        limit = self._selection.limit or 0
        if limit > MOST_READ_TO_COUNT:  # then to count all of them is cheaper than to read these
            return min(limit, self._whole.count() or 0)
        return sum(1 for _ in islice(self._whole.records(), limit))

    @property
    def waits(self) -> bool:
        return self._whole.waits or self._selection.needs_count

    def identity(self) -> list[str]:
        return [*self._whole.identity(), *self._selection.identity()]

    def interrupt(self) -> None:
        self._is_interrupted = True
        self._whole.interrupt()

    def _numbered(self) -> Iterator[Record]:
        for number, record in enumerate(self._whole.records()):
            record.row = number
            yield record

    def _takes(self) -> Iterator[bool]:
        if not self._is_listed:
            yield from self._selection.passing()
            return
        end = 0
        for number in self.numbers:
            yield from (False for _ in range(number - end))
            yield True
            end = number + 1

    def _shuffled(self) -> Iterator[Record]:
        numbers = self.numbers
        places = array("Q", [_UNWANTED]) * (max(numbers, default=-1) + 1)
        """By row, where in the file it is."""
        for number in numbers:
            places[number] = _WANTED
        with tempfile.TemporaryFile() as file:
            for number, record in enumerate(islice(self._numbered(), len(places))):
                if self._is_interrupted:
                    return
                if places[number] == _WANTED:
                    places[number] = file.tell()
                    pickle.dump(record, file, protocol=pickle.HIGHEST_PROTOCOL)
            for number in numbers:
                if places[number] == _WANTED:
                    raise DatasetError(f"{self.name} became shorter while it was read")
                file.seek(places[number])
                yield pickle.load(file)


_UNWANTED, _WANTED = 2**64 - 1, 2**64 - 2
