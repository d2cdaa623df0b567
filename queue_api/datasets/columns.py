"""Rows to requests and results to rows: what a dataset's columns mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from queue_api.client.submission import as_request, default_id, request_id
from queue_api.datasets.fingerprint import row_fingerprint, unread_fingerprint
from queue_api.datasets.foreign_columns import ColumnNotices
from queue_api.datasets.formats.record import RawJson, Record
from queue_api.store.jobs import request_json
from queue_api.wire.errors import (
    ConfigurationError,
    DuplicateRequestError,
    InvalidRequestError,
    RequestError,
)
from queue_api.wire.sampling import SAMPLING_FIELDS, own_names
from queue_api.wire.schemas import GenerationRequest, GenerationResult, SamplingParams

__all__ = [
    "OUTPUT_COLUMNS",
    "REQUEST_COLUMNS",
    "Row",
    "RowParser",
    "check_fields",
    "has_number_as_id",
    "output_row",
]

logger = logging.getLogger(__name__)

REQUEST_COLUMNS = frozenset(
    # a column `metadata` is the user's like any other, and comes back as such
    {*GenerationRequest.model_fields, *SAMPLING_FIELDS} - {"metadata"}
)
TEXTS = frozenset({"id", "prompt"})
"""Fields of which an empty text is a value, if a wrong one; elsewhere it is none at all."""
ALWAYS_READ = frozenset({"id", "prompt", "messages"})
OUTPUT_COLUMNS = (
    "row",
    "text",
    "token_ids",
    "logprobs",
    "prompt_logprobs",
    "outputs",
    "structured_output",
    "applied_defaults",
    "finish_reason",
    "usage",
    "timings",
    "model",
    "model_revision",
    "worker",
    "attempt",
    "error",
    "error_code",
    "fingerprint",
)
"""What an output row has besides its input columns."""
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
    """Its place in the input, from 0; blank lines don't count."""
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
    place: Callable[[int], str] = "line {}".format
    """What to call the row of a record's number."""
    _index: int = 0
    _places: dict[str, int] = field(default_factory=dict)
    """Number of the record by id; negative for a default id, which an own one may have, too."""

    def __post_init__(self) -> None:
        self._has_numbers_as_ids = False
        self._taken = REQUEST_COLUMNS if self.fields is None else self.fields
        self._notices = ColumnNotices(
            self.warn, REQUEST_COLUMNS, told_which=self.fields is not None
        )
        defaults = self.defaults or SamplingParams()
        self._options: dict[str, Any] = defaults.model_dump(mode="json", exclude_unset=True)

    def parse(self, found: Record) -> Row:
        """The next row."""
        index, self._index = self._index, self._index + 1
        mark = self.fingerprint(found)
        shown = self._shown(found)
        try:
            if found.error is not None:
                raise found.error
            request = self._request(found, shown, index)
            as_json = request_json(request)
        except RequestError as error:
            error = type(error)(f"{self.place(found.number)}: {error}")
            name = request_id(_with_text_id(found.read), index)
            raw = None if found.error is None else found.raw
            return Row(index, shown, name, error, mark, None, found.number, raw)
        return Row(index, shown, request.id, request, mark, as_json, found.number)

    def kept(self, columns: Mapping[str, Any], asked_id: str) -> dict[str, Any]:
        """What of a row's columns travels as metadata; an id if it is asked under another text."""
        own_id = columns.get("id")
        return {
            name: {RAW: str(value)} if isinstance(value, RawJson) else value
            for name, value in columns.items()
            if name not in self._taken or (name == "id" and own_id not in (None, asked_id))
        }

    def fingerprint(self, found: Record) -> str:
        """That of the row which `parse` makes of the record, wherever it is."""
        if found.error is not None:
            return unread_fingerprint(found.raw)
        own = own_names(self._fields(found.read))
        options = {name: value for name, value in self._options.items() if name not in own}
        taken = None if self.fields is None else self.fields & found.read.keys()
        return row_fingerprint(found.shown, options, taken)

    def _shown(self, found: Record) -> Mapping[str, Any]:
        """The columns to write. Where ids are numbers, a text for one without would make the
        column one of two types, which readers of tables refuse."""
        given = found.shown.get("id")
        if given is not None:
            self._has_numbers_as_ids = isinstance(given, int) and not isinstance(given, bool)
        elif self._has_numbers_as_ids:
            return {"id": RawJson("null"), **{k: v for k, v in found.shown.items() if k != "id"}}
        return found.shown

    def _fields(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Those that are the request's."""
        # a table has a null where a row has no value of its own; one that was CSV an empty text
        fields = {
            name: value
            for name, value in columns.items()
            if name in self._taken and value is not None and (value != "" or name in TEXTS)
        }
        if fields.get("prompt") == "" and "messages" in fields:
            del fields["prompt"]
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(fields.get(name), list):
                del fields[name]  # those of an output that is used as input again
        if not isinstance(fields.get("sampling", {}), dict):
            del fields["sampling"]  # a column of the user's
        return fields

    def _request(self, found: Record, shown: Mapping[str, Any], index: int) -> GenerationRequest:
        fields = self._fields(found.read)
        self._notices.look(found.read, fields)
        if twice := sorted(found.ambiguous & fields.keys()):
            raise InvalidRequestError(f"{twice[0]!r} has an object with a key that is there twice")
        given = found.read.get("id")
        if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
            raise InvalidRequestError(f"'id' is {given!r:.60}: give a string or an integer")
        fields["id"] = self._id(given, index, found.number)
        if self.keep_columns:
            fields["metadata"] = self.kept(shown, fields["id"])
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
    columns: Mapping[str, Any], result: GenerationResult, fingerprint: str = ""
) -> dict[str, Any]:
    """The row to write: the input's columns as they came, then the result's.

    A column has values of one type, an empty one where there is nothing to say: readers of tables
    take the first rows for an example of all. An input column with the name of one of
    OUTPUT_COLUMNS (from an output file used as input, say) is kept as `input_<name>`.
    """
    row = _input_columns(columns, result)
    row["row"] = result.index
    row["text"] = result.text
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
        shown = name
        while shown in OUTPUT_COLUMNS or (shown != name and shown in columns):
            shown = f"input_{shown}"
        row[shown] = _unpacked(value)
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
