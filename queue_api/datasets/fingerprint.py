"""What made a row: one digest of the columns that came and of the options that went with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["made_fingerprint", "result_fingerprint", "row_fingerprint", "unread_fingerprint"]

DIGEST_BYTES = 8


def row_fingerprint(
    columns: Mapping[str, Any], options: Mapping[str, Any], fields: Iterable[str] | None
) -> str:
    """Of a row that is read.

    :param options: the command's sampling fields, without those that the row has itself
    :param fields: the columns that count as the request's, where that isn't left to their names
    """
    parts = [columns, options, None if fields is None else sorted(fields)]
    return _digest(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())


def made_fingerprint(
    columns: Mapping[str, Any], options: Mapping[str, Any], fields: Mapping[str, Any]
) -> str:
    """Of a row whose request was made by a layout, whatever that is.

    :param columns: those that come back
    :param fields: of the request; rendered
    """
    parts = [columns, options, {"fields": fields}]
    # what a table has beside JSON's types, a date, say, is told apart by its text
    as_json = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return _digest(as_json.encode())


def unread_fingerprint(line: bytes | None) -> str:
    """Of a line that can't be read, or is too long to."""
    return _digest(b"line " + line if line is not None else b"long line")


def result_fingerprint(run: str, mark: str, index: int) -> str:
    """Of a row whose input isn't here: the run and the place in it stand for what was asked.

    :param mark: tells the run from others that had its name
    """
    return _digest(json.dumps([run, mark, index]).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
