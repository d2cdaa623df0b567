"""How many rows with errors a run puts up with."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from queue_api.wire.errors import ConfigurationError

__all__ = ["ErrorLimit", "ErrorWatch"]

WINDOW_ROWS = 1000
"""A share is watched over so many of the last rows: what went well long ago is no comfort."""
ENOUGH_ROWS = 100
"""After so many rows a share says something."""


@dataclass(frozen=True)
class ErrorLimit:
    """A number of rows, or a share of them."""

    rows: int | None = None
    share: float | None = None
    """0 to 1."""

    @classmethod
    def of(cls, given: ErrorLimit | int | str | None) -> ErrorLimit | None:
        """What `20` or `5%` means.

        :raises ConfigurationError: it is neither
        """
        if given is None or isinstance(given, ErrorLimit):
            return given
        text = str(given).strip()
        if re.fullmatch(r"\d+", text):
            return cls(rows=int(text))
        if re.fullmatch(r"\d+(\.\d+)?\s*%", text) and (share := float(text[:-1]) / 100) <= 1:
            return cls(share=share)
        raise ConfigurationError(
            f"max-errors is {text!r:.40}: give a number of rows, such as 20, or a share, such as 5%"
        )

    def exceeded(self, errors: int, rows: int) -> str:
        """What to say if so many errors are too many; else nothing."""
        if self.rows is not None and errors > self.rows:
            return f"{errors:,} of {rows:,} rows have errors, more than {self.rows:,} of them"
        if self.share is not None and errors > self.share * rows:
            return f"{errors:,} of {rows:,} rows have errors, more than {self.share:.4%} of them"
        return ""


class ErrorWatch:
    """Looks at rows as they come; an error limit of None is never reached."""

    def __init__(self, limit: ErrorLimit | None) -> None:
        self._limit = limit
        self._last: deque[bool] = deque(maxlen=WINDOW_ROWS)

    def note(self, *, is_error: bool) -> None:
        """Look at the next row."""
        self._last.append(is_error)

    def exceeded(self, errors: int, rows: int) -> str:
        """What to say if it isn't worth going on; else nothing.

        :param errors: of all rows so far
        """
        if self._limit is None:
            return ""
        if self._limit.share is None:
            return self._limit.exceeded(errors, rows)
        if len(self._last) < ENOUGH_ROWS:
            return ""
        return self._limit.exceeded(sum(self._last), len(self._last))
