"""Columns of other tools that ask for something which is written otherwise here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from queue_api.datasets.layout.hints import instead
from queue_api.wire.foreign_fields import INSTEAD
from queue_api.wire.sampling import SAMPLING_FIELDS

__all__ = ["ColumnNotices"]


MOST_NAMES = 2000
"""Rows whose names of columns never end are data of their own kind; nobody reads so many hints."""
_PROMPTS = frozenset(
    {"prompt", "messages", "conversation", "conversations", "chat", "inputs", "body"}
)
"""What may hold the prompt elsewhere, and is a column like any where an option names another."""


class ColumnNotices:
    """Says once of each column what its reader might not expect.

    :param fields: the columns that are read as fields of the request
    :param names_prompt: an option says where the prompt is
    :param told_which: the user named the fields, and so needn't hear which are
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        fields: Collection[str],
        *,
        told_which: bool,
        names_prompt: bool = False,
    ) -> None:
        self._warn = warn
        self._fields = fields
        self._told_which = told_which
        self._names_prompt = names_prompt
        self._seen: set[str] = set()

    def look(self, columns: Mapping[str, Any], taken: Collection[str]) -> None:
        """Look at a row's columns.

        :param taken: those that became fields of its request
        """
        new = columns.keys() - self._seen
        if not new or len(self._seen) > MOST_NAMES:
            return
        # where a table has no value, nothing is asked for yet
        new = {name for name in new if columns[name] is not None}
        self._seen |= new
        sampling = sorted(name for name in new if name in taken and name in SAMPLING_FIELDS)
        if sampling and not self._told_which:
            shown = ", ".join(map(repr, sampling))
            self._warn(
                f"read as sampling fields of their rows: {shown}; --no-row-sampling leaves such "
                "columns untouched, --fields names those to read"
            )
        for name in sorted(new - set(taken)):
            if hint := self._hint(name):
                self._warn(f"column {name!r} has no effect and comes back untouched; {hint}")

    def _hint(self, name: str) -> str:
        plain = name.lower().replace("-", "_")
        if option := instead(name, names_prompt=self._names_prompt):
            return option
        if self._names_prompt and plain in _PROMPTS:
            return ""
        if plain in INSTEAD:
            return INSTEAD[plain]
        if name in self._fields:
            return ""  # the user said so
        if close := difflib.get_close_matches(plain, self._fields, n=1, cutoff=0.8):
            return f"if you meant {close[0]!r}, rename it"
        return ""
