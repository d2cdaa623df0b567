"""OutputOptions: in which format rows are written, and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from queue_api.datasets.formats.part_sink import DEFAULT_PART_ROWS
from queue_api.wire.errors import ConfigurationError

__all__ = ["OutputFormat", "OutputOptions"]

OutputFormat = Literal["jsonl", "parquet", "datasets", "openai"]


@dataclass(frozen=True)
class OutputOptions:
    """What is wanted of an output.

    :raises ConfigurationError: the options contradict each other
    """

    format: OutputFormat | None = None
    """None: that of its name, .parquet or else JSON Lines."""
    part_rows: int = DEFAULT_PART_ROWS
    """Of the formats that have parts."""
    errors: str | None = None
    """A file for the rows with an error; OpenAI's format has one in any case."""
    errors_only_apart: bool = False
    """Whether those rows are there alone, instead of in the output, too."""

    def __post_init__(self) -> None:
        if self.errors_only_apart and self.errors is None:
            raise ConfigurationError("--errors-only-apart needs --errors FILE to write them to")
        if self.errors == "-":
            raise ConfigurationError("--errors needs the name of a file")

    def errors_of(self, output: Path | str) -> str | None:
        """The file for rows with an error of that output."""
        if self.errors is None and self.format == "openai" and str(output) != "-":
            return f"{output}.errors.jsonl"
        return self.errors
