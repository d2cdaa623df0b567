"""The command line's options about where in a row its prompt is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from batchmill.commands.options import option_group
from queue_api.datasets.layout.layout import Layout

__all__ = ["layout_options"]

_LAYOUT: dict[str, Any] = {
    "prompt_column": Annotated[
        str | None,
        typer.Option(help="The column with the prompts, instead of prompt.", show_default=False),
    ],
    "messages_column": Annotated[
        str | None,
        typer.Option(
            help="The column with the chats, instead of messages: turns with role and content, or "
            "with from and value as ShareGPT has them; a list, or its JSON.",
            show_default=False,
        ),
    ],
    "id_column": Annotated[
        str | None,
        typer.Option(help="The column with the ids, instead of id.", show_default=False),
    ],
}


def _layout_of(values: dict[str, Any]) -> Layout:
    return Layout(**values)


layout_options = option_group("layout", _LAYOUT, _layout_of)
"""Give a command options of a layout; it gets them as one `layout` parameter."""
