"""Layout: which columns of a row become its request, as the user says it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from queue_api.wire.errors import ConfigurationError

__all__ = ["Layout", "quoted"]


@dataclass(frozen=True)
class Layout:
    """Where in a row its prompt is.

    Without any of it a row has a `prompt` or `messages`, or is a line of OpenAI's batch format.

    :raises ConfigurationError: two of these that exclude each other, or one that is empty
    """

    prompt_column: str | None = None
    """The prompts' column, instead of `prompt`."""
    messages_column: str | None = None
    """The chats' column, instead of `messages`: a list, or its JSON as a text, of turns with `role`
    and `content`, or with `from` and `value` as ShareGPT has them. A last turn of the assistant's
    is left out: it is the answer that is asked for."""
    turns_column: str | None = None
    """A column with a list of the user's turns, or its JSON, each asked after the answer to the
    last."""
    id_column: str | None = None
    """The ids' column, instead of `id`."""
    template: str | None = None
    """The prompt as a Jinja template: its variables are the columns, `columns` has all of them. It
    is rendered in a sandbox, strict about names that aren't there, bounded in steps and size."""
    system: str | None = None
    """What a system's turn in front of each row's prompt or messages says, a template, too. A row
    whose messages begin with such a turn keeps its own; a prompt becomes the user's turn."""

    chat: bool = False
    """A prompt becomes the user's turn of a chat, as the model's template has it, even without a
    system's."""

    select: Sequence[str] | None = None
    """The columns that come back, in this order, besides `id`; None: all."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Other names for columns that come back, by the ones they have."""
    drop: Sequence[str] = ()
    """Columns that don't come back."""

    def __post_init__(self) -> None:
        # the same layout whether a list or a tuple is given
        object.__setattr__(self, "drop", tuple(self.drop))
        if self.select is not None:
            object.__setattr__(self, "select", tuple(self.select))
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            first, second = (name.replace("_", " ") for name in given[:2])
            raise ConfigurationError(f"give a {first} or a {second}, not both")
        for name in (*_SOURCES, "id_column", "system"):
            if getattr(self, name) == "":
                raise ConfigurationError(f"the {name.replace('_', ' ')} is empty")
        self._check_shown()

    def _check_shown(self) -> None:
        for what, names in (("selected", self.select or ()), ("dropped", self.drop)):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ConfigurationError(f"column {twice[0]!r} is {what} twice")
        if both := sorted({*(self.select or ())} & {*self.drop}):
            raise ConfigurationError(f"column {both[0]!r} is selected and dropped")
        for name in ("id", ""):
            if name in (*self.drop, *self.rename, *self.rename.values()):
                raise ConfigurationError(
                    "rows are found by their 'id': it can't be dropped or renamed, and no column "
                    "can become it but by the id column"
                    if name
                    else "a column without a name can't be dropped or renamed, nor become one"
                )
        for old, new in self.rename.items():
            if old in self.drop or (self.select is not None and old not in self.select):
                raise ConfigurationError(f"column {old!r} is renamed, but doesn't come back")
            if [*self.rename.values()].count(new) > 1:
                raise ConfigurationError(f"two columns are renamed to {new!r}")

    @property
    def names_prompt(self) -> bool:
        """True if it says where the prompt is, so that `prompt` and `messages` are columns like
        any."""
        return any(getattr(self, name) is not None for name in _SOURCES)

    @property
    def named_columns(self) -> dict[str, str]:
        """Columns that there have to be, and what each is named for."""
        named = {
            "the prompt": self.prompt_column,
            "the messages": self.messages_column,
            "the turns": self.turns_column,
            "the id": self.id_column,
        }
        columns = dict.fromkeys((*(self.select or ()), *self.rename, *self.drop), "the output")
        columns.pop("id", None)
        return columns | {column: use for use, column in named.items() if column is not None}

    def as_options(self) -> dict[str, Any]:
        """What it says, as JSON can; nothing of what isn't said. `Layout(**…)` makes it again."""
        default = asdict(Layout())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def identity(self) -> list[str]:
        """What tells it from other layouts; nothing for the default one."""
        return [] if self == Layout() else [json.dumps(asdict(self), sort_keys=True, default=list)]


_SOURCES = ("prompt_column", "messages_column", "turns_column", "template")
"""What may say where the prompt is; one at a time."""


def quoted(names: Iterable[object], most: int = 20) -> str:
    """Names of columns for a message."""
    shown = [repr(name)[:80] for name in names]
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")
