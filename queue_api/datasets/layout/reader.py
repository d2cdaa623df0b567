"""LayoutReader: a record's columns to the fields of its request."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from queue_api.datasets.formats.record import Record
from queue_api.datasets.layout.conversation import messages_of, turns_of, without_answer
from queue_api.datasets.layout.layout import Layout, quoted
from queue_api.datasets.layout.openai_batch import (
    BATCH_COLUMNS,
    batch_request,
    is_batch_line,
    without_prompt,
)
from queue_api.datasets.layout.shown_columns import ShownColumns, with_id
from queue_api.wire.errors import InvalidRequestError, RequestError

if TYPE_CHECKING:
    from queue_api.datasets.layout.template import RowTemplate

__all__ = ["BATCH_LINES", "LayoutReader", "Reading"]

BATCH_LINES = "OpenAI batch lines"
"""How a row of that format is said to be read."""

TEXTS = frozenset({"id", "prompt"})
"""Fields of which an empty text is a value, if a wrong one; elsewhere it is none at all."""


@dataclass(slots=True)
class Reading:
    """What a layout makes of a record."""

    shown: Mapping[str, Any]
    """The columns to write again."""
    fields: dict[str, Any]
    """Those of the request; unchecked."""
    used: Collection[str]
    """The columns of the record that they are made of."""
    error: RequestError | None = None
    """Why there can be no request."""
    is_made: bool = False
    """The columns shown don't say what the fields are."""


class LayoutReader:
    """Reads the records of one input, in order.

    :param taken: the columns that are read as fields by their own names
    """

    def __init__(self, layout: Layout, taken: frozenset[str], warn: Callable[[str], None]) -> None:
        self._layout = layout
        self._is_default = layout == Layout()
        self._warn = warn
        self._told = set[str]()
        if layout.names_prompt:
            taken -= {"prompt", "messages"}
        if layout.id_column is not None:
            taken -= {"id"}
        self._taken = taken
        sources = {layout.prompt_column, layout.messages_column, layout.turns_column} - {None}
        self._unsent: frozenset[str] = frozenset(name for name in {*taken, *sources} if name)
        """Columns shown that the request has already."""
        self._template = _compiled(layout.template, "the template")
        self._system = _compiled(layout.system, "the system template")
        templates = [template for template in (self._template, self._system) if template]
        self.template_columns: frozenset[str] = frozenset().union(
            *(template.names for template in templates)
        )
        """What the templates name; a row may do without, if they have a default for it."""
        if layout.id_column is not None:
            self._unsent |= {"id"}
        self._columns = ShownColumns(layout)
        renamed = {layout.rename.get(name, name) for name in self._unsent}
        self._unsent = frozenset(renamed - {*layout.rename.values()}) | {
            new for old, new in layout.rename.items() if old in self._unsent
        }

    def read(self, found: Record) -> Reading:
        """What the layout makes of a record."""
        if "body" in found.read and not self._layout.names_prompt and is_batch_line(found.read):
            return self._read_batch_line(found)
        if self._is_default:
            fields = _request_fields(found.read, self._taken)
            return Reading(found.shown, fields, fields.keys(), found.error)
        return self._read(found)

    def with_columns(self, message: str) -> str:
        """What is wrong with a field, with the column that it was read from under another name."""
        columns = {
            "prompt": self._layout.prompt_column,
            "messages": self._layout.messages_column,
            "id": self._layout.id_column,
        }
        for field, column in columns.items():
            if column not in (None, field) and re.match(rf"'{field}\b", message):
                return f"{message} ({field!r} is column {column!r})"
        return message

    def kept(self, columns: Mapping[str, Any], *, keep_id: bool) -> dict[str, Any]:
        """What of the columns shown the request hasn't already, with the id or without."""
        if "body" in columns and is_batch_line(columns):
            columns = without_prompt(columns)
        unsent = self._unsent - {"id"} if keep_id else self._unsent
        return {name: value for name, value in columns.items() if name not in unsent}

    def how_read(self, found: Record) -> str:
        """Where a record that can be read has its prompt."""
        layout = self._layout
        if (column := layout.prompt_column) is not None:
            return f"prompt from column {column!r}"
        if (column := layout.messages_column) is not None:
            return f"messages from column {column!r}"
        if (column := layout.turns_column) is not None:
            return f"turns from column {column!r}, each asked after the answer to the last"
        if self._template is not None:
            return (
                f"prompt from the template, of the columns {quoted(sorted(self._template.names))}"
            )
        if "body" in found.read and is_batch_line(found.read):
            return f"{BATCH_LINES}, the first for {found.read['url']}"
        name = "messages" if found.read.get("messages") is not None else "prompt"
        return f"{name} from column {name!r}"

    def _read_batch_line(self, found: Record) -> Reading:
        column = self._layout.id_column or "custom_id"
        reading = self._begun(found, {}, column)
        reading.used = BATCH_COLUMNS
        if reading.error is None:
            try:
                reading.fields |= batch_request(found.read, self._tell_once)
                self._add_system(found.read, reading)
            except RequestError as error:
                reading.error = error
        return reading

    def _read(self, found: Record) -> Reading:
        fields = _request_fields(found.read, self._taken)
        reading = self._begun(found, fields, self._layout.id_column or "id")
        if reading.error is None:
            try:
                self._find_prompt(found.read, reading)
            except RequestError as error:
                reading.error = error
        return reading

    def _begun(self, found: Record, fields: dict[str, Any], id_column: str) -> Reading:
        """What a row is read as, but for its prompt."""
        shown, error = with_id(found.shown, id_column), found.error
        try:
            shown = self._columns.of(shown)
        except InvalidRequestError as conflict:
            shown, error = self._columns.chosen(shown), error or conflict
        if (given := found.read.get(id_column)) is not None:
            fields["id"] = given
        return Reading(shown, fields, {*fields, id_column}, error, is_made=True)

    def _find_prompt(self, columns: Mapping[str, Any], reading: Reading) -> None:
        """:raises InvalidRequestError: the row has none"""
        layout, fields = self._layout, reading.fields
        if (column := layout.prompt_column) is not None:
            fields["prompt"] = _prompt_of(columns, column)
        elif (column := layout.messages_column) is not None:
            messages = messages_of(_value(columns, column), column)
            fields["messages"] = self._to_answer(messages, fields)
        elif (column := layout.turns_column) is not None:
            first, *fields["turns"] = turns_of(_value(columns, column), column)
            fields["messages"] = [{"role": "user", "content": first}]
        elif self._template is not None:
            fields["prompt"] = self._template.render(columns)
            if not fields["prompt"]:
                raise InvalidRequestError("the template makes an empty prompt of the row")
        if column is not None:
            reading.used = {*reading.used, column}
        if self.template_columns:
            reading.used = {*reading.used, *self.template_columns}
        self._add_system(columns, reading)

    def _add_system(self, columns: Mapping[str, Any], reading: Reading) -> None:
        """Make a chat of it, where that is asked for.

        :raises InvalidRequestError: there can be none
        """
        text = "" if self._system is None else self._system.render(columns)
        if not text and not self._layout.chat:
            return
        fields = reading.fields
        turns = [{"role": "system", "content": text}] if text else []
        if isinstance(messages := fields.get("messages"), list) and messages:
            if not _is_system(messages[0]):
                fields["messages"] = [*turns, *messages]
        elif isinstance(prompt := fields.get("prompt"), str) and prompt:
            del fields["prompt"]
            fields["messages"] = [*turns, {"role": "user", "content": prompt}]
        elif prompt:
            raise InvalidRequestError("a prompt of token ids can't be a chat, nor have a system")

    def _to_answer(self, messages: list[Any], fields: Mapping[str, Any]) -> list[Any]:
        if fields.get("continue_final_message"):
            return messages
        shortened = without_answer(messages)
        if len(shortened) < len(messages):
            self._tell_once(
                "chats that end with the assistant's turn are asked without it: the answer is to "
                "the turn before; 'continue_final_message' in a row continues it instead"
            )
        return [*shortened]

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._warn(message)


