"""Which columns of a row come back, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from queue_api.datasets.layout.layout import Layout
from queue_api.wire.errors import InvalidRequestError

__all__ = ["ShownColumns", "shown_columns", "with_id"]


class ShownColumns:
    """Does what a layout says of `select`, `rename` and `drop`; the id always comes back."""

    def __init__(self, layout: Layout) -> None:
        self._select = None if layout.select is None else ("id", *layout.select)
        self._rename = layout.rename
        self._drop = frozenset(layout.drop)

    def of(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """The columns to write, in the order of `select` if that is given.

        :raises InvalidRequestError: one would have the name of another
        """
        names = self.chosen(columns)
        shown = {self._rename.get(name, name): value for name, value in names.items()}
        if len(shown) < len(names):
            old, new = next(
                (old, new) for old, new in self._rename.items() if old in names and new in names
            )
            raise InvalidRequestError(
                f"column {old!r} can't be renamed to {new!r}: the row has a column of that name"
            )
        return shown

    def chosen(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """The columns to write under their own names."""
        if self._select is not None:
            return {name: columns[name] for name in self._select if name in columns}
        if self._drop:
            return {name: value for name, value in columns.items() if name not in self._drop}
        return columns


def with_id(columns: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """The columns with the id as `id`; another column of that name steps aside."""
    if column == "id":
        return columns
    shown = {"id": columns.get(column)}
    for name, value in columns.items():
        while name in shown:
            name = f"input_{name}"  # noqa: PLW2901
        shown[name] = value
    return shown


def shown_columns(columns: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
    """What comes back of something by column, such as types; nothing where names clash."""
    has_id = layout.id_column in columns
    named = with_id(columns, layout.id_column or "id") if has_id else columns
    try:
        return ShownColumns(layout).of(named)
    except InvalidRequestError:  # which each such row says
        return {}
