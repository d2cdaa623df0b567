"""Lines of blocks of bytes, in bounded memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator

__all__ = ["MAX_LINE_BYTES", "Line", "LineSplitter", "lines_of"]

MAX_LINE_BYTES = 16 * 2**20

Line = tuple[int, bytes | None]
"""(number from 1, UTF-8 without the line's end); None for one beyond MAX_LINE_BYTES."""


class LineSplitter:
    """Makes lines of blocks. Lines end in LF, CR LF or, where there is no LF, in CR.

    UTF-16 and UTF-32 are known by their byte order mark or their zeros, and become UTF-8. A line
    beyond MAX_LINE_BYTES is read past, never held. Blank lines are counted and left out.
    """

    def __init__(self) -> None:
        self._number = 0
        self._rest = b""
        self._too_long = False
        self._has_begun = False
        self._decoder: codecs.IncrementalDecoder | None = None
        self._ends_in_cr: bool | None = None
        """None: no end of a line has been seen yet."""

    def feed(self, block: bytes) -> list[Line]:
        """The lines that end in this block."""
        if not self._has_begun:
            self._rest += block
            if len(self._rest) < 4:
                return []
            block = self._begin()
        return self._split(self._in_utf8(block))

    def finish(self) -> list[Line]:
        """The last line, if it has no end."""
        block = b"" if self._has_begun else self._begin()
        last = self._split(self._in_utf8(block, final=True))
        if self._too_long or self._rest.strip():
            last.append((self._number + 1, None if self._too_long else self._rest))
        return last

    def _begin(self) -> bytes:
        """Look which encoding it is; returns what is there of the first line."""
        self._has_begun = True
        start, self._rest = self._rest, b""
        encoding = json.detect_encoding(start)
        if encoding.startswith(("utf-16", "utf-32")):
            self._decoder = codecs.getincrementaldecoder(encoding)(errors="surrogatepass")
        # a byte order mark isn't part of the first line
        return start.removeprefix(codecs.BOM_UTF8)

    def _in_utf8(self, block: bytes, *, final: bool = False) -> bytes:
        if self._decoder is None:
            return block
        try:
            return self._decoder.decode(block, final).encode(errors="surrogatepass")
        except UnicodeDecodeError:
            self._decoder.reset()
            return b"\xff"  # which isn't UTF-8 either, so that the line is told to be wrong

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
