"""Whether an output is still what its certificate says."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from queue_api.datasets.certificate import block_digests, ranges, read_certificate
from queue_api.datasets.formats.row_sink import CERTIFICATE
from queue_api.datasets.formats.survey import Fault, SeenFile, SeenRow, survey
from queue_api.wire.errors import DatasetError

__all__ = ["Verdict", "verify_output"]


@dataclass
class Verdict:
    """What was found."""

    rows: int = 0
    problems: list[str] = field(default_factory=list)
    """What is missing, doubled, torn or changed; empty if all is as certified."""
    notes: list[str] = field(default_factory=list)
    """What is otherwise and changes no row."""


def verify_output(output: Path | str) -> Verdict:
    """Compare all rows of an output with its certificate; nothing is written.

    :raises DatasetError: there is no certificate, or one of the two can't be read
    """
    path = Path(output)
    said = read_certificate(Path(f"{str(output).rstrip('/')}{CERTIFICATE}"))
    if said is None:
        raise DatasetError(
            f"{output} has no certificate beside it: it is written when a run is complete; the "
            "command that made the output goes on, or writes it"
        )
    return _Comparison(said).of(path)


class _Comparison:
    def __init__(self, said: Mapping[str, Any]) -> None:
        self._said = said
        self._verdict = Verdict()
        end = max((last + 1 for _, last in said["rows"]), default=0)
        self._digests = array("Q", [0]) * end
        self._is_certified = bytearray(end)
        for first, last in said["rows"]:
            self._is_certified[first : last + 1] = b"\1" * (last + 1 - first)
        self._doubled: dict[int, list[str]] = {}
        self._files: list[SeenFile] = []

    def of(self, path: Path) -> Verdict:
        for item in self._all(path):
            if isinstance(item, SeenRow):
                self._see(item)
            elif isinstance(item, SeenFile):
                self._files.append(item)
            else:
                self._verdict.problems.append(item.what)
        self._say_doubled()
        self._say_missing()
        self._say_changed()
        self._say_files()
        return self._verdict

    def _all(self, path: Path) -> Iterator[SeenRow | SeenFile | Fault]:
        yield from survey(self._said["format"], path)
        if apart := self._said["errors_file"]:
            yield from survey(apart["format"], path.parent / apart["name"])

    def _see(self, row: SeenRow) -> None:
        self._verdict.rows += 1
        if not self._is_certified[row.index : row.index + 1].strip(b"\0"):
            self._verdict.problems.append(f"row {row.index} at {row.place} isn't certified")
        elif self._digests[row.index]:
            self._doubled.setdefault(row.index, []).append(row.place)
        else:
            self._digests[row.index] = row.digest

    def _say_doubled(self) -> None:
        for row, places in sorted(self._doubled.items()):
            self._verdict.problems.append(f"row {row} is there again at {', '.join(places)}")

    def _say_missing(self) -> None:
        missing = (row for row in range(len(self._digests)) if self._is_missing(row))
        for first, last in ranges(missing):
            self._verdict.problems.append(f"{_rows(first, last)} missing")

    def _is_missing(self, row: int) -> bool:
        return bool(self._is_certified[row]) and not self._digests[row]

    def _say_changed(self) -> None:
        """Of each block that is whole, whether it is as it was."""
        each, said = self._said["rows_to_a_digest"], self._said["digests"]
        for block, (was, now) in enumerate(
            zip(said, block_digests(self._digests, each), strict=False)
        ):
            first, last = block * each, min((block + 1) * each, len(self._digests)) - 1
            is_whole = not any(map(self._is_missing, range(first, last + 1)))
            if was != now and is_whole:
                rows = f"row {first}" if first == last else f"a row of rows {first} to {last}"
                self._verdict.problems.append(f"{rows} has changed")

    def _say_files(self) -> None:
        said = {file["name"]: file for file in self._said["files"]}
        for file in self._files:
            was = said.pop(file.name, None)
            if was is None:
                self._verdict.problems.append(f"the file {file.name} isn't certified")
            elif was["sha256"] != file.sha256:
                self._say_file(file, was)
        for name in said:
            self._verdict.problems.append(f"the file {name} is missing")

    def _say_file(self, file: SeenFile, was: Mapping[str, Any]) -> None:
        if not file.digest_is_of_all:
            first, last = was["first_row"], was["last_row"]
            self._verdict.problems.append(
                f"the file {file.name} has changed (of rows {first} to {last})"
            )
        elif not self._verdict.problems:
            self._verdict.notes.append(
                f"{file.name} has other bytes and the same rows: in another order, or packed anew"
            )


def _rows(first: int, last: int) -> str:
    return f"row {first} is" if first == last else f"rows {first} to {last} are"