def _compiled(source: str | None, what: str) -> RowTemplate | None:
    """:raises ConfigurationError: it isn't a template"""
    if source is None:
        return None
    from queue_api.datasets.layout.template import RowTemplate

    return RowTemplate(source, what)


def _is_system(message: object) -> bool:
    return isinstance(message, Mapping) and message.get("role") in ("system", "developer")


def _request_fields(columns: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """The columns that are the request's by their names."""
    # a table has a null where a row has no value of its own; one that was CSV an empty text
    fields = {
        name: value
        for name, value in columns.items()
        if name in taken and value is not None and (value != "" or name in TEXTS)
    }
    if fields.get("prompt") == "" and "messages" in fields:
        del fields["prompt"]
    for name in ("logprobs", "prompt_logprobs"):
        if isinstance(fields.get(name), list):
            del fields[name]  # those of an output that is used as input again
    if not isinstance(fields.get("sampling", {}), dict):
        del fields["sampling"]  # a column of the user's
    return fields


def _value(columns: Mapping[str, Any], column: str) -> Any:
    """:raises InvalidRequestError: the row has none"""
    value = columns.get(column)
    if value is None:
        what = "is null" if column in columns else "isn't there"
        raise InvalidRequestError(f"column {column!r} {what}: the row has no prompt")
    return value


def _prompt_of(columns: Mapping[str, Any], column: str) -> Any:
    """:raises InvalidRequestError: it isn't one"""
    value = _value(columns, column)
    if value in ("", []):
        raise InvalidRequestError(f"column {column!r} is empty: the row has no prompt")
    if isinstance(value, list) and isinstance(value[0], Mapping):
        raise InvalidRequestError(
            f"column {column!r} is a list of objects; if they are messages: --messages-column"
        )
    if not isinstance(value, str | list):
        raise InvalidRequestError(f"column {column!r} is {value!r:.60}: a prompt is a text")
    return value
