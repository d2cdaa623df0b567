"""The columns that a run adds to those of its input."""

from __future__ import annotations

from collections.abc import Container

__all__ = ["ALWAYS_THERE", "OUTPUT_COLUMNS", "free_name"]

OUTPUT_COLUMNS = (
    "row",
    "text",
    "turn_texts",
    "token_ids",
    "logprobs",
    "prompt_logprobs",
    "outputs",
    "structured_output",
    "applied_defaults",
    "seed_key",
    "finish_reason",
    "usage",
    "timings",
    "model",
    "model_revision",
    "worker",
    "attempt",
    "error",
    "error_code",
    "fingerprint",
)
"""What an output row has besides its input columns."""
_ONLY_IF_ASKED = frozenset(
    {
        "turn_texts",
        "token_ids",
        "logprobs",
        "prompt_logprobs",
        "outputs",
        "structured_output",
        "applied_defaults",
        "seed_key",
    }
)
ALWAYS_THERE = tuple(name for name in OUTPUT_COLUMNS if name not in _ONLY_IF_ASKED)
"""Those of every row."""


def free_name(name: str, names: Container[str]) -> str:
    """What an input's column is called in an output, beside the output's own.

    :param names: of the input's columns
    """
    shown = name
    while shown in OUTPUT_COLUMNS or (shown != name and shown in names):
        shown = f"input_{shown}"
    return shown
