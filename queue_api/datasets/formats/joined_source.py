"""Several inputs as one sequence of rows."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource

if TYPE_CHECKING:
    import pyarrow

__all__ = ["JoinedSource"]


class JoinedSource(RowSource):
    """The rows of one file after those of the other; each file is open while it is read.

    Numbers of records go on from file to file, and `place` says which it was.

    :param name: what the user gave
    :param files: at least two, none of which is read only once
    :param waits: whether one of them may have to wait for input to come
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        open_one: Callable[[str], RowSource],
        *,
        waits: bool,
    ) -> None:
        super().__init__()
        self._waits = waits
        self._name = name
        self._files = files
        self._open_one = open_one
        self._current: RowSource | None = None
        self._begun: list[tuple[int, Callable[[int], str]]] = []
        """Of each file that has been read: the last number before it, and its `place`."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def is_repeatable(self) -> bool:
        return True

    @property
    def waits(self) -> bool:
        return self._waits

    def records(self) -> Iterator[Record]:
        before = 0
        for place, file in enumerate(self._files):
            with closing(self._open_one(file)) as source:
                self._current = source
                source.before_waiting = self._before_waiting
                if place == len(self._begun):
                    self._begun.append((before, source.place))
                number = 0
                for record in source.records():
                    number = record.number
                    record.number += before
                    yield record
                before += number

    def place(self, number: int) -> str:
        found = bisect_left(self._begun, number, key=lambda begun: begun[0]) - 1
        if found < 0:
            return super().place(number)
        before, place = self._begun[found]
        return f"{self._files[found]}, {place(number - before)}"

    def count(self) -> int | None:
        total = 0
        for source in self._sources():
            total += source.count() or 0
        return total

    def schema(self) -> pyarrow.Schema | None:
        """That of all files, each column of which may be missing in some; None if a column has
        types that don't go together."""
        schemas = []
        for source in self._sources():
            schema = source.schema()
            if schema is None:
                return None
            if schema not in schemas:
                schemas.append(schema)
        if len(schemas) == 1:
            return schemas[0]
        import pyarrow

        try:
            return pyarrow.unify_schemas(schemas)
        except pyarrow.ArrowException:
            return None

    def identity(self) -> list[str]:
        return [part for source in self._sources() for part in source.identity()]

    def is_same_file(self, info: os.stat_result) -> bool:
        return any(source.is_same_file(info) for source in self._sources())

    def interrupt(self) -> None:
        if self._current is not None:
            self._current.interrupt()

    def close(self) -> None:
        """Files are closed when they have been read."""

    def _sources(self) -> Iterator[RowSource]:
        for file in self._files:
            with closing(self._open_one(file)) as source:
                yield source
