"""The columns that a run adds to those of its input."""

from __future__ import annotations

__all__ = ["ALWAYS_THERE", "OUTPUT_COLUMNS"]

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
