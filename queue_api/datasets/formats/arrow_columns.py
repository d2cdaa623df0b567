"""Rows of JSON to columns of Arrow: types that stand before a part is written, and may widen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from queue_api.datasets.formats.output_columns import ALWAYS_THERE
from queue_api.datasets.formats.packages import import_pyarrow

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ArrowColumns", "as_text"]

logger = logging.getLogger(__name__)

MOST_FIELDS = 256
"""Of an object whose keys become fields; one with more is a map, whose keys are data."""
MOST_LEVELS = 16
LOOK_AT_ROWS = 500
"""To know the columns from."""
_SCALARS = ("null", "bool", "int", "uint", "float", "halffloat", "double", "string", "large_string")


class ArrowColumns:
    """The columns of an output so far, and rows of JSON as a table of them.

    A later value that doesn't fit widens its column: an integer to a double, a null to anything,
    an object by a key. What no type holds with the rest becomes JSON text in a column of strings,
    which is told once.

    :param source: the types of the input's columns, where it says them
    """

    def __init__(
        self, source: pa.Schema | None = None, warn: Callable[[str], None] = logger.warning
    ) -> None:
        self._pa = import_pyarrow("a table")
        self._warn = warn
        self._own = _own_types(self._pa)
        self._of_source = _usable(self._pa, source)
        self._types: dict[str, Any] = {}
        self._texts: set[str] = set()
        """Columns that had to become text."""

    @property
    def schema(self) -> pa.Schema:
        """The columns that any row has had."""
        if not self._types:
            self._types = {"id": self._pa.string()}
            self._types |= {name: self._own[name] for name in ALWAYS_THERE}
        return self._pa.schema(list(self._types.items()))

    @property
    def decimals(self) -> frozenset[str]:
        """The columns of decimals, whose digits `table` takes as texts."""
        kinds = {**self._of_source, **self._types}.items()
        return frozenset(name for name, kind in kinds if self._pa.types.is_decimal(kind))

    def add(self, schema: pa.Schema) -> None:
        """Take over what a part has."""
        for field in schema:
            if field.name in self._types:
                self._widen(field.name, field.type)
            else:
                self._types[field.name] = field.type

    def table(self, lines: bytes) -> pa.Table:
        """The rows of some lines of JSON; widens `schema` where they need it."""
        if not self._types:
            self._look_at(lines.splitlines()[:LOOK_AT_ROWS])  # mostly the others are like these
        fitting = self._read_fitting(lines)
        if fitting is not None:
            return fitting
        return self._look_at(lines.splitlines())

    def _look_at(self, lines: Sequence[bytes]) -> pa.Table:
        """The same, value by value."""
        rows = [json.loads(line) for line in lines]
        values: dict[str, list[Any]] = {}
        for number, row in enumerate(rows):
            for name, value in row.items():
                column = values.setdefault(name, [])
                column.extend([None] * (number - len(column)))
                column.append(value)
        arrays = {}
        for name, column in values.items():
            column.extend([None] * (len(rows) - len(column)))
            arrays[name] = self._array(name, column)
        schema = self.schema
        columns = [arrays.get(name) for name in schema.names]
        return self._pa.Table.from_arrays(
            [
                self._pa.nulls(len(rows), field.type) if column is None else column
                for column, field in zip(columns, schema, strict=True)
            ],
            schema=schema,
        )

    def joined(self, tables: Sequence[pa.Table]) -> pa.Table:
        """Tables of earlier, narrower schemas as one of the present schema; widens that where what
        they hold asks for it."""
        while True:
            schema = self.schema
            made = [self._conformed(table) for table in tables]
            if self.schema == schema:
                return self._pa.concat_tables(made)

    def _conformed(self, table: pa.Table) -> pa.Table:
        columns = []
        for name in self.schema.names:
            kind = self._types[name]
            column = table[name] if name in table.column_names else None
            if column is None:
                columns.append(self._pa.nulls(table.num_rows, kind))
            elif column.type == kind:
                columns.append(column)
            else:
                columns.append(self._converted(name, column.to_pylist()))
        return self._pa.Table.from_arrays(columns, names=self.schema.names)

    def _converted(self, name: str, values: Sequence[Any]) -> Any:
        """Values of a narrower type."""
        try:
            if name not in self._texts:
                return self._pa.array(values, self._types[name])
        except _refusals(self._pa):  # an integer that a double has no place for
            self._make_text(name)
        return self._pa.array(map(as_text, values), self._pa.string())

    def _read_fitting(self, lines: bytes) -> pa.Table | None:
        """The same without a look at each value, if all of them fit."""
        from pyarrow import json as arrow_json

        pa, schema = self._pa, self.schema
        of_text = pa.schema([(f.name, _in_json(pa, f.type)) for f in schema])
        try:
            table = arrow_json.read_json(
                pa.BufferReader(lines),
                arrow_json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
                arrow_json.ParseOptions(explicit_schema=of_text, unexpected_field_behavior="error"),
            )
            table = table.select(schema.names).cast(schema)
        except _refusals(pa):
            return None
        return table if _is_exact(pa, table) else None

    def _array(self, name: str, values: Sequence[Any]) -> Any:
        """The values as a column, which is widened so that it holds them."""
        pa = self._pa
        if name not in self._types:
            given = self._own.get(name, self._of_source.get(name))
            if given is not None:
                self._types[name] = given
        try:
            if name not in self._texts:
                # its own type first: into a given one Arrow cuts without a word (1.5 to 1)
                found = self._inferred(name, values)
                if _hides_bools(pa, found.type, values):
                    raise TypeError
                fitting = _narrowed(pa, found, self._types.get(name))
                if fitting is not None:
                    return fitting
                self._widen(name, found.type)
            if name not in self._texts:
                return pa.array(values, self._types[name])
        except _refusals(pa):
            self._make_text(name)
        return pa.array(map(as_text, values), pa.string())

    def _inferred(self, name: str, values: Sequence[Any]) -> Any:
        kind = self._types.get(name)
        given = (value for value in values if value is not None)
        if kind == self._pa.uint64() and all(type(value) is int for value in given):
            return self._pa.array(values, kind)  # untold, Arrow takes what an int64 holds
        return self._pa.array(values)

    def _widen(self, name: str, found: Any) -> None:
        pa = self._pa
        known = self._types.setdefault(name, pa.null())
        if name in self._texts or known == found:
            return
        pair = [pa.schema([(name, known)]), pa.schema([(name, found)])]
        try:
            merged = pa.unify_schemas(pair, promote_options="permissive").field(0).type
        except _refusals(pa):
            merged = None
        if merged is not None and _is_plain(pa, merged):
            self._types[name] = merged
        else:
            self._make_text(name)

    def _make_text(self, name: str) -> None:
        self._texts.add(name)
        self._types[name] = self._pa.string()
        self._warn(
            f"column {name!r} has values that no type of a table holds together; what isn't a "
            "string among them is written as JSON text"
        )


def _narrowed(pa: Any, found: Any, kind: Any) -> Any:
    """An array in that type, if nothing of it is lost; else None."""
    if kind is None or found.type == kind:
        return found if kind is not None and _is_plain(pa, kind) else None
    if not _is_of_shape(pa, found.type, kind):
        return None
    try:
        made = found.cast(kind)
        is_same = _in_json(pa, kind) != kind or made.cast(found.type).equals(found)
    except _refusals(pa):
        return None
    return made if is_same else None


def _hides_bools(pa: Any, kind: Any, values: Sequence[Any]) -> bool:
    """Whether there is a true or false among these that Arrow took for a double, as it does."""
    given = [value for value in values if value is not None]
    if pa.types.is_floating(kind):
        return any(isinstance(value, bool) for value in given)
    if pa.types.is_list(kind):
        return _hides_bools(pa, kind.value_type, [item for value in given for item in value])
    if pa.types.is_struct(kind):
        return any(
            _hides_bools(pa, field.type, [value.get(field.name) for value in given])
            for field in kind
        )
    return False


def _is_of_shape(pa: Any, found: Any, kind: Any) -> bool:
    """Whether values change in nothing but width: Arrow makes true of 1, and text of numbers."""
    is_list, is_struct = pa.types.is_list, pa.types.is_struct
    if pa.types.is_null(found):
        return True
    if is_list(found) and (is_list(kind) or pa.types.is_large_list(kind)):
        return _is_of_shape(pa, found.value_type, kind.value_type)
    if is_struct(found) and is_struct(kind):
        return all(
            bool(kind.get_field_index(field.name) >= 0)
            and _is_of_shape(pa, field.type, kind.field(field.name).type)
            for field in found
        )
    if pa.types.is_string(found):
        return bool(pa.types.is_large_string(kind) or _in_json(pa, kind) != kind)
    return bool(_is_number(pa, found) and _is_number(pa, kind))


def _is_number(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_exact(pa: Any, table: Any) -> bool:
    """Whether its doubles aren't rounded integers, as which JSON's are read without a word."""
    from pyarrow import compute

    doubles = (column for column in table.columns if column.type == pa.float64())
    largest = (compute.max(compute.abs(column)).as_py() for column in doubles)
    return all(value is None or value < 2**53 for value in largest)


def as_text(value: Any) -> str | None:
    """A value in a column of strings: JSON text, but for strings."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _refusals(pa: Any) -> tuple[type[Exception], ...]:
    """What Arrow raises of values that it doesn't take."""
    return (pa.ArrowException, TypeError, ValueError, OverflowError, KeyError)


