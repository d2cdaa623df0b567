"""Rows to requests and results to rows: what a dataset's columns mean."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from queue_api.client.submission import as_request, request_id
from queue_api.datasets.formats.jsonl_lines import MAX_LINE_BYTES, read_lines
from queue_api.wire.errors import DuplicateRequestError, InvalidRequestError, RequestError
from queue_api.wire.sampling import SAMPLING_FIELDS
from queue_api.wire.schemas import GenerationRequest, GenerationResult, SamplingParams

__all__ = [
    "OUTPUT_COLUMNS",
    "REQUEST_COLUMNS",
    "Row",
    "RowParser",
    "dump_row",
    "output_row",
    "read_jsonl",
]

logger = logging.getLogger(__name__)

REQUEST_COLUMNS = frozenset(
    # a column `metadata` is the user's like any other, and comes back as such
    {*GenerationRequest.model_fields, *SAMPLING_FIELDS} - {"metadata"}
)
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
)
"""What an output row has besides its input columns."""


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    index: int
    """Its place in the input, from 0; blank lines don't count."""
    columns: Mapping[str, Any]
    """As they came; empty if the row can't be read."""
    id: str
    request: GenerationRequest | RequestError

    @property
    def shown_id(self) -> str:
        """The id as the output file shows it, which may be one that no request can have."""
        shown = self.columns.get("id")
        return str(shown) if shown is not None else self.id


@dataclass
class RowParser:
    """Makes rows of JSON lines, in order; remembers the ids, which are unique in a dataset."""

    defaults: SamplingParams | None = None
    keep_columns: bool = False
    """Send the other columns along as metadata: whoever reads the results may not have
    the input."""
    warn: Callable[[str], None] = logger.warning
    _index: int = 0
    _places: dict[str, int] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def parse(self, number: int, line: bytes | None) -> Row:
        """The next row; `number` is its line's, for messages."""
        index, self._index = self._index, self._index + 1
        columns: dict[str, Any] = {}
        try:
            columns = _load(line)
            self._warn_of_misspelt(columns)
            request = self._request(columns, index)
            if (first := self._places.setdefault(request.id, number)) != number:
                raise DuplicateRequestError(
                    f"id {request.id!r} is that of line {first} too; ids are unique within a run"
                )
        except RequestError as error:
            error = type(error)(f"line {number}: {error}")
            return Row(index, columns, request_id(_with_text_id(columns), index), error)
        return Row(index, columns, request.id, request)

    def _request(self, columns: dict[str, Any], index: int) -> GenerationRequest:
        given = columns.get("id")
        if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
            raise InvalidRequestError(f"'id' is {given!r:.60}: give a string or an integer")
        # a table has a null where a row has no value of its own
        fields = {
            name: value
            for name, value in _with_text_id(columns).items()
            if name in REQUEST_COLUMNS and value is not None
        }
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(fields.get(name), list):
                del fields[name]  # those of an output that is used as input again
        if self.keep_columns:
            fields["metadata"] = {k: v for k, v in columns.items() if k not in REQUEST_COLUMNS}
            if isinstance(given, int):
                fields["metadata"]["id"] = given
        return as_request(fields, index, self.defaults)

    def _warn_of_misspelt(self, columns: Mapping[str, Any]) -> None:
        for name in columns.keys() - REQUEST_COLUMNS - self._warned:
            self._warned.add(name)
            plain = name.lower().replace("-", "_")
            if close := difflib.get_close_matches(plain, REQUEST_COLUMNS, n=1, cutoff=0.8):
                self.warn(
                    f"column {name!r} has no effect and comes back untouched; "
                    f"if you meant {close[0]!r}, rename it"
                )


async def read_jsonl(path: Path | str, parser: RowParser) -> AsyncGenerator[Row, None]:
    """The rows of a JSON Lines file; what is wrong with one stands in its `request`.

    :raises DatasetError: the file can't be read
    """
    async for number, line in read_lines(path):
        yield parser.parse(number, line)


def output_row(columns: Mapping[str, Any], result: GenerationResult) -> dict[str, Any]:
    """The row to write: the input's columns as they came, then the result's.

    An input column with the name of one of OUTPUT_COLUMNS (from an output file used as input,
    say) is kept as `input_<name>`.
    """
    row: dict[str, Any] = {} if columns.get("id") is not None else {"id": result.id}
    for name, value in columns.items():
        if name != "id" or value is not None:
            row[f"input_{name}" if name in OUTPUT_COLUMNS else name] = value
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
    row["timings"] = result.timings.model_dump(mode="json")
    row["model"] = result.model
    row["model_revision"] = result.model_revision
    row["worker"] = result.worker
    row["attempt"] = result.attempt
    row["error"] = result.error.model_dump(mode="json") if result.error else None
    return row


def dump_row(row: Mapping[str, Any]) -> bytes:
    """One line of JSON with its end, in UTF-8."""
    try:
        return json.dumps(row, ensure_ascii=False, separators=(", ", ": ")).encode() + b"\n"
    except UnicodeEncodeError:
        # half a surrogate pair: JSON can say it, UTF-8 can't
        return json.dumps(row).encode() + b"\n"


def _with_text_id(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    given = columns.get("id")
    if isinstance(given, int) and not isinstance(given, bool):
        return {**columns, "id": str(given)}
    return columns


def _load(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise InvalidRequestError(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        columns = json.loads(
            line, parse_constant=_no_constant, parse_float=_finite, parse_int=_readable
        )
    except RecursionError:
        raise InvalidRequestError("not readable: nested too deeply") from None
    except ValueError as error:
        raise InvalidRequestError(f"not JSON: {error}") from None
    if not isinstance(columns, dict):
        raise InvalidRequestError(f"not an object but {line.decode(errors='replace')!r:.60}")
    return columns


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} isn't a number that JSON knows")


def _readable(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's guard against thousands of digits
        raise ValueError(f"{text[:20]} is too large a number") from None


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number
