"""Text of strangers made harmless for a terminal or a log: it moves no cursor and ends no line."""

from __future__ import annotations

import logging
import re

__all__ = ["PlainTextFormatter", "on_one_line", "visible"]

# C0 and C1 controls, line and paragraph separators, and what turns the direction of writing
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
_HALVES = re.compile("[\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with each control character shown as an escape, but for line ends and tabs."""
    return _shown(text, kept="\n\t")


def on_one_line(text: str) -> str:
    """The text with each control character shown as an escape, line ends, too."""
    return _shown(text, kept="\t")


def _shown(text: str, *, kept: str) -> str:
    text = _CONTROLS.sub(lambda m: m[0] if m[0] in kept else ascii(m[0])[1:-1], text)
    return _HALVES.sub(lambda m: ascii(m[0])[1:-1], text)


class PlainTextFormatter(logging.Formatter):
    """A record's message on one line, whatever ids or texts are in it; a traceback keeps its."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = on_one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802 - as above
        return visible(super().formatException(ei))  # type: ignore[arg-type]
