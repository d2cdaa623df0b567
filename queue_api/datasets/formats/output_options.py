"""OutputOptions: in which format rows are written, and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from queue_api.datasets.formats.part_sink import DEFAULT_PART_ROWS

__all__ = ["OutputFormat", "OutputOptions"]

OutputFormat = Literal["jsonl", "parquet"]


@dataclass(frozen=True)
class OutputOptions:
    """What is wanted of an output."""

    format: OutputFormat | None = None
    """None: that of its name, .parquet or else JSON Lines."""
    part_rows: int = DEFAULT_PART_ROWS
    """Of the formats that have parts."""
