"""Arrow's tables to records: each value as JSON can say it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from queue_api.datasets.formats.record import RawJson, Record
from queue_api.wire.errors import DatasetError, InvalidRequestError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["check_batch", "check_names", "records_of", "signs_of_damage"]

MOST_ROWS = 1024
"""So many become Python's values at a time."""


def check_names(schema: pyarrow.Schema, name: str) -> None:
    """:raises DatasetError: two columns have one name"""
    for column in schema.names:
        if schema.names.count(column) > 1:
            raise DatasetError(
                f"{name} has the column {column!r:.80} twice: give each a name of its own"
            )


def signs_of_damage(lib: Any) -> tuple[type[Exception], ...]:
    """What pyarrow raises of bytes that it can't make sense of, be it as a number of bytes that no
    machine has."""
    return (lib.ArrowException, OSError, UnicodeDecodeError, MemoryError)


def check_batch(batch: pyarrow.RecordBatch) -> None:
    """See that what it says of itself is so: Arrow believes it, and would read past its end.

    :raises ArrowInvalid: it isn't
    """
    import pyarrow
    from pyarrow import types

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
    else:
        return
    for column in batch.columns:  # a text that isn't UTF-8 costs its own row alone
        is_text = types.is_string(column.type) or types.is_large_string(column.type)
        kind = pyarrow.binary() if types.is_string(column.type) else pyarrow.large_binary()
        (column.view(kind) if is_text else column).validate(full=True)


def records_of(batch: pyarrow.RecordBatch, before: int) -> Iterator[Record]:
    """The rows of a table.

    :param before: how many rows there were before them
    """
    for start in range(0, batch.num_rows, MOST_ROWS):
        part = batch.slice(start, MOST_ROWS)
        yield from _records(part, before + start, part.nbytes // part.num_rows)


def _records(batch: pyarrow.RecordBatch, before: int, num_bytes: int) -> Iterator[Record]:
    names = batch.schema.names
    columns = [_column(array) for array in batch.columns]
    all_shown = zip(*(column.shown for column in columns), strict=True)
    all_read = zip(*(column.read for column in columns), strict=True)
    wrong: dict[int, dict[str, str]] = {}
    for name, column in zip(names, columns, strict=True):
        for row, told in column.wrong.items():
            wrong.setdefault(row, {})[name] = f"column {name!r:.80} {told}"
    are_same = all(column.shown is column.read for column in columns)
    for row, (shown, read) in enumerate(zip(all_shown, all_read, strict=True)):
        record = Record(before + row + 1, dict(zip(names, shown, strict=True)))
        record.read = record.shown if are_same else dict(zip(names, read, strict=True))
        record.num_bytes = num_bytes
        if row in wrong:
            _refuse(record, wrong[row])
        yield record


def _refuse(record: Record, wrong: dict[str, str]) -> None:
    """Make it a wrong row, without the columns that can't be said."""
    record.shown = {name: value for name, value in record.shown.items() if name not in wrong}
    record.read = {name: value for name, value in record.read.items() if name not in wrong}
    record.error = InvalidRequestError(next(iter(wrong.values())))
    record.raw = repr(record.shown).encode()  # what there is to tell it from others


@dataclass
class _Column:
    """A column's values to write, to read, and what is wrong with some of them."""

    shown: list[Any]
    read: list[Any]
    wrong: dict[int, str] = field(default_factory=dict)


def _column(array: Any) -> _Column:
    import pyarrow

    array = _with_readable_times(array)
    if _is_plain(array.type):
        try:
            values = array.to_pylist()
        except UnicodeDecodeError:
            pass
        else:
            return _Column(values, values)
    if pyarrow.types.is_floating(array.type):
        values = array.to_pylist()
        if all(map(math.isfinite, filter(None, values))):
            return _Column(values, values)
    return _one_by_one(array)


def _one_by_one(array: Any) -> _Column:
    found = _Column([], [])
    for row, scalar in enumerate(array):
        try:
            value = scalar.as_py()
            read = _read(value)
            shown = RawJson(_dumped(value)) if _has_decimal(value) else read
        except UnicodeDecodeError:
            read = shown = None
            found.wrong[row] = "has a text that isn't UTF-8"
        except (ValueError, OverflowError, NotImplementedError) as error:
            read = shown = None
            found.wrong[row] = str(error)
        found.read.append(read)
        found.shown.append(shown)
    return found


def _is_plain(kind: Any) -> bool:
    """True if all its values are Python's that JSON has, too."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        fields = [kind.field(place) for place in range(kind.num_fields)]
        return len({part.name for part in fields}) == len(fields) and all(
            _is_plain(part.type) for part in fields
        )
    return bool(
        types.is_integer(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    )


def _with_readable_times(array: Any) -> Any:
    """Times in nanoseconds, which Python hasn't, as microseconds if they are such, else texts."""
    import pyarrow
    from pyarrow import types

    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _with_readable_times(array.storage)
    if not types.is_temporal(kind) or getattr(kind, "unit", "") != "ns":
        return array
    if types.is_timestamp(kind):
        coarser = pyarrow.timestamp("us", kind.tz)
    else:
        coarser = pyarrow.duration("us") if types.is_duration(kind) else pyarrow.time64("us")
    try:
        return array.cast(coarser)
    except pyarrow.ArrowInvalid:
        if not types.is_duration(kind):
            return array.cast(pyarrow.string())
        seconds = [None if scalar.value is None else scalar.value / 10**9 for scalar in array]
        return pyarrow.array(seconds, pyarrow.float64())


def _read(value: Any) -> Any:  # noqa: PLR0911 - a line a type
    """The value as JSON has it.

    :raises ValueError: it can't say it
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"has {value}, which isn't a number that JSON knows")
        return None if math.isnan(value) else value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        return _text_of(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, dict):
        return {name: _read(part) for name, part in value.items()}
    if isinstance(value, list):
        pairs = _pairs_of(value)
        return [_read(part) for part in value] if pairs is None else _read(pairs)
    raise ValueError(f"has a {type(value).__name__}, which JSON can't say")


def _text_of(value: bytes) -> Any:
    """Bytes that are text are one; others are told from any text by being an object."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def _pairs_of(value: list[Any]) -> dict[str, Any] | list[Any] | None:
    """A map as an object if its keys are texts, each there once; None of a list that is none."""
    if not value or not all(isinstance(pair, tuple) for pair in value):
        return None
    keys = [key for key, _ in value]
    if all(isinstance(key, str) for key in keys) and len(set(keys)) == len(keys):
        return dict(value)
    return [list(pair) for pair in value]


def _has_decimal(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_decimal, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_decimal, value))
    return isinstance(value, Decimal)


def _dumped(value: Any) -> str:
    """JSON with every digit of decimals."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, list):
        pairs = _pairs_of(value)
        if isinstance(pairs, dict):
            return _dumped(pairs)
        return f"[{', '.join(map(_dumped, pairs or value))}]"
    if isinstance(value, dict):
        parts = (f"{json.dumps(name)}: {_dumped(part)}" for name, part in value.items())
        return f"{{{', '.join(parts)}}}"
    return json.dumps(_read(value), ensure_ascii=False)
