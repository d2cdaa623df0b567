"""Rows as a layout reads them, for tests."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from queue_api.datasets.columns import Row, RowParser
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.formats.json_record import JsonRecordReader
from queue_api.datasets.layout.layout import Layout
from queue_api.wire.errors import DatasetError, RequestError
from queue_api.wire.schemas import GenerationRequest


def parser(**options: Any) -> RowParser:
    """Of rows in the layout that the options say."""
    own = {name: options.pop(name) for name in [*options] if name in Layout.__dataclass_fields__}
    options.setdefault("warn", lambda _: None)
    return RowParser(layout=Layout(**own), **options)


def parse(*rows: dict[str, Any] | str, **options: Any) -> list[Row]:
    """The rows, in the layout that the options say."""
    read, reader = parser(**options), JsonRecordReader()
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    return [read.parse(reader.read(line.encode(), n)) for n, line in enumerate(lines, 1)]


def request(row: Row) -> GenerationRequest:
    """A row's request, which it has to have."""
    assert isinstance(row.request, GenerationRequest), row.request
    return row.request


def turns(row: Row) -> list[tuple[str, Any]]:
    """Role and content of a row's messages."""
    return [(m.role, m.content) for m in request(row).messages or ()]


def wrong(row: Row) -> str:
    """What is said of a row that has to be wrong."""
    assert isinstance(row.request, RequestError), row.request
    return str(row.request)


def look(path: Path, **options: Any) -> tuple[str, str]:
    """How the first row of a file is read, or else what is said of the file."""

    async def main() -> tuple[str, str]:
        data = DatasetInput(path)
        try:
            await data.look(layout=Layout(**options))
        except DatasetError as error:
            return "", str(error)
        finally:
            await data.close()
        return data.how_read, ""

    return asyncio.run(main())
