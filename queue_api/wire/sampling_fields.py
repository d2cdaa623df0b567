"""SamplingFields: the sampling fields as keyword arguments, so that editors complete them.

What they mean and which values they take is `SamplingParams`' business; a test holds the names of
the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from queue_api.wire.sampling import GenerationDefaults
from queue_api.wire.structured_outputs import StructuredOutputs

__all__ = ["SamplingFields"]


class SamplingFields(TypedDict, total=False):
    """The fields of `SamplingParams`, then other names for some of them."""

    max_tokens: int
    truncate_max_tokens: bool
    n: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    include_stop_str_in_output: bool
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Mapping[str, float]
    bad_words: str | Sequence[str]
    logprobs: int | None
    prompt_logprobs: int | None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None
    generation_defaults: GenerationDefaults | None
    max_new_tokens: int
    stop_strings: str | Sequence[str]
    num_return_sequences: int
    do_sample: bool | None
    response_format: Mapping[str, Any] | None
