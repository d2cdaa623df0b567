"""How a request ended."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from queue_api.wire.schemas import FinishReason, StructuredOutputStatus, TokenLogprobs

__all__ = ["Completion"]


@dataclass(slots=True)
class Completion:
    """How a request ended. Times are `time.perf_counter` seconds, None where it didn't happen."""

    key: str
    text: str
    """The new text, without special tokens, cut where a stop string begins; or ends, if asked."""
    token_ids: list[int]
    """All new tokens, the one that ended the text included, as `transformers.generate` has it."""
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    error: BaseException | None = None
    added_at: float | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `token_ids`, if the request asked for them."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One for each token of the prompt, None the first, if the request asked for them."""
    applied_defaults: tuple[str, ...] = ()
    """The fields of the model's generation config that had a part in it."""
    structured_output: StructuredOutputStatus | None = None
    """Whether `text` matches the request's grammar, if it asks for structured output."""
    stage_s: list[float] = field(default_factory=list)
    """Per stage: the sum over its steps of the step's time over the sequences in it."""
    samples: Seq[Completion] = ()
    """All samples where the request asks for several; the fields above are the first's then, but
    for times and `completion_tokens`, which are of all."""
