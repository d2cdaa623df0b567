"""ByteSource: the seam behind which a format of inputs stands."""

from __future__ import annotations

import os
from collections.abc import Callable

from queue_api.datasets.formats.byte_input import ByteInput
from queue_api.datasets.formats.row_source import RowSource

__all__ = ["ByteSource"]


class ByteSource(RowSource):
    """Rows of bytes in one format: a class of this kind, and its place in `opening.FORMATS`."""

    def __init__(self, data: ByteInput) -> None:
        super().__init__()
        self.data = data

    @classmethod
    def fits(cls, start: bytes, name: str) -> bool:  # noqa: ARG003
        """True if an input that begins so, and is called so, is in this format.

        :param start: at least the first line, or some thousand bytes, or all there is; unpacked,
            and text in UTF-8
        :param name: without a compression's suffix
        """
        return False

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def is_repeatable(self) -> bool:
        return self.data.is_repeatable

    @property
    def waits(self) -> bool:
        return self.data.waits

    @property
    def before_waiting(self) -> Callable[[], None]:
        return self.data.before_waiting

    @before_waiting.setter
    def before_waiting(self, call: Callable[[], None]) -> None:
        self.data.before_waiting = call

    def identity(self) -> list[str]:
        return self.data.identity()

    def is_same_file(self, info: os.stat_result) -> bool:
        return self.data.is_same_file(info)

    def interrupt(self) -> None:
        self.data.interrupt()

    def close(self) -> None:
        self.data.close()
