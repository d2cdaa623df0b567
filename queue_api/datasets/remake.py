"""What rows of an output were asked for, so that they can be made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from queue_api.datasets.certificate import read_certificate
from queue_api.datasets.columns import RowParser, say_nothing
from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.formats.output_columns import OUTPUT_COLUMNS
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_sink import CERTIFICATE
from queue_api.datasets.formats.survey import written_records
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.row_selection import RowSelection
from queue_api.datasets.turns import TurnPass
from queue_api.wire.errors import DatasetError, RequestError
from queue_api.wire.schemas import GenerationRequest, SamplingParams

__all__ = ["Asked", "read_asked"]


@dataclass(frozen=True)
class Asked:
    """A row of an output, and what it was asked for."""

    row: int
    written: Mapping[str, Any]
    """Its columns."""
    request: GenerationRequest | RequestError | None = None
    why_not: str = ""
    """What keeps it from being made again; else there is a request, or what is wrong with it."""


def read_asked(
    output: Path | str,
    selection: RowSelection,
    inputs: Sequence[str] = (),
    format: str | None = None,  # noqa: A002 - as on the command line
) -> list[Asked]:
    """Some rows of an output that has a certificate, drawn at random.

    What a row was asked for is told by its own columns or, if `inputs` are given, by its row there;
    its fingerprint says whether that is so.

    :param format: of the inputs
    :raises DatasetError: there is no certificate, a file can't be read, or no row was drawn
    """
    said = read_certificate(Path(f"{str(output).rstrip('/')}{CERTIFICATE}"))
    if said is None:
        raise DatasetError(
            f"{output} has no certificate beside it, so nothing says how it was made"
        )
    options = said["options"]
    if "recipe" in options:
        raise DatasetError(
            f"{output} was made by a recipe, whose rows can't be made again one by one: its stages "
            "feed each other"
        )
    wanted = _drawn(said["rows"], selection)
    if not wanted:
        raise DatasetError(f"the sample has none of the {said['rows_out']:,} rows: take more")
    written = _written(Path(output), said, wanted)
    reader = _Reader(options)
    if not inputs:
        return [reader.from_output(row, record) for row, record in sorted(written.items())]
    found = dict(_of_input(inputs, format, written))
    return [
        reader.from_input(row, record, found.get(row)) for row, record in sorted(written.items())
    ]


def _drawn(ranges: Sequence[tuple[int, int]], selection: RowSelection) -> set[int]:
    """Numbers of rows among those that are certified."""
    rows = [row for first, last in ranges for row in range(first, last + 1)]
    return {rows[place] for place in selection.numbers(len(rows))}


def _written(output: Path, said: Mapping[str, Any], wanted: set[int]) -> dict[int, Record]:
    places = [(said["format"], output)]
    if apart := said["errors_file"]:
        places.append((apart["format"], output.parent / apart["name"]))
    return dict(each for kind, path in places for each in written_records(kind, path, wanted))


def _of_input(
    inputs: Sequence[str],
    format: str | None,  # noqa: A002
    wanted: Mapping[int, Record],
) -> Iterator[tuple[int, Record]]:
    with closing(open_source(inputs, format=format)) as source:
        left = len(wanted)
        for row, record in enumerate(source.records()):
            if row in wanted:
                record.row = row
                yield row, record
                left -= 1
            if not left:
                return


class _Reader:
    """Reads rows as the run did that made them.

    :param options: as the certificate has them
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._input = options.get("input") or "IN"
        fields = options.get("fields")
        try:
            self._parser = RowParser(
                SamplingParams(**options.get("sampling", {})),
                warn=say_nothing,
                fields=None if fields is None else frozenset(fields),
                layout=Layout(**(options.get("layout") or {})),
            )
        except (ValidationError, TypeError) as error:
            raise DatasetError(f"the certificate's options can't be read: {error}") from None

    def from_input(self, row: int, written: Record, given: Record | None) -> Asked:
        """A row by what the input has in its place."""
        if given is None:
            return Asked(row, written.read, why_not="the input has no such row")
        if self._parser.fingerprint(given) != written.read.get("fingerprint"):
            why = "the input's row isn't what it was made of"
            return Asked(row, written.read, why_not=why)
        return self._asked(row, written, given)

    def from_output(self, row: int, written: Record) -> Asked:
        """A row by its own columns."""
        for record in _as_they_came(row, written):
            if self._parser.fingerprint(record) == written.read.get("fingerprint"):
                return self._asked(row, written, record)
        why = (
            "its columns aren't all that it was made of, or have changed: name the input "
            f"(--input {self._input})"
        )
        return Asked(row, written.read, why_not=why)

    def _asked(self, row: int, written: Record, given: Record) -> Asked:
        turns = written.read.get("turn_texts")
        self._parser.turn = None
        if turns:
            self._parser.turn = _WrittenTurns(1, 1, texts=tuple(turns[:-1]))
        return Asked(row, written.read, self._parser.parse(given).request)


@dataclass(frozen=True)
class _WrittenTurns(TurnPass):
    """The last turn of rows whose answers to the others are there."""

    texts: Sequence[str] = ()

    def so_far(self, row: int, turns: int) -> list[str]:  # noqa: ARG002
        """The answers."""
        return [*self.texts]


def _as_they_came(row: int, written: Record) -> Iterator[Record]:
    """What the input's row may have been. Of default ids, of absent columns in a table and of such
    with a name of ours the output doesn't tell, but the fingerprint does."""
    given = {name: value for name, value in written.shown.items() if name not in OUTPUT_COLUMNS}
    named = {_own_name(name, given): name for name in given}
    for has_id, keeps_nulls in product((True, False), (True, False)):
        names = {
            own: name
            for own, name in named.items()
            if (has_id or own != "id") and (keeps_nulls or given[name] is not None)
        }
        record = Record(written.number, row=row, ambiguous=written.ambiguous)
        record.shown = {own: written.shown[name] for own, name in names.items()}
        record.read = {own: written.read[name] for own, name in names.items()}
        yield record


def _own_name(name: str, names: Mapping[str, Any]) -> str:
    """A column's name before it stepped aside for one of the output's."""
    own = name
    while own.startswith("input_"):
        own = own.removeprefix("input_")
        if own in OUTPUT_COLUMNS and own not in names:
            return own
    return name
