"""Which format an output is written in: that asked for, else that of its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from queue_api.datasets.formats.datasets_sink import DatasetsSink
from queue_api.datasets.formats.errors_sink import (
    ErrorRowsSink,
    ErrorsApartSink,
    ErrorsCopiedSink,
)
from queue_api.datasets.formats.jsonl_sink import JsonLinesSink
from queue_api.datasets.formats.openai_sink import BatchLinesSink
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.formats.parquet_sink import ParquetSink
from queue_api.datasets.formats.row_sink import RowSink
from queue_api.wire.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["is_parquet", "open_sink"]

logger = logging.getLogger(__name__)


def _no_schema() -> None:
    return None


def open_sink(
    path: Path | str,
    options: OutputOptions = OutputOptions(),  # noqa: B008 - it is frozen
    *,
    schema: Callable[[], pyarrow.Schema | None] = _no_schema,
    warn: Callable[[str], None] = logger.warning,
) -> RowSink:
    """Where rows are written; `-` is stdout. The format is the options', else the name's.

    :param schema: the types of the input's columns, where it says them; for formats that have types
    :raises DatasetError: it can't be written, is another's, or is being written
    :raises MissingExtraError: a package for its format isn't installed
    """
    main = _main_sink(path, options, schema, warn)
    errors = options.errors_of(path)
    if errors is None:
        return main
    is_openai = options.format == "openai"
    try:
        apart = BatchLinesSink(errors) if is_openai else ErrorRowsSink(errors)
        try:
            if os.path.samestat(main.info(), apart.info()):
                raise DatasetError(f"{errors} can't be both the output and the file of errors")
            if is_openai or options.errors_only_apart:
                return ErrorsApartSink(main, apart)
            return ErrorsCopiedSink(main, apart)
        except BaseException:
            apart.close(keep_empty=False)
            raise
    except BaseException:
        main.close(keep_empty=False)
        raise


def _main_sink(
    path: Path | str,
    options: OutputOptions,
    schema: Callable[[], pyarrow.Schema | None],
    warn: Callable[[str], None],
) -> RowSink:
    kind = options.format or ("parquet" if is_parquet(path) else "jsonl")
    if kind in ("jsonl", "openai"):
        return BatchLinesSink(path) if kind == "openai" else JsonLinesSink(path)
    sink = DatasetsSink if kind == "datasets" else ParquetSink
    return sink(path, part_rows=options.part_rows, schema=schema(), warn=warn)


def is_parquet(path: Path | str) -> bool:
    """Whether a name is that of Parquet."""
    return str(path).rstrip("/").lower().endswith((".parquet", ".pq"))