def _own_types(pa: Any) -> dict[str, Any]:
    """Of the columns that a run adds: fixed, whatever the first rows say."""
    text, integer, number = pa.string(), pa.int64(), pa.float64()
    token = [("token_id", integer), ("token", text), ("logprob", number)]
    likely = pa.list_(pa.struct(token))
    logprobs = pa.list_(pa.struct([*token, ("rank", integer), ("top", likely)]))
    times = ["queue_s", "prefill_s", "decode_s", "publish_s", "total_s"]
    times += ["time_to_first_token_s", "inter_token_s"]
    texts = ("text", "finish_reason", "model", "model_revision", "worker", "error", "error_code")
    return {
        **dict.fromkeys((*texts, "fingerprint", "structured_output", "seed_key"), text),
        **dict.fromkeys(("row", "attempt"), integer),
        **dict.fromkeys(("logprobs", "prompt_logprobs"), logprobs),
        "token_ids": pa.list_(integer),
        "turn_texts": pa.list_(text),
        "applied_defaults": pa.list_(text),
        "usage": pa.struct([("prompt_tokens", integer), ("completion_tokens", integer)]),
        "timings": pa.struct([*((name, number) for name in times), ("stage_s", pa.list_(number))]),
        "outputs": pa.list_(
            pa.struct(
                [
                    ("index", integer),
                    ("text", text),
                    ("token_ids", pa.list_(integer)),
                    ("logprobs", logprobs),
                    ("structured_output", text),
                    ("finish_reason", text),
                ]
            )
        ),
    }


def _usable(pa: Any, schema: Any) -> dict[str, Any]:
    """The types of a source that values of JSON can be brought into again."""
    found = {} if schema is None else {field.name: field.type for field in schema}
    return {
        name: kind
        for name, kind in found.items()
        if name not in ALWAYS_THERE and (_is_plain(pa, kind) or _in_json(pa, kind) != kind)
    }


def _is_plain(pa: Any, kind: Any, levels: int = MOST_LEVELS) -> bool:
    """Whether it is of what JSON has, and something that all readers of tables read."""
    if levels == 0:
        return False
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(pa, kind.value_type, levels - 1)
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        names = {field.name for field in fields}
        return (
            0 < len(fields) <= MOST_FIELDS
            and len(names) == len(fields)
            and all(_is_plain(pa, field.type, levels - 1) for field in fields)
        )
    return str(kind).rstrip("0123456789") in _SCALARS


def _in_json(pa: Any, kind: Any) -> Any:
    """The type that its values have in JSON."""
    types = pa.types
    is_time = types.is_timestamp(kind) or types.is_date(kind)
    return pa.string() if is_time or types.is_decimal(kind) else kind
