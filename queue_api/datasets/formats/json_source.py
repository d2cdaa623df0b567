"""JSON values over any number of lines: an array of objects, or one object behind the other."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence

from queue_api.datasets.formats.byte_source import ByteSource
from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.text_encoding import utf8_blocks
from queue_api.datasets.formats.text_lines import MAX_LINE_BYTES
from queue_api.datasets.formats.unreadable import list_in_object
from queue_api.wire.errors import DatasetError

__all__ = ["JsonSource", "elements_of"]

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[\]{},]', re.DOTALL)
"""A string, with its end as group 1, or what gives JSON its structure. A line break, which no
string may hold, is left to the element's reader: it is met more often than a missing end."""
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("?)', re.DOTALL)
_ARRAY = re.compile(rb"\s*\[\s*([{\]]|$)")
"""One of objects: lines of a log begin so, too, and other lists are no rows."""
_OVER_LINES = re.compile(rb"\s*\{([^\n]*[,{\[])?[ \t]*\r?\n\s*(\"|$)")
"""An object as it is printed over several lines."""
_QUOTE, _COMMA = ord('"'), ord(",")
_OPENING, _CLOSING = b"[{", b"]}"


class JsonSource(ByteSource):
    """The elements of one array or of several, or objects that take several lines each.

    An element is found by its brackets and read by itself, so one that is wrong is one wrong row.
    """

    unit = "element"

    @classmethod
    def fits(cls, start: bytes, name: str) -> bool:  # noqa: ARG003
        return _ARRAY.match(start) is not None or _OVER_LINES.match(start) is not None

    def records(self) -> Iterator[Record]:
        reader = JsonRecordReader()
        for number, element in enumerate(elements_of(self.data.blocks(), self.name), 1):
            yield reader.read(element, number)

    def advice(self, lines: Sequence[bytes | None]) -> str:
        is_one = len(lines) == 1 and self.is_repeatable
        return list_in_object(self.name, self.data.start()) if is_one else ""

    def count(self) -> int | None:
        if not self.is_repeatable:
            return None
        return sum(1 for _ in elements_of(self.data.blocks(), self.name))


def elements_of(blocks: Iterable[bytes], name: str) -> Iterator[bytes | None]:
    """The text of each element of an array, or of each object where there is none.

    :param name: what to call the input
    :returns: None for one that is longer than MAX_LINE_BYTES
    :raises DatasetError: an array isn't closed, or is followed by something else
    """
    splitter = _Splitter(name)
    for block in utf8_blocks(blocks):
        yield from splitter.feed(block)
    yield from splitter.finish()


class _Splitter:
    """Finds where elements begin and end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._text = b""
        """From where the current element begins, or may begin."""
        self._scanned = 0
        """So much of it needn't be looked at again."""
        self._in_string = False
        self._outside: int | None = None
        """How many brackets are open between elements; None until the first one has come."""
        self._depth = 0
        self._number = 0
        """Of the elements found."""
        self._is_too_long = False

    def feed(self, block: bytes) -> Iterator[bytes | None]:
        """The elements that end in this block.

        :raises DatasetError: after an array comes something else
        """
        self._text += block
        start, scanned = 0, self._skip_string(self._text)
        for token in _TOKEN.finditer(self._text, scanned) if not self._in_string else ():
            scanned, first = token.end(), self._text[token.start()]
            if first == _QUOTE:
                if not token[1]:
                    self._in_string, scanned = True, token.start(1)
                    break
            elif first == _COMMA:
                if self._depth == 1 == self._outside:
                    yield self._element(start, token.start())
                    start = token.end()
            elif first in _OPENING:
                if self._depth == 0 and self._begin(first, self._text[start : token.start()]):
                    start = token.end()
                self._depth += 1
            elif self._depth > 1 or (self._depth == 1 and first == _CLOSING[self._outside != 1]):
                self._depth -= 1
                if self._depth == 0:
                    end = token.start() if self._outside == 1 else token.end()
                    if self._is_too_long or self._text[start:end].strip():
                        yield self._element(start, end)
                    start = token.end()
        self._keep(start, scanned)

    def finish(self) -> list[bytes | None]:
        """What is left.

        :raises DatasetError: it isn't the end
        """
        rest = self._text.strip()
        if self._outside == 1 and self._depth:
            raise DatasetError(
                f"{self._name} is a JSON array without its end, as of a file that was cut off: "
                f"it has {self._number:,} whole elements"
            )
        if self._outside == 1 and rest:
            raise self._stray(rest)
        return [self._element(0, len(self._text))] if rest or self._is_too_long else []

    def _skip_string(self, text: bytes) -> int:
        """Where to look on, after the string in which the last block ended."""
        if not self._in_string:
            return self._scanned
        rest = _REST_OF_STRING.match(text, self._scanned)
        assert rest is not None
        self._in_string = not rest[1]
        return rest.start(1) if self._in_string else rest.end()

    def _begin(self, bracket: int, before: bytes) -> bool:
        """Take the first bracket of an array or object; true if elements begin behind it."""
        is_array = bracket == _OPENING[0]
        if self._outside is None:
            self._outside = int(is_array)
        if self._outside == 1 and (not is_array or before.removeprefix(codecs.BOM_UTF8).strip()):
            raise self._stray(before.strip() or bytes([bracket]))
        return self._outside == 1

    def _element(self, start: int, end: int) -> bytes | None:
        self._number += 1
        is_too_long, self._is_too_long = self._is_too_long, False
        if is_too_long or end - start > MAX_LINE_BYTES:
            return None
        return self._text[start:end].strip()

    def _keep(self, start: int, scanned: int) -> None:
        """Let go of the text before the current element, and of that of one that is too long."""
        if len(self._text) - start > MAX_LINE_BYTES:
            start, self._is_too_long = scanned, True
        self._text, self._scanned = self._text[start:], scanned - start

    def _stray(self, text: bytes) -> DatasetError:
        return DatasetError(
            f"{self._name} goes on after its JSON array, which has {self._number:,} elements, "
            f"with {text[:40].decode(errors='replace')!r}"
        )
