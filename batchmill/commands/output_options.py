"""Options of a command that writes rows: the format, parts and a file for errors."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from batchmill.commands.options import option_group
from queue_api.datasets.formats.output_options import OutputFormat, OutputOptions

__all__ = ["output_options"]

_OPTIONS: dict[str, Any] = {
    "output_format": Annotated[
        OutputFormat | None,
        typer.Option(
            help="Default: parquet for OUTPUT.parquet, else jsonl, packed for .gz and .zst.",
            show_default=False,
        ),
    ],
    "part_rows": Annotated[
        int | None,
        typer.Option(min=1, help="Rows to a file of Parquet (50000).", show_default=False),
    ],
    "errors": Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write rows with an error there, too: number, line, reason and the row.",
            show_default=False,
        ),
    ],
    "errors_only_apart": Annotated[
        bool, typer.Option("--errors-only-apart", help="Write them there alone.")
    ],
}


def _outputs_of(values: dict[str, Any]) -> OutputOptions:
    given = {name: value for name, value in values.items() if value}
    if "output_format" in given:
        given["format"] = given.pop("output_format")
    return OutputOptions(**given)


output_options = option_group("outputs", _OPTIONS, _outputs_of)
"""Give a command these options; it gets them as one `outputs` parameter."""
