"""Says what a file is that holds no rows of JSON Lines, and how to make them of it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from queue_api.datasets.layout.hints import is_chat, which_option
from queue_api.datasets.layout.layout import quoted
from queue_api.wire.errors import DatasetError
from queue_api.wire.sampling import SAMPLING_FIELDS

if TYPE_CHECKING:
    from queue_api.datasets.columns import Row

__all__ = ["LINE_BYTES", "check_format", "list_in_object", "what_text_is", "why_unreadable"]

MOST_COLUMNS_SHOWN = 20
LINE_BYTES = 1000
"""So much of each line is looked at."""
_MAGIC: dict[bytes, tuple[str, str]] = {
    b"\x04\x22\x4d\x18": ("lz4", "unpack it first"),
    b"7z\xbc\xaf\x27\x1c": ("7-zip", "unpack it first"),
    b"PK\x03\x04": ("a zip archive (or a spreadsheet)", "unpack it, or save it as JSON Lines"),
    b"PARE": ("encrypted Parquet", "decrypt it first"),
    b"Obj\x01": ("Avro", "write it as JSON Lines"),
    b"ORC": ("ORC", "write it as JSON Lines"),
    b"SQLite format 3\x00": ("an SQLite database", "write a query's rows as JSON Lines"),
    b"\x89HDF\r\n\x1a\n": ("HDF5", "write it as JSON Lines"),
    b"\x93NUMPY": ("a NumPy array", "write it as JSON Lines"),
    b"\x80\x03": ("a pickle", "write it as JSON Lines"),
    b"\x80\x04": ("a pickle", "write it as JSON Lines"),
    b"\x80\x05": ("a pickle", "write it as JSON Lines"),
    b"%PDF": ("a PDF", "write its text as JSON Lines"),
}
_LIST_OF_OBJECTS = re.compile(rb'"([^"\\]+)"\s*:\s*\[\s*\{')
_TAR_MAGIC, _TAR_AT = b"ustar", 257


def check_format(start: bytes, path: Path | str) -> None:
    """Look at the first bytes of an input.

    :raises DatasetError: it is in a format that is known not to be JSON Lines
    """
    if start[_TAR_AT:].startswith(_TAR_MAGIC):
        raise DatasetError(f"{path} is a tar archive, not JSON Lines: unpack it first")
    for magic, (name, hint) in _MAGIC.items():
        if start.startswith(magic):
            raise DatasetError(f"{path} is {name}, not JSON Lines: {hint.format(path)}")


def why_unreadable(
    path: Path | str,
    rows: Sequence[Row],
    num_rows: int,
    known: str,
    *,
    knows_prompt: bool = False,
) -> str:
    """What to say of an input none of whose first rows can be read.

    :param num_rows: how many were looked at; `rows` may be fewer
    :param known: what its source says that it is
    :param knows_prompt: the user said where the prompt is
    """
    if num_rows == 1 and not knows_prompt and (told := _list_in(path, rows[0])):
        return told
    if known and not any(row.columns for row in rows):
        return known
    columns = sorted({name for row in rows for name in row.columns})
    looked_at = "its row" if num_rows == 1 else f"all {num_rows} rows that were looked at"
    told = f"no row of {path} can be read ({looked_at}): {rows[0].request}"
    if columns and not knows_prompt and not {"prompt", "messages"} & {*columns}:
        hint = which_option([row.columns for row in rows])
        told += f". Its columns are {quoted(columns)}; {hint}"
    if sampling := [name for name in columns if name in SAMPLING_FIELDS]:
        shown = ", ".join(map(repr, sampling))
        told += f". If {shown} are columns of yours and no sampling fields: --no-row-sampling"
    return told


def _list_in(path: Path | str, row: Row) -> str:
    names = [
        name
        for name, value in row.columns.items()
        if isinstance(value, list)
        and value
        and all(isinstance(part, dict) for part in value)
        and not is_chat(value)
    ]
    if len(names) > 1:
        shown = ", ".join(map(repr, names[:MOST_COLUMNS_SHOWN]))
        return (
            f"{path} is one object with several lists of objects, {shown}: write the one whose "
            f"objects are the rows as a list of its own, such as jq '.[{json.dumps(names[0])}]' "
            f"{path}"
        )
    return _take_list(path, names[0]) if names else ""


def list_in_object(path: Path | str, start: bytes) -> str:
    """What to say of one object that begins so, and is too long for a row, if it holds rows."""
    found = _LIST_OF_OBJECTS.search(start)
    return "" if found is None else _take_list(path, found[1].decode(errors="replace"))


def _take_list(path: Path | str, name: str) -> str:
    return (
        f"{path} is one object, whose {name!r} is a list of objects: if those are the rows, "
        f"write them as a list of their own: jq '.[{json.dumps(name)}]' {path}"
    )


def what_text_is(path: Path | str, lines: Sequence[bytes]) -> str:
    """What to say of a text that looks like something else than JSON Lines; or nothing.

    :param lines: the beginning of each of its first lines
    """
    first = lines[0].strip()
    if first.startswith(b"{"):
        if len(lines) > 1 and not lines[1].lstrip().startswith(b"{"):
            return (
                f"{path} has objects over several lines, not one to a line: "
                f"write one to each line: jq -c . {path}"
            )
        return ""
    if first.startswith(b"["):
        return (
            f"{path} begins with a list, but not of objects: write an object to each line, such as "
            f"jq -c '.[] | {{prompt: .}}' {path}"
        )
    if header := _header(lines):
        shown = ", ".join(map(repr, header[:MOST_COLUMNS_SHOWN]))
        return f"{path} looks like CSV with the columns {shown}: read it as such with --format csv"
    if first and _is_text(first) and not _is_json(first):
        return (
            f"{path} looks like plain text: --format txt takes each line for a prompt, "
            "--format csv takes the first for the columns' names"
        )
    return ""


def _header(lines: Sequence[bytes]) -> list[str]:
    """The columns of a table in text; none if it isn't one."""
    try:
        texts = [line.decode("utf-8-sig") for line in lines[:20]]
    except UnicodeDecodeError:
        return []
    for separator in ",\t;|":
        try:
            table = list(csv.reader(texts, delimiter=separator))
        except csv.Error:
            continue
        if table and len(table[0]) > 1 and all(len(row) == len(table[0]) for row in table[:2]):
            return [name[:40] for name in table[0]]
    return []


def _is_text(line: bytes) -> bool:
    text = line.decode(errors="replace").rstrip("\ufffd" if len(line) >= LINE_BYTES else "")
    return "\ufffd" not in text and "\0" not in text


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
