"""The command line's options about where in a row its prompt is, and which rows are asked for."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from batchmill.commands.options import option_group, tell
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.row_selection import RowSelection
from queue_api.wire.errors import ConfigurationError

__all__ = ["layout_options", "sample_of", "selection_options"]

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
    "turns_column": Annotated[
        str | None,
        typer.Option(
            help="The column with lists of the user's turns, each asked after the answer to the "
            "last; of run alone.",
            show_default=False,
        ),
    ],
    "id_column": Annotated[
        str | None,
        typer.Option(help="The column with the ids, instead of id.", show_default=False),
    ],
    "template": Annotated[
        str | None,
        typer.Option(
            help="The prompt as a Jinja template over the columns, such as 'Q: {{ question }}'; "
            "@FILE reads it from a file.",
            show_default=False,
        ),
    ],
    "system": Annotated[
        str | None,
        typer.Option(
            help="A system's turn in front of each prompt or chat without one; a template or "
            "@FILE, too.",
            show_default=False,
        ),
    ],
    "chat": Annotated[
        bool,
        typer.Option(
            "--chat",
            help="A prompt becomes the user's turn of a chat, as the model's chat template has it.",
        ),
    ],
    "select": Annotated[
        str | None,
        typer.Option(
            help="Columns that come back, such as id,answer. Default: all.", show_default=False
        ),
    ],
    "rename": Annotated[
        list[str] | None,
        typer.Option(
            help="Another name for a column that comes back: old=new,old=new; may be repeated.",
            show_default=False,
        ),
    ],
    "drop": Annotated[
        str | None,
        typer.Option(help="Columns that don't come back, such as a,b.", show_default=False),
    ],
}


_SELECTION: dict[str, Any] = {
    "limit": Annotated[
        int | None, typer.Option(min=1, help="Ask for so many rows only.", show_default=False)
    ],
    "sample": Annotated[
        str | None,
        typer.Option(
            metavar="N|P%",
            help="Ask for N rows, or for about P% of them, drawn at random by --seed.",
            show_default=False,
        ),
    ],
    "shuffle": Annotated[
        bool,
        typer.Option("--shuffle", help="Ask in another order, drawn at random by --seed."),
    ],
}


def _layout_of(values: dict[str, Any]) -> Layout:
    """:raises ConfigurationError: they don't make sense together, or a file can't be read"""
    values["select"] = None if values["select"] is None else _names(values["select"])
    values["drop"] = _names(values["drop"] or "")
    values["rename"] = _pairs([name for given in values["rename"] or () for name in _names(given)])
    values |= {name: _text_of(name, values[name]) for name in ("template", "system")}
    return Layout(**values)


def _names(given: str) -> list[str]:
    """Names between commas; one with a comma in it stands in double quotes, as in CSV."""
    return [name.strip() for line in csv.reader([given]) for name in line if name.strip()]


def _pairs(given: Sequence[str]) -> dict[str, str]:
    """:raises ConfigurationError: one isn't old=new"""
    pairs: dict[str, str] = {}
    for pair in given:
        old, equals, new = pair.partition("=")
        if not equals or not old or not new:
            raise ConfigurationError(f"--rename {pair!r}: write old=new")
        if pairs.setdefault(old, new) != new:
            raise ConfigurationError(f"column {old!r} is renamed twice")
    return pairs


def _text_of(name: str, given: str | None) -> str | None:
    """What an option says, or the file that it names.

    :raises ConfigurationError: the file can't be read
    """
    if given is None:
        return None
    if not given.startswith("@"):
        if "\\n" in given:
            tell(
                f"--{name} has a backslash and an n, which stay such: for a line break write "
                f"$'…' in the shell, or @FILE"
            )
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"--{name}: can't read {given[1:]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"--{name}: {given[1:]} isn't text in UTF-8") from None


layout_options = option_group("layout", _LAYOUT, _layout_of)
"""Give a command options of a layout; it gets them as one `layout` parameter."""


def _selection_of(values: dict[str, Any]) -> RowSelection:
    """:raises ConfigurationError: the sample is neither a number nor a percentage"""
    return replace(
        sample_of(values["sample"] or ""), limit=values["limit"], shuffle=values["shuffle"]
    )


def sample_of(option: str) -> RowSelection:
    """A sample as an option says it, `100` or `5%`; all rows if it says nothing.

    :raises ConfigurationError: it is neither a number nor a percentage, or out of range
    """
    given = option.strip()
    try:
        percent = float(given[:-1]) if given.endswith("%") else None
        number = int(given) if given and percent is None else None
    except ValueError:
        raise ConfigurationError(
            f"--sample {given!r}: give a number of rows or a percentage, such as 100 or 5%"
        ) from None
    return RowSelection(sample=number, sample_percent=percent)


selection_options = option_group("selection", _SELECTION, _selection_of)
"""Give a command options of which rows are asked for; it gets them as one `selection` parameter."""
