"""Rows to requests and results to rows: what a dataset's columns mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from queue_api.client.submission import as_request, default_id, request_id
from queue_api.datasets.fingerprint import (
    made_fingerprint,
    row_fingerprint,
    unread_fingerprint,
)
from queue_api.datasets.foreign_columns import ColumnNotices
from queue_api.datasets.formats.output_columns import OUTPUT_COLUMNS, free_name
from queue_api.datasets.formats.record import RawJson, Record
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.layout.reader import LayoutReader, Reading
from queue_api.store.jobs import request_json
from queue_api.wire.errors import (
    ConfigurationError,
    DuplicateRequestError,
    InvalidRequestError,
    RequestError,
)
from queue_api.wire.sampling import SAMPLING_FIELDS, own_names
from queue_api.wire.schemas import GenerationRequest, GenerationResult, SamplingParams

if TYPE_CHECKING:
    from queue_api.datasets.turns import TurnPass

__all__ = [
    "REQUEST_COLUMNS",
    "Row",
    "RowParser",
    "check_fields",
    "has_number_as_id",
    "output_row",
    "say_nothing",
]

logger = logging.getLogger(__name__)

REQUEST_COLUMNS = frozenset(
    # a column `metadata` is the user's like any other, and comes back as such
    {*GenerationRequest.model_fields, *SAMPLING_FIELDS} - {"metadata"}
)
ALWAYS_READ = frozenset({"id", "prompt", "messages"})
RAW = "batchmill.json"
"""Key of an object that stands for the JSON text in it, where columns travel as metadata."""
_NO_NUMBER = {RAW: "null"}
"""The id of a row that has none, where ids are numbers, as it travels."""


def check_fields(names: Collection[str]) -> frozenset[str]:
    """The columns that are read if the user names them, with those that always are.

    :raises ConfigurationError: one that no request has
    """
    if unknown := sorted(set(names) - REQUEST_COLUMNS):
        known = ", ".join(sorted(REQUEST_COLUMNS - ALWAYS_READ))
        raise ConfigurationError(f"{unknown[0]!r} isn't a field of a request; there are {known}")
    return frozenset(names) | ALWAYS_READ


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    index: int
    """Its place among the rows that are asked for, from 0; blank lines don't count."""
    columns: Mapping[str, Any]
    """As they came, but for those that can't be written."""
    id: str
    request: GenerationRequest | RequestError
    fingerprint: str = ""
    as_json: bytes | None = None
    """The request in that form."""
    number: int = 0
    """That of its record."""
    raw: bytes | None = None
    """Of a row that can't be read: as the input has it."""
    row: int = -1
    """Its place in the input, from 0: its index, unless rows were chosen."""
    answers: Sequence[str] | None = None
    """To the turns before the one that is asked; None if it isn't asked in turns."""


