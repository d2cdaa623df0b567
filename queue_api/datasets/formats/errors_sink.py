"""Rows with an error in a file of their own: beside the others, or besides."""

from __future__ import annotations

import itertools
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from queue_api.datasets.formats.digests import MODULUS
from queue_api.datasets.formats.json_record import dump_row
from queue_api.datasets.formats.jsonl_sink import JsonLinesSink
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.formats.row_sink import MadeRow, OutputFile, RowSink, WrittenRow

__all__ = ["ErrorRowsSink", "ErrorsApartSink", "ErrorsCopiedSink"]

_OF_THE_ERROR = (
    "error_code",
    "error",
    "finish_reason",
    "model",
    "model_revision",
    "fingerprint",
)


class ErrorRowsSink(JsonLinesSink):
    """Lines that say which row of the input has which error, and hold the row itself."""

    format = "errors"

    @staticmethod
    def dump(row: MadeRow) -> bytes:
        given = itertools.takewhile(lambda item: item[0] != "row", row.columns.items())
        line: dict[str, Any] = {"row": row.index, "line": row.number or None}
        line["id"] = row.columns["id"]
        line |= {name: row.columns[name] for name in _OF_THE_ERROR}
        line["input"] = {name: _plain(value) for name, value in given}
        if row.raw is not None:
            line["raw"] = row.raw.decode(errors="backslashreplace")
        return dump_row(line)


def _plain(value: Any) -> Any:
    """What JSON can say within an object; RawJson is a text there."""
    return str(value) if isinstance(value, str) else value


class _PairedSink(RowSink):
    """A sink and one for its rows with errors, as one."""

    def __init__(self, main: RowSink, errors: RowSink) -> None:
        super().__init__(main.name)
        self.main, self.errors_sink = main, errors
        self.is_durable, self.format = main.is_durable, main.format
        self._both = (main, errors)

    def drop(self, is_unwanted: Callable[[int], bool]) -> None:
        for sink in self._both:
            sink.drop(is_unwanted)
        self.has_changed = True

    def finish(self) -> None:
        for sink in self._both:
            sink.finish()

    def close(self, *, keep_empty: bool = True) -> None:
        try:
            self.errors_sink.close(keep_empty=keep_empty)
        finally:
            self.main.close(keep_empty=keep_empty)

    def info(self) -> os.stat_result:
        return self.main.info()

    @property
    def certificate(self) -> Path:
        return self.main.certificate

    def _write(self, rows: Sequence[MadeRow]) -> list[int | None]:
        raise NotImplementedError  # `append` is another here

    def _drop(self, is_unwanted: Callable[[int], bool]) -> None:
        raise NotImplementedError


class ErrorsApartSink(_PairedSink):
    """Rows without a text stand in the second file, and there alone."""

    def append(self, rows: Sequence[MadeRow]) -> None:
        apart = [row for row in rows if _is_apart(row.columns)]
        rest = [row for row in rows if not _is_apart(row.columns)]
        if rows:
            self.has_changed = True
        if apart:
            self.main.withdraw_certificate()
            self.errors_sink.append(apart)
        if rest:
            self.main.append(rest)

    def written(self) -> Iterator[WrittenRow]:
        return itertools.chain(*(sink.written() for sink in self._both))

    def files(self) -> list[OutputFile]:
        return [file for sink in self._both for file in sink.files()]

    def __contains__(self, row: int) -> bool:
        return any(row in sink for sink in self._both)

    @property
    def end(self) -> int:
        return max(sink.end for sink in self._both)

    @property
    def rows(self) -> int:
        return sum(sink.rows for sink in self._both)

    @property
    def errors(self) -> int:
        return sum(sink.errors for sink in self._both)

    @property
    def error_codes(self) -> Counter[str]:
        return self.main.error_codes + self.errors_sink.error_codes

    @property
    def content(self) -> int:
        return sum(sink.content for sink in self._both) % MODULUS

    @property
    def digests(self) -> array[int]:
        merged = self.main.digests + array("Q", [0]) * (self.end - self.main.end)
        for row, digest in enumerate(self.errors_sink.digests):
            if digest:
                merged[row] = digest
        return merged

    @property
    def makers(self) -> set[Maker]:
        return self.main.makers | self.errors_sink.makers

    def has_other(self, row: int, fingerprint: str) -> bool:
        return any(sink.has_other(row, fingerprint) for sink in self._both)

    def has_error(self, row: int) -> bool:
        return any(sink.has_error(row) for sink in self._both)

    def maker(self, row: int) -> Maker:
        return (self.main if row in self.main else self.errors_sink).maker(row)


class ErrorsCopiedSink(_PairedSink):
    """Rows with an error stand in both; what the first says counts.

    A copy is written before its row, so that a crash leaves no row without one. What the second
    has beyond that is taken out of it when both are opened; what it lacks, as when it is new, is
    written then.
    """

    def __init__(self, main: RowSink, errors: RowSink) -> None:
        super().__init__(main, errors)
        extra = {row for row in range(errors.end) if row in errors and not main.has_error(row)}
        if extra:
            errors.drop(extra.__contains__)
        if main.errors > errors.rows:
            missing = (known for known in main.written() if known.is_error)
            rows = [
                MadeRow(known.index, known.fingerprint, known.columns)
                for known in missing
                if known.index not in errors
            ]
            errors.append(rows)

    def append(self, rows: Sequence[MadeRow]) -> None:
        wrong = [row for row in rows if _is_apart(row.columns)]
        if wrong:
            self.errors_sink.append(wrong)
        self.main.append(rows)
        self.has_changed = True

    def written(self) -> Iterator[WrittenRow]:
        return self.main.written()

    def files(self) -> list[OutputFile]:
        return self.main.files()

    def __contains__(self, row: int) -> bool:
        return row in self.main

    @property
    def end(self) -> int:
        return self.main.end

    @property
    def rows(self) -> int:
        return self.main.rows

    @property
    def errors(self) -> int:
        return self.main.errors

    @property
    def error_codes(self) -> Counter[str]:
        return self.main.error_codes

    @property
    def content(self) -> int:
        return self.main.content

    @property
    def digests(self) -> array[int]:
        return self.main.digests

    @property
    def makers(self) -> set[Maker]:
        return self.main.makers

    def has_other(self, row: int, fingerprint: str) -> bool:
        return self.main.has_other(row, fingerprint)

    def has_error(self, row: int) -> bool:
        return self.main.has_error(row)

    def maker(self, row: int) -> Maker:
        return self.main.maker(row)


def _is_apart(columns: Mapping[str, Any]) -> bool:
    return columns["finish_reason"] in ("error", "cancelled")
