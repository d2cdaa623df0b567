"""Lines of blocks of bytes, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from queue_api.datasets.formats.text_encoding import Utf8Encoder

__all__ = ["MAX_LINE_BYTES", "Line", "LineSplitter", "lines_of"]

MAX_LINE_BYTES = 16 * 2**20

Line = tuple[int, bytes | None]
"""(number from 1, UTF-8 without the line's end); None for one beyond MAX_LINE_BYTES."""


class LineSplitter:
    """Makes lines of blocks. Lines end in LF, CR LF or, where there is no LF, in CR.

    UTF-16 and UTF-32 become UTF-8. A line beyond MAX_LINE_BYTES is read past, never held. Blank
    lines are counted and left out.
    """

    def __init__(self) -> None:
        self._number = 0
        self._rest = b""
        self._too_long = False
        self._encoder = Utf8Encoder()
        self._ends_in_cr: bool | None = None
        """None: no end of a line has been seen yet."""

    def feed(self, block: bytes) -> list[Line]:
        """The lines that end in this block."""
        return self._split(self._encoder.feed(block))

    def finish(self) -> list[Line]:
        """The last line, if it has no end."""
        last = self._split(self._encoder.finish())
        if self._too_long or self._rest.strip():
            last.append((self._number + 1, None if self._too_long else self._rest))
        return last

    def _split(self, block: bytes) -> list[Line]:
        data = self._rest + block
        if self._ends_in_cr is None:
            if b"\n" in block:
                self._ends_in_cr = False
            elif b"\r" in data[:-1]:
                self._ends_in_cr = True
        if self._ends_in_cr:
            data = data.replace(b"\r", b"\n")
        *lines, rest = data.split(b"\n")
        found: list[Line] = []
        for line in lines:
            self._number += 1
            if self._too_long or len(line) > MAX_LINE_BYTES:
                found.append((self._number, None))
            elif line.strip():
                found.append((self._number, line))
            self._too_long = False
        if self._too_long or len(rest) > MAX_LINE_BYTES:
            rest, self._too_long = b"", True
        self._rest = rest
        return found


def lines_of(blocks: Iterable[bytes]) -> Iterator[Line]:
    """Each line that isn't blank."""
    splitter = LineSplitter()
    for block in blocks:
        yield from splitter.feed(block)
    yield from splitter.finish()