@dataclass
class RowParser:
    """Makes rows of records, in order; remembers the ids, which are unique in a dataset."""

    defaults: SamplingParams | None = None
    keep_columns: bool = False
    """Send the other columns along as metadata: whoever reads the results may not have
    the input."""
    warn: Callable[[str], None] = logger.warning
    fields: frozenset[str] | None = None
    """The columns that are read as the request's; None: all with the name of a field."""
    layout: Layout = field(default_factory=Layout)
    turn: TurnPass | None = None
    """Which turn is asked, if rows have several; None: the first."""
    place: Callable[[int], str] = "line {}".format
    """What to call the row of a record's number."""
    _index: int = 0
    _places: dict[str, int] = field(default_factory=dict)
    """Number of the record by id; negative for a default id, which an own one may have, too."""

    def __post_init__(self) -> None:
        self._has_numbers_as_ids = False
        if names := sorted({*self.layout.rename.values()} & {*OUTPUT_COLUMNS}):
            raise ConfigurationError(
                f"{names[0]!r} is a column of every output: rename to something else"
            )
        taken = REQUEST_COLUMNS if self.fields is None else self.fields
        self._reader = LayoutReader(self.layout, taken, self.warn)
        self._notices = ColumnNotices(
            self.warn,
            REQUEST_COLUMNS,
            told_which=self.fields is not None,
            names_prompt=self.layout.names_prompt,
        )
        defaults = self.defaults or SamplingParams()
        self._options: dict[str, Any] = defaults.model_dump(mode="json", exclude_unset=True)

    def parse(self, found: Record) -> Row:
        """The next row."""
        index, self._index = self._index, self._index + 1
        place = index if found.row is None else found.row
        read = self._reader.read(found)
        mark = self._fingerprint(found, read)
        shown = read.shown = self._with_null_id(read.shown)
        try:
            if read.error is not None:
                raise read.error
            answers = self._ask_turn(read.fields, place)
            request = self._request(found, read, place)
            as_json = request_json(request)
        except RequestError as error:
            told = self._reader.with_columns(str(error))
            error = type(error)(f"{self.place(found.number)}: {told}")
            name = request_id(_with_text_id(read.fields), place)
            raw = None if found.error is None else found.raw
            return Row(index, shown, name, error, mark, None, found.number, raw, place)
        return Row(
            index, shown, request.id, request, mark, as_json, found.number, None, place, answers
        )

    def fields_of(self, found: Record) -> dict[str, Any]:
        """The fields of a record's request, with the options for what they leave out; unchecked,
        and none if there can be no request."""
        read = self._reader.read(found)
        if read.error is not None:
            return {}
        fields = {**self._options, **own_names(read.fields)}
        if isinstance(nested := read.fields.get("sampling"), Mapping):
            fields["sampling"] = {**self._options, **own_names(nested)}
        return fields

    def num_turns(self, found: Record) -> int:
        """How many turns a record has; 1 if it is wrong."""
        return 1 + len(self._reader.read(found).fields.get("turns", ()))

    def _ask_turn(self, fields: dict[str, Any], row: int) -> list[str] | None:
        """Put the turns so far into the messages.

        :returns: the answers to them
        :raises InvalidRequestError: one has none
        """
        later = fields.pop("turns", None)
        if later is None:
            return None
        if self.turn is None:
            return []
        answers = self.turn.so_far(row, 1 + len(later))
        fields["messages"] = self.turn.messages(fields["messages"], later, answers)
        return answers

    def kept(self, columns: Mapping[str, Any], asked_id: str) -> dict[str, Any]:
        """What of a row's columns travels as metadata; an id if it is asked under another text."""
        keep_id = columns.get("id") not in (None, asked_id)
        return {
            name: {RAW: str(value)} if isinstance(value, RawJson) else value
            for name, value in self._reader.kept(columns, keep_id=keep_id).items()
        }

    def fingerprint(self, found: Record) -> str:
        """That of the row which `parse` makes of the record, wherever it is."""
        return self._fingerprint(found, self._reader.read(found))

    @property
    def template_columns(self) -> frozenset[str]:
        """The columns that the layout's templates name."""
        return self._reader.template_columns

    def shown(self, found: Record) -> Mapping[str, Any]:
        """The columns of a record that come back."""
        return self._reader.read(found).shown

    def how_read(self, found: Record) -> str:
        """Where a record that can be read has its prompt."""
        return self._reader.how_read(found)

    def _fingerprint(self, found: Record, read: Reading) -> str:
        if found.error is not None:
            return unread_fingerprint(found.raw)
        own = own_names(read.fields)
        options = {name: value for name, value in self._options.items() if name not in own}
        if read.is_made:
            made = {**read.fields, "error": str(read.error)} if read.error else read.fields
            return made_fingerprint(read.shown, options, made)
        taken = None if self.fields is None else self.fields & found.read.keys()
        return row_fingerprint(read.shown, options, taken)

    def _with_null_id(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """The columns to write. Where ids are numbers, a text for one without would make the
        column one of two types, which readers of tables refuse."""
        given = columns.get("id")
        if given is not None:
            self._has_numbers_as_ids = isinstance(given, int) and not isinstance(given, bool)
        elif self._has_numbers_as_ids:
            return {"id": RawJson("null"), **{k: v for k, v in columns.items() if k != "id"}}
        return columns

    def _request(self, found: Record, read: Reading, index: int) -> GenerationRequest:
        fields = {**read.fields}
        self._notices.look(found.read, read.used)
        if twice := sorted(found.ambiguous.intersection(read.used)):
            raise InvalidRequestError(f"{twice[0]!r} has an object with a key that is there twice")
        given = fields.get("id")
        if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
            column = self.layout.id_column or "id"
            raise InvalidRequestError(f"{column!r} is {given!r:.60}: give a string or an integer")
        fields["id"] = self._id(given, index, found.number)
        if self.keep_columns:
            fields["metadata"] = self.kept(read.shown, fields["id"])
        return as_request(fields, index, self.defaults)

    def _id(self, given: str | int | None, index: int, number: int) -> str:
        """The id to ask under: that of the row, or one that no row has."""
        if given is None:
            name = default_id(index, self._places)
            self._places[name] = -number
            return name
        name = str(given)
        first = self._places.get(name)
        if first is not None and first > 0:
            raise DuplicateRequestError(
                f"id {name!r} is that of {self.place(first)} too; ids are unique within a run"
            )
        self._places[name] = number
        if first is None:
            return name
        other = f"own-{name}"  # the default of a row before it; the file shows the own one
        while other in self._places:
            other = f"own-{other}"
        self._places[other] = -number
        return other


def has_number_as_id(columns: Mapping[str, Any]) -> bool:
    """Whether a row that travelled with its columns says that ids are numbers in its dataset."""
    given = columns.get("id")
    return given == _NO_NUMBER or (isinstance(given, int) and not isinstance(given, bool))


def output_row(
    columns: Mapping[str, Any],
    result: GenerationResult,
    fingerprint: str = "",
    number: int | None = None,
    answers: Sequence[str] | None = None,
    *,
    seed_key: str | None = None,
) -> dict[str, Any]:
    """The row to write: the input's columns as they came, then the result's.

    A column has values of one type, an empty one where there is nothing to say: readers of tables
    take the first rows for an example of all. An input column with the name of one of
    OUTPUT_COLUMNS (from an output file used as input, say) is kept as `input_<name>`.

    :param number: the row's place in the input, if that isn't the request's in its run
    :param answers: to the turns before this one, if the row is asked in turns
    :param seed_key: what its draws follow from, if no seed of the request's fixes them
    """
    row = _input_columns(columns, result)
    row["row"] = result.index if number is None else number
    row["text"] = result.text
    if answers is not None:
        row["turn_texts"] = [*answers, result.text]
    if result.token_ids is not None:
        row["token_ids"] = result.token_ids
    if result.logprobs is not None:
        row["logprobs"] = [token.model_dump(mode="json") for token in result.logprobs]
    if result.prompt_logprobs is not None:
        row["prompt_logprobs"] = [
            token and token.model_dump(mode="json") for token in result.prompt_logprobs
        ]
    if result.outputs is not None:
        row["outputs"] = [
            output.model_dump(mode="json", exclude_none=True) for output in result.outputs
        ]
    if result.structured_output is not None:
        row["structured_output"] = result.structured_output.value
    if result.applied_defaults is not None:
        row["applied_defaults"] = result.applied_defaults
    if seed_key is not None:
        row["seed_key"] = seed_key
    row["finish_reason"] = result.finish_reason.value
    row["usage"] = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
    }
    timings = result.timings.model_dump(mode="json")
    row["timings"] = {name: value or 0.0 for name, value in timings.items()}
    row["timings"]["stage_s"] = timings["stage_s"] or [0.0]
    row["model"] = result.model or ""
    row["model_revision"] = result.model_revision or ""
    row["worker"] = result.worker or ""
    row["attempt"] = result.attempt
    row["error"] = result.error.message if result.error else ""
    row["error_code"] = result.error.code if result.error else ""
    row["fingerprint"] = fingerprint
    return row


def _input_columns(columns: Mapping[str, Any], result: GenerationResult) -> dict[str, Any]:
    row: dict[str, Any] = {} if columns.get("id") is not None else {"id": result.id}
    for name, value in columns.items():
        if name == "id" and value is None:
            continue
        row[free_name(name, columns)] = _unpacked(value)
    return row


def _unpacked(value: Any) -> Any:
    """A column that travelled as metadata, as it was written."""
    if isinstance(value, dict) and value.keys() == {RAW} and isinstance(value[RAW], str):
        return RawJson(value[RAW])
    return value


def _with_text_id(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    given = columns.get("id")
    if isinstance(given, int) and not isinstance(given, bool):
        return {**columns, "id": str(given)}
    return columns


def say_nothing(_: str) -> None:
    """A parser's `warn` where rows are read once more: what there is to tell is told otherwise."""
