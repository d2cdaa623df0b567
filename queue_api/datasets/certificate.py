"""What is said of a whole output when it is complete: counts, digests and who made it."""

from __future__ import annotations

import json
import os
import platform
import time
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from queue_api.datasets.formats.errors_sink import ErrorsApartSink
from queue_api.datasets.formats.jsonl_sink import sync_folder
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.formats.row_sink import CERTIFICATE, RowSink
from queue_api.wire.errors import DatasetError

__all__ = [
    "block_digests",
    "contradiction",
    "put_in_place",
    "ranges",
    "read_certificate",
    "write_certificate",
]

FORM = 1
MOST_BLOCKS = 4096
"""Up to so many rows each has a digest of its own; of more, several share one."""
MOST_NAMED = 20


def write_certificate(
    sink: RowSink, rows_in: int, made_by: Collection[Maker], options: Mapping[str, Any]
) -> None:
    """Write the certificate of an output that is complete, beside it, in one instant.

    Nothing is read for it but files of which no digest is known yet.

    :param rows_in: how many rows the run was to make; those of earlier runs may be others
    :param options: the run's, to be said in it
    :raises DatasetError: it can't be written
    """
    rows_each = max(1, -(-sink.end // MOST_BLOCKS))
    missing = [row for row in range(sink.end) if row not in sink] if sink.rows < rows_in else []
    apart = sink.errors_sink if isinstance(sink, ErrorsApartSink) else None
    content = {
        "certificate": FORM,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "output": Path(sink.name).name,
        "format": sink.format,
        "errors_file": apart and _place_of(apart, sink.certificate.parent),
        "rows_in": rows_in,
        "rows_out": sink.rows,
        "missing": missing[:MOST_NAMED],
        "rows": list(ranges(row for row in range(sink.end) if row in sink)),
        "errors": dict(sorted(sink.error_codes.items())),
        "content": f"{sink.content:032x}",
        "models": [
            {"model": maker.model, "revision": maker.revision}
            for maker in sorted(filter(None, made_by), key=str)
        ],
        "options": options,
        "versions": {"batchmill": version("batchmill"), "python": platform.python_version()},
        "files": [asdict(file) for file in sink.files()],
        "rows_to_a_digest": rows_each,
        "digests": block_digests(sink.digests, rows_each),
    }
    try:
        put_in_place(sink.certificate, json.dumps(content, indent=1, ensure_ascii=False))
    except OSError as error:
        raise DatasetError(f"can't write {sink.certificate}: {error.strerror or error}") from None


def _place_of(sink: RowSink, folder: Path) -> dict[str, str]:
    return {"name": os.path.relpath(sink.name, folder), "format": sink.format}


def put_in_place(path: Path, content: str) -> None:
    """Write a file, in one instant: whoever reads it meanwhile has the old one or the new one."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync_folder(path.parent)


def ranges(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers among growing ones."""
    first = last = None
    for row in rows:
        if last is not None and first is not None and row != last + 1:
            yield first, last
            first = None
        first, last = (row if first is None else first), row
    if first is not None and last is not None:
        yield first, last


def block_digests(digests: array[int], rows_each: int) -> list[str]:
    """The sums, modulo 2^64, of so many rows' digests each."""
    starts = range(0, len(digests), rows_each)
    return [f"{sum(digests[start : start + rows_each]) % 2**64:016x}" for start in starts]


def read_certificate(path: Path) -> dict[str, Any] | None:
    """What it says; None if there is none.

    :raises DatasetError: it can't be read
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or found.get("certificate") != FORM:
            raise ValueError("it isn't a certificate of this version of batchmill")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"can't read {path}: {error}") from None
    return found


def contradiction(sink: RowSink) -> str:
    """What to say of an output that isn't what its certificate says; nothing where it is."""
    try:
        said = read_certificate(sink.certificate) if sink.is_durable else None
    except DatasetError as error:
        return str(error)
    if said is None:
        return ""
    digests: Sequence[str] = block_digests(sink.digests, said["rows_to_a_digest"])
    if (said["rows_out"], said["digests"]) == (sink.rows, digests):
        return ""
    name = sink.name
    return f"{name} isn't what {name}{CERTIFICATE} says: `batchmill verify {name}` tells more"
