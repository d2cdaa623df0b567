"""SamplingParams: how a request's text is to be generated, under vLLM's and transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["SAMPLING_FIELDS", "WIRE", "SamplingParams", "TokenId", "own_names"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 512
MAX_BAD_WORDS = 256
MAX_BIASES = 1024
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 128


def _as_list(value: object) -> object:
    """Let one stop string stand for a list of one, as OpenAI and vLLM do."""
    return [value] if isinstance(value, str) else value


WIRE = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_TokenKey = Annotated[int, Field(ge=0, lt=2**31)]  # a JSON key is a text
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Bias = Annotated[float, Field(ge=-100.0, le=100.0)]

_ALIASES = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
"""Names of `transformers.generate`, and ours for the same."""


class SamplingParams(BaseModel):
    """How the next token is chosen and when to stop. Names and meanings are vLLM's.

    Also understood are `max_new_tokens`, `stop_strings` and `do_sample` of
    `transformers.generate`; what is kept and sent has the names below.
    """

    model_config = WIRE

    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=1, lt=2**31, strict=True)
    """At most so many new tokens."""
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0 is greedy."""
    top_k: int = Field(default=0, ge=-1, strict=True)
    """Sample among the k likeliest tokens; 0 and -1 mean all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample among the likeliest tokens that together reach this probability."""
    seed: int | None = Field(default=None, ge=0, lt=2**63, strict=True)
    """Fixes the draw. Unset, it follows from the request's run and id, so a retry repeats it."""
    stop: Annotated[
        list[_StopString], BeforeValidator(_as_list), Field(max_length=MAX_STOP_STRINGS)
    ] = Field(default_factory=list)
    """Text that ends generation; it isn't part of the result's text."""
    stop_token_ids: list[TokenId] = Field(default=[], max_length=256)
    """Token ids that end generation, besides the model's end-of-text ids."""
    ignore_eos: bool = False
    """Go on past the model's end-of-text token (stop_token_ids still end generation)."""
    min_tokens: int = Field(default=0, ge=0, strict=True)
    """Neither an ending token nor a stop string ends a text of up to so many new tokens."""
    include_stop_str_in_output: bool = False
    """Leave the stop string that ended the text in it."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Sample among tokens at least this times as likely as the likeliest."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    """Above 1, tokens that are in the prompt or the new text become less likely."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken off the logit of every token that is in the new text."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken off the logit of a token as many times as it is in the new text."""
    logit_bias: dict[_TokenKey, _Bias] = Field(default={}, max_length=MAX_BIASES)
    """Added to the logits of these token ids."""
    bad_words: Annotated[
        list[_StopString], BeforeValidator(_as_list), Field(max_length=MAX_BAD_WORDS)
    ] = []
    """Words that are not to be generated."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, strict=True)
    """Return each new token's log-probability and those of the so many likeliest tokens."""

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, data: object) -> object:
        """Read the names of transformers."""
        if not isinstance(data, dict) or data.keys().isdisjoint(_FOREIGN):
            return data
        fields = dict(data)
        for alias, name in _ALIASES.items():
            if alias in fields:
                if name in fields:
                    raise ValueError(f"give '{name}' or its other name '{alias}', not both")
                fields[name] = fields.pop(alias)
        do_sample = fields.pop("do_sample", None)
        if not isinstance(do_sample, bool | None):
            raise ValueError(f"'do_sample' is {do_sample!r:.60}: must be a valid boolean")
        if do_sample is False:
            fields["temperature"] = 0.0
        elif do_sample and fields.setdefault("temperature", 1.0) == 0:
            raise ValueError("'do_sample' is True, but 'temperature' is 0, which is greedy")
        return fields

    @model_validator(mode="after")
    def _fewer_than_most(self) -> SamplingParams:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"'min_tokens' is {self.min_tokens}: must be at most max_tokens, {self.max_tokens}"
            )
        return self


_FOREIGN = frozenset({*_ALIASES, "do_sample"})
SAMPLING_FIELDS = frozenset({*SamplingParams.model_fields, *_FOREIGN})
"""Every name of a sampling field that is understood."""


def own_names(fields: Mapping[str, object]) -> dict[str, object]:
    """`fields` under our names where transformers only has another name for the same.

    So that a request's `max_new_tokens` goes before a default `max_tokens`.
    """
    return {
        _ALIASES[name] if name in _ALIASES and _ALIASES[name] not in fields else name: value
        for name, value in fields.items()
    }
