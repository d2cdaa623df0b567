"""SamplingParams: how a request's text is to be generated, under vLLM's and transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from queue_api.wire.structured_outputs import StructuredOutputs, from_response_format

__all__ = [
    "SAMPLING_FIELDS",
    "WIRE",
    "GenerationDefaults",
    "SamplingParams",
    "SharedSamplingParams",
    "TokenId",
    "own_names",
]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 512
MAX_BAD_WORDS = 256
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
DEFAULT_MAX_TOKENS = 128


def _as_texts(value: object) -> object:
    """Let one string stand for a list of one, as OpenAI and vLLM do."""
    if not isinstance(value, str | list | tuple):
        raise ValueError("must be a string or a list of strings")
    return [value] if isinstance(value, str) else value


GenerationDefaults = Literal["model", "all", "none"]
"""What of a model's generation config counts where a request says nothing."""
WIRE = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_TokenKey = Annotated[int, Field(ge=0, lt=2**31)]  # a JSON key is a string
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Bias = Annotated[float, Field(ge=-100.0, le=100.0)]

_ALIASES = {
    "max_new_tokens": "max_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}
"""Names of `transformers.generate`, and ours for the same."""


class SamplingParams(BaseModel):
    """How the next token is chosen and when to stop. Names and meanings are vLLM's.

    Also understood are `max_new_tokens`, `stop_strings`, `num_return_sequences` and `do_sample`
    of `transformers.generate` and OpenAI's `response_format`; what is kept and sent has the names
    below.
    """

    model_config = WIRE

    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=1, lt=2**31, strict=True)
    """At most so many new tokens; not given, no more than the model's length has room for."""
    truncate_max_tokens: bool = False
    """Cut max_tokens to what the model's length has room for, where it would be refused."""
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES, strict=True)
    """So many samples, each a text of its own."""
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0 is greedy."""
    top_k: int = Field(default=0, ge=-1, strict=True)
    """Sample among the k likeliest tokens; 0 and -1 mean all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample among the likeliest tokens that together reach this probability."""
    seed: int | None = Field(default=None, ge=0, lt=2**63, strict=True)
    """Fixes the draw. Unset, it follows from the request's run and id, so a retry repeats it."""
    stop: Annotated[
        list[_StopString], BeforeValidator(_as_texts), Field(max_length=MAX_STOP_STRINGS)
    ] = Field(default_factory=list)
    """Strings that end generation; what ended it isn't part of the result's text."""
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=256)
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
    logit_bias: dict[_TokenKey, _Bias] = Field(default_factory=dict, max_length=MAX_BIASES)
    """Added to the logits of these token ids."""
    bad_words: Annotated[
        list[_StopString], BeforeValidator(_as_texts), Field(max_length=MAX_BAD_WORDS)
    ] = Field(default_factory=list)
    """Words that are not to be generated."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, strict=True)
    """Return each new token's log-probability and those of the so many likeliest tokens."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, strict=True)
    """The same for each token of the prompt but the first."""
    structured_outputs: StructuredOutputs | None = None
    """Structured output: a schema, pattern or grammar that the text must match."""
    generation_defaults: GenerationDefaults | None = None
    """What of the model's generation config counts for the fields that aren't given: `model`, what
    `generate(do_sample=False)` applies; `all`, its sampling fields too; `none`. Unset, the
    worker's setting."""

    def __eq__(self, other: object) -> bool:
        # pydantic's takes much longer; which fields were given doesn't count here
        return isinstance(other, SamplingParams) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # as ever: some fields are lists

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, data: object) -> object:
        """Read the names of transformers and OpenAI."""
        if not isinstance(data, dict) or data.keys().isdisjoint(_FOREIGN):
            return data
        fields = dict(data)
        for alias, name in _ALIASES.items():
            if alias in fields:
                if name in fields:
                    raise ValueError(f"give '{name}' or its other name '{alias}', not both")
                fields[name] = fields.pop(alias)
        if (response_format := fields.pop("response_format", None)) is not None:
            if fields.get("structured_outputs") is not None:
                raise ValueError("give 'structured_outputs' or 'response_format', not both")
            fields["structured_outputs"] = from_response_format(response_format)
        do_sample = fields.pop("do_sample", None)
        if not isinstance(do_sample, bool | None):
            raise ValueError(f"'do_sample' is {do_sample!r:.60}: must be a valid boolean")
        if do_sample is False:
            fields["temperature"] = 0.0
        elif do_sample and fields.setdefault("temperature", 1.0) == 0:
            raise ValueError("'do_sample' is True, but 'temperature' is 0, which is greedy")
        return fields

    @model_validator(mode="after")
    def _agree(self) -> SamplingParams:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"'n' is {self.n}: greedy samples are all the same, so give a temperature above 0"
            )
        if self.structured_outputs is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError(
                "'ignore_eos' and 'min_tokens' can't be with 'structured_outputs': "
                "such a text ends where its grammar does"
            )
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"'min_tokens' is {self.min_tokens}: must be at most max_tokens, {self.max_tokens}"
            )
        return self


MOST_SHARED = 1024
MOST_SHARED_FIELDS = 16
_SCALARS = frozenset({bool, float, int, str, type(None)})


@lru_cache(maxsize=MOST_SHARED, typed=True)  # typed: a `max_tokens` of True isn't one of 1
def _shared(names: tuple[str, ...], *values: object) -> SamplingParams:
    return SamplingParams.model_validate(dict(zip(names, values, strict=True)))


def _share(given: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Check the same fields once: most requests of a run have the same."""
    if type(given) is dict and len(given) <= MOST_SHARED_FIELDS:
        values = given.values()
        # of values that hold others the types within would count, too
        if _SCALARS.issuperset(map(type, values)):
            try:
                return _shared(tuple(given), *values)
            except ValidationError:
                pass  # raised again below, where it says of which field of which request
    return validate(given)


SharedSamplingParams = Annotated[SamplingParams, WrapValidator(_share)]
"""SamplingParams that requests with the same fields have in common; they are frozen."""

_FOREIGN = frozenset({*_ALIASES, "do_sample", "response_format"})
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
