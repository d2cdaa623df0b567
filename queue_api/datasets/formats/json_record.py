"""A line of JSON to its columns, as they were written and each checked on its own; and back."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from queue_api.datasets.formats.record import RawJson, Record
from queue_api.datasets.formats.text_lines import MAX_LINE_BYTES
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import HALF_PAIR

__all__ = ["MAX_COLUMN_DEPTH", "JsonRecordReader", "dump_row"]

MAX_COLUMN_DEPTH = 128
"""Levels: what reads JSON has limits of its own, from 200 on."""
EXACT_DIGITS = 15
"""Decimals of so many characters come back from a float as they were."""
_MAY_BE_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},:]|[^\s"\[\]{},:]+', re.DOTALL)


class JsonRecordReader:
    """Reads lines, one at a time."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_float=self._float,
            parse_int=self._int,
            parse_constant=self._constant,
        )
        self._inexact = False
        self._twice = False
        self._wrong = ""

    def read(self, line: bytes | None, number: int = 1) -> Record:
        """The line's columns; whatever is wrong stands in `error`."""
        record = self._read(line)
        record.number, record.raw = number, line
        return record

    def _read(self, line: bytes | None) -> Record:
        if line is None:
            return Record(error=InvalidRequestError(f"longer than {MAX_LINE_BYTES} bytes"))
        try:
            # within a file, a byte order mark is where another file was put behind it
            text = line.removeprefix(codecs.BOM_UTF8).decode()
            if _depth(text) > MAX_COLUMN_DEPTH + 1:
                return self._one_by_one(text)
            columns = self._decode(text)
            if not isinstance(columns, dict):
                return Record(error=_no_object(text))
            if self._inexact or self._twice or self._wrong or _has_half_pair(text):
                return self._one_by_one(text)
        except ValueError as error:
            return Record(error=InvalidRequestError(f"not JSON: {error}"))
        return Record(shown=columns, read=columns)

    def _decode(self, text: str) -> Any:
        self._inexact = self._twice = False
        self._wrong = ""
        return self._decoder.decode(text)

    def _one_by_one(self, text: str) -> Record:
        """:raises ValueError: the line isn't JSON"""
        if not text.lstrip().startswith("{"):
            return Record(error=_no_object(text))
        found, twice, wrong = Record(), set[str](), list[str]()
        for name, raw in _parts(text):
            complaint = self._take(name, raw, found)
            if complaint:
                wrong.append(complaint)
            elif self._twice:
                twice.add(name)
        found.ambiguous = frozenset(twice)
        if wrong:
            found.error = InvalidRequestError(wrong[0])
        return found

    def _take(self, name: str, raw: str, found: Record) -> str:
        """Add a column to those found; or say what is wrong with it."""
        if _is_half(name):
            return f"the column name {name!r:.80} has {HALF_PAIR}"
        if name in found.shown:
            return f"the column {name!r:.80} is there twice"
        if _depth(raw) > MAX_COLUMN_DEPTH:
            return f"column {name!r:.80} is nested deeper than {MAX_COLUMN_DEPTH} levels"
        value = self._decode(raw)
        if self._wrong:
            return f"not JSON: {self._wrong.replace('COLUMN', repr(name)[:80])}"
        if _has_half_pair(raw):
            if name == "id" and isinstance(value, str):
                shown_id = value.encode(errors="backslashreplace").decode()
                found.shown[name] = found.read[name] = shown_id
            return f"column {name!r:.80} has {HALF_PAIR}"
        found.read[name] = value
        found.shown[name] = RawJson(raw) if self._inexact or self._twice else value
        return ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            self._twice = True
        return found

    def _float(self, text: str) -> float:
        number = float(text)
        if len(text) > EXACT_DIGITS or "e" in text or "E" in text:
            if number in (float("inf"), float("-inf")):
                self._wrong = self._wrong or f"{text[:20]} is too large a number"
            elif Decimal(text) != Decimal(repr(number)):
                self._inexact = True
        return number

    def _int(self, text: str) -> int:
        try:
            return int(text)
        except ValueError:  # Python's guard against thousands of digits
            self._wrong = self._wrong or f"{text[:20]} is too large a number"
            return 0

    def _constant(self, name: str) -> None:
        self._wrong = self._wrong or f"{name} in column COLUMN isn't a number that JSON knows"


def dump_row(row: Mapping[str, Any]) -> bytes:
    """One line of JSON with its end, in UTF-8."""
    try:
        if not any(isinstance(value, RawJson) for value in row.values()):
            return to_json(row) + b"\n"
    except PydanticSerializationError:
        pass  # a column of which it can't be said in UTF-8
    columns = (_dumped(name) + b":" + _dumped(value) for name, value in row.items())
    return b"{" + b",".join(columns) + b"}\n"


def _dumped(value: Any) -> bytes:
    if isinstance(value, RawJson):
        return value.encode()
    try:
        return to_json(value)
    except PydanticSerializationError:
        # half a surrogate pair: JSON can say it, UTF-8 can't
        return json.dumps(value, separators=(",", ":")).encode()


def _no_object(text: str) -> InvalidRequestError:
    return InvalidRequestError(f"not an object but {text!r:.60}")


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of each column, without recursion.

    :raises ValueError: the line isn't JSON
    """
    depth, name, start, end = 0, None, -1, -1
    for token in _TOKEN.finditer(text):
        first = token[0][0]
        if depth == 1 and first in ",}":
            if name is not None:
                yield _name_of(name), text[start:end]
            name, start = None, -1
        elif depth == 1 and name is None:
            name = token[0]
        elif depth >= 1 and not (depth == 1 and first == ":" and start < 0):
            start, end = (token.start() if start < 0 else start), token.end()
        depth += (first in "[{") - (first in "]}")
    if depth:
        raise ValueError("it ends within an object or a list")


def _name_of(token: str) -> str:
    name = json.loads(token)
    if not isinstance(name, str):
        raise ValueError(f"{token:.20} isn't the name of a column")
    return name


def _depth(text: str) -> int:
    """How deep lists and objects are nested; 0 where it takes no look to see that it isn't much."""
    if text.count("[") + text.count("{") <= MAX_COLUMN_DEPTH:
        return 0
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        first = token[0][0]
        depth += (first in "[{") - (first in "]}")
        deepest = max(deepest, depth)
    return deepest


def _has_half_pair(text: str) -> bool:
    """Whether a text in this JSON isn't Unicode; of a key that is there twice, both count."""
    if "\\u" not in text or not _MAY_BE_HALF.search(text):
        return False
    tokens = (token[0] for token in _TOKEN.finditer(text))
    return any(
        _is_half(json.loads(token))
        for token in tokens
        if token[0] == '"' and _MAY_BE_HALF.search(token)
    )


def _is_half(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
