"""RowNumbers: which row of the input each request of a run is of."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from queue_api.datasets.chosen_source import ChosenSource
from queue_api.datasets.columns import Row
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.formats.row_sink import RowSink
from queue_api.store.bitmap import Bitmap

__all__ = ["RowNumbers", "chosen_rows"]


class RowNumbers:
    """A request's index in its run, and its row's number in the input; the same if no rows were
    chosen. Of a pipe the number is known once the row was read."""

    def __init__(self, data: DatasetInput) -> None:
        self._data = data
        self.is_all = not isinstance(data.chosen, ChosenSource)
        self._read = array("Q")
        self._known: Sequence[int] = self._read
        if isinstance(data.chosen, ChosenSource) and data.chosen.is_repeatable:
            self._known = data.chosen.numbers

    def note(self, row: Row) -> None:
        """Remember a row that was read."""
        if self._known is self._read and not self.is_all:
            self._read.append(row.row)

    def of(self, index: int) -> int | None:
        """The number of a request's row; None if it isn't known."""
        if self.is_all:
            return index
        return self._known[index] if index < len(self._known) else None

    def written(self, sink: RowSink) -> tuple[int, int]:
        """How many of the rows are in an output, and how many of those have an error."""
        if self.is_all:
            return sink.rows, sink.errors
        is_chosen = chosen_rows(self._data)
        there = [row for row in range(sink.end) if row in sink and is_chosen(row)]
        return len(there), sum(map(sink.has_error, there))


def chosen_rows(data: DatasetInput) -> Callable[[int], bool]:
    """Tells the numbers of rows that are asked for; of a pipe's, nobody knows, and all count."""
    if not isinstance(data.chosen, ChosenSource) or not data.chosen.is_repeatable:
        return lambda _: True
    numbers = data.chosen.numbers
    if isinstance(numbers, range):
        return numbers.__contains__
    known = Bitmap()
    for number in numbers:
        known.add(number)
    return known.__contains__
