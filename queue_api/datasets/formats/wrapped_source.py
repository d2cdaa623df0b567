"""WrappedSource: another source's rows, changed or chosen."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from queue_api.datasets.formats.row_source import RowSource

if TYPE_CHECKING:
    import pyarrow

__all__ = ["WrappedSource"]


class WrappedSource(RowSource):
    """A source that is as another one in all that it doesn't say itself."""

    def __init__(self, whole: RowSource) -> None:
        super().__init__()
        self._whole = whole
        self.unit = whole.unit

    @property
    def name(self) -> str:
        return self._whole.name

    @property
    def is_repeatable(self) -> bool:
        return self._whole.is_repeatable

    @property
    def waits(self) -> bool:
        return self._whole.waits

    @property
    def before_waiting(self) -> Callable[[], None]:
        return self._whole.before_waiting

    @before_waiting.setter
    def before_waiting(self, call: Callable[[], None]) -> None:
        self._whole.before_waiting = call

    def place(self, number: int) -> str:
        return self._whole.place(number)

    def advice(self, lines: Sequence[bytes | None]) -> str:
        return self._whole.advice(lines)

    def count(self) -> int | None:
        return self._whole.count()

    def schema(self) -> pyarrow.Schema | None:
        return self._whole.schema()

    def identity(self) -> list[str]:
        return self._whole.identity()

    def is_same_file(self, info: os.stat_result) -> bool:
        return self._whole.is_same_file(info)

    @property
    def can_interrupt(self) -> bool:
        return self._whole.can_interrupt

    def interrupt(self) -> None:
        self._whole.interrupt()

    def close(self) -> None:
        self._whole.close()
