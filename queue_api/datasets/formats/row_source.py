"""RowSource: the seam behind which inputs stand."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from queue_api.datasets.formats.record import Record

if TYPE_CHECKING:
    import pyarrow

__all__ = ["RowSource"]


class RowSource(ABC):
    """Rows of an input, in order, in bounded memory.

    What can't be read of one row stands in that record's `error`; what ends all reading is raised
    as DatasetError.
    """

    unit = "line"
    """What `Record.number` counts."""

    def __init__(self) -> None:
        self._before_waiting: Callable[[], None] = lambda: None

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """The rows from the first on; of an input that isn't repeatable, once.

        May wait for input, so it is for a thread where that is a pipe.

        :raises DatasetError: the input can't be read on
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """As the user gave it."""

    @property
    @abstractmethod
    def is_repeatable(self) -> bool:
        """True if `records` can be had more than once."""

    @property
    @abstractmethod
    def waits(self) -> bool:
        """True if `records` may have to wait for input to come."""

    @property
    def before_waiting(self) -> Callable[[], None]:
        """Called in the reading thread before it waits for more input to come."""
        return self._before_waiting

    @before_waiting.setter
    def before_waiting(self, call: Callable[[], None]) -> None:
        self._before_waiting = call

    def place(self, number: int) -> str:
        """What to call the row with that number in a message."""
        return f"{self.unit} {number}"

    def advice(self, lines: Sequence[bytes | None]) -> str:  # noqa: ARG002
        """What to say of an input none of whose first rows can be read, if it looks like something
        else than it was taken for; or nothing.

        :param lines: the beginning of each such row's text, as far as they have one
        """
        return ""

    def count(self) -> int | None:
        """How many rows there are, blank and wrong ones as `records` has them; None if only reading
        them once would tell.

        :raises DatasetError: the input can't be read
        """
        return sum(1 for _ in self.records()) if self.is_repeatable else None

    def schema(self) -> pyarrow.Schema | None:
        """The columns' types as the input says them; None where it says none, as text does, or
        where only reading it once would tell.

        :raises DatasetError: the input can't be read
        """
        return None

    @abstractmethod
    def identity(self) -> list[str]:
        """What tells this content from another; of files, without reading all of them."""

    @abstractmethod
    def is_same_file(self, info: os.stat_result) -> bool:
        """True if what is written there is read here."""

    @property
    def can_interrupt(self) -> bool:
        """False if `records` may wait for something that nobody can end."""
        return True

    @abstractmethod
    def interrupt(self) -> None:
        """Make a `records` that waits for input end; for other threads than its own."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the input."""
