"""What travels through Redis: requests, results and their parts, as pydantic models.

With `sampling.py` this module is the one description of the wire. It imports neither redis nor
torch, so the engine may use it as well as the client.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from enum import StrEnum
from reprlib import Repr
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import to_json

from queue_api.wire.errors import GenerationFailedError, InvalidRequestError, RequestError
from queue_api.wire.foreign_fields import INSTEAD
from queue_api.wire.sampling import WIRE, SamplingParams, SharedSamplingParams, TokenId
from queue_api.wire.structured_outputs import StructuredOutputs, parsed

__all__ = [
    "HALF_PAIR",
    "ChatMessage",
    "CompletionOutput",
    "ErrorDetail",
    "FinishReason",
    "GenerationRequest",
    "GenerationResult",
    "JobTimings",
    "SamplingParams",
    "StructuredOutputStatus",
    "StructuredOutputs",
    "TokenLogprob",
    "TokenLogprobs",
    "describe",
]

MAX_ID_CHARS = 256
MAX_MESSAGES = 4096
MAX_PROMPT_CHARS = 4 * 2**20
MAX_METADATA_BYTES = 256 * 2**10
MAX_METADATA_DEPTH = 150
"""pydantic reads JSON of up to 200 levels, those around the metadata among them."""
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
"""Texts, so that brackets in them don't count, and brackets."""
MAX_DIGITS = sys.int_info.default_max_str_digits
"""Of an integer that Python reads as JSON."""


class FinishReason(StrEnum):
    """Why a request ended; exactly one per request."""

    STOP = "stop"
    """End-of-text token, a stop string or a stop token id."""
    LENGTH = "length"
    """max_tokens reached."""
    ERROR = "error"
    """See the result's `error`."""
    CANCELLED = "cancelled"
    """Cancelled by a client."""


class StructuredOutputStatus(StrEnum):
    """Whether a text matches the grammar that its request asks for."""

    VALID = "valid"
    TRUNCATED = "truncated"
    """It ended too early, but can be continued to one that is valid."""
    INVALID = "invalid"


def _known_parts(content: object) -> object:
    """Say of parts that aren't text what they are."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise ValueError(
                f"has a part of the type {kind!r:.40}: of content parts only text is taken"
            )
    return content


class TextPart(BaseModel):
    """A part of a message's content, in OpenAI's form."""

    model_config = WIRE

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]


_Json = TypeVar("_Json")


def _fit_for_json(value: _Json) -> _Json:
    """See that it can be sent, and comes out as it was.

    :raises ValueError: saying why not
    """
    try:
        as_json = to_json(value)
    except ValueError as error:
        raise ValueError(f"can't be written as JSON ({str(error)[:80]})") from None
    if len(as_json) > MAX_METADATA_BYTES:
        raise ValueError(f"takes {len(as_json)} bytes as JSON; the limit is {MAX_METADATA_BYTES}")
    if len(as_json) > MAX_DIGITS:
        try:
            json.loads(as_json)
        except ValueError:
            # it would make the whole job unreadable
            raise ValueError(
                f"can't be written as JSON (an integer of more than {MAX_DIGITS} digits)"
            ) from None
    _check_readable(as_json)
    return value


def _check_readable(metadata: bytes) -> None:
    """:raises ValueError: whoever reads the result couldn't read this in it, or not as it was"""
    brackets = metadata.count(b"[") + metadata.count(b"{")
    if brackets > MAX_METADATA_DEPTH:
        depth = deepest = 0
        for token in _BRACKETS.findall(metadata):
            depth += (token in b"[{") - (token in b"]}")
            deepest = max(deepest, depth)
        if deepest > MAX_METADATA_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_METADATA_DEPTH} levels")
    if b"NaN" in metadata or b"Infinity" in metadata:
        json.loads(metadata, parse_constant=_no_constant)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"can't be written as JSON ({name} isn't a number that JSON knows)")


class ChatMessage(BaseModel):
    """One turn of a conversation, to be rendered by the model's chat template."""

    model_config = WIRE

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[
        Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)],
        BeforeValidator(_known_parts),
    ]
    """May be absent beside `tool_calls`. Parts are for templates that take them."""
    name: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None
    tool_calls: Annotated[list[dict[str, Any]], AfterValidator(_fit_for_json)] | None = None
    """The calls of an assistant's turn, in OpenAI's form."""
    tool_call_id: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None
    """Which call a tool's turn answers."""
    reasoning_content: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: object) -> object:
        """OpenAI's client writes a null for each field that a message hasn't."""
        if not isinstance(data, Mapping):
            return data
        fields = {name: value for name, value in data.items() if value is not None}
        if fields.get("tool_calls"):
            fields.setdefault("content", "")
        return fields


class GenerationRequest(BaseModel):
    """One prompt, as text, token ids or chat messages, and how to continue it."""

    model_config = WIRE

    id: str = Field(min_length=1, max_length=MAX_ID_CHARS)
    prompt: (
        Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
        | Annotated[list[TokenId], Field(max_length=MAX_PROMPT_CHARS, fail_fast=True)]
        | None
    ) = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    tools: (
        Annotated[list[dict[str, Any]], BeforeValidator(parsed), AfterValidator(_fit_for_json)]
        | None
    ) = None
    """Functions that the model may call, in OpenAI's form, for the chat template."""
    chat_template_kwargs: (
        Annotated[dict[str, Any], BeforeValidator(parsed), AfterValidator(_fit_for_json)] | None
    ) = None
    """Variables of the chat template, such as `enable_thinking`."""
    continue_final_message: bool = False
    """Continue the last message instead of beginning an answer to it."""
    sampling: SharedSamplingParams = SamplingParams()
    timeout_s: float | None = Field(default=None, gt=0)
    """How long a worker may take for it, waiting its turn in the engine included."""
    deadline: float | None = Field(default=None, gt=0)
    """Epoch seconds after which nobody wants the text; then it ends as an error."""
    return_token_ids: bool = False
    """Put the generated token ids into the result."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Comes back untouched in the result."""

    @field_validator("metadata")
    @classmethod
    def _can_come_back(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        """What can't come back in the result is refused here, not found out afterwards."""
        return _fit_for_json(metadata) if metadata else metadata

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerationRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages', not both and not neither")
        for name in ("tools", "chat_template_kwargs", "continue_final_message"):
            if self.messages is None and getattr(self, name):
                raise ValueError(
                    f"'{name}' is for a chat template: give 'messages' instead of 'prompt'"
                )
        if self.prompt == []:
            raise ValueError("'prompt' has no tokens; give at least one")
        return self

    @classmethod
    def parse(cls, data: object) -> GenerationRequest:
        """Validate untrusted data.

        :raises InvalidRequestError: saying which field is wrong, its value, and the limit
        """
        if isinstance(data, dict) and len(data) > MOST_FIELDS:
            raise InvalidRequestError(
                f"{len(data)} fields; a request has no more than {NUM_FIELDS}"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InvalidRequestError(describe(error)) from None


NUM_FIELDS = len(GenerationRequest.model_fields)
MOST_FIELDS = 2 * NUM_FIELDS
"""Of a request that is read at all: each that is unknown would be told."""


class ErrorDetail(BaseModel):
    """What went wrong with one request."""

    model_config = WIRE

    code: str
    """Stable and short, such as `prompt_too_long`."""
    message: str

    @classmethod
    def of(cls, error: BaseException) -> ErrorDetail:
        """The wire form of an exception; errors that aren't ours keep their type's name."""
        if isinstance(error, RequestError):
            return cls(code=error.code, message=str(error))
        return cls(code="internal_error", message=f"{type(error).__name__}: {error}")


class JobTimings(BaseModel):
    """Where a request's time went, in seconds. The first four add up to `total_s`."""

    model_config = WIRE

    queue_s: float = 0.0
    """Enqueued until the engine admits it to a batch."""
    prefill_s: float = 0.0
    """Admitted until its first new token."""
    decode_s: float = 0.0
    """First new token until its last."""
    publish_s: float = 0.0
    """Last token until its result is written out."""
    total_s: float = 0.0
    time_to_first_token_s: float | None = None
    """Enqueued until the first new token; None if there was none."""
    inter_token_s: float | None = None
    """Mean time between new tokens; None below two tokens."""
    stage_s: list[float] = Field(default_factory=list)
    """This request's share of the time in each stage: a step's time over the sequences in it."""


class TokenLogprob(BaseModel):
    """A token and the natural logarithm of its probability."""

    model_config = WIRE

    token_id: int
    token: str
    """Its text alone; a part of a character is shown as U+FFFD."""
    logprob: float
    """Of the model's own distribution, before any sampling field; at least -9999."""


class TokenLogprobs(TokenLogprob):
    """One new token, and the likeliest in its place."""

    rank: int
    """1 if none was likelier."""
    top: list[TokenLogprob] = Field(default_factory=list)
    """As many as asked for, the likeliest first."""


class CompletionOutput(BaseModel):
    """One of several samples; the name and the fields are vLLM's."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    index: int
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: list[TokenLogprobs] | None = None
    structured_output: StructuredOutputStatus | None = None
    finish_reason: FinishReason


class GenerationResult(BaseModel):
    """The one terminal result of a request."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    run: str | None = None
    index: int = 0
    """Place of the request in its run."""
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: list[TokenLogprobs] | None = None
    """One per new token, if asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per token of the prompt, if asked for; None for the first, which follows nothing."""
    outputs: list[CompletionOutput] | None = None
    """All samples, if `n` asked for several; `text` and the like are the first's then."""
    structured_output: StructuredOutputStatus | None = None
    """Whether the text matches what `structured_outputs` asked for, if anything."""
    applied_defaults: list[str] | None = None
    """The fields of the model's generation config that had a part in the text, if any had."""
    finish_reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Of all samples."""
    model: str | None = None
    model_revision: str | None = None
    worker: str | None = None
    attempt: int = 1
    """1 the first time; more after a worker's death or a retry."""
    error: ErrorDetail | None = None
    timings: JobTimings = Field(default_factory=JobTimings)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if the model ended the text (`stop` or `length`)."""
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    def raise_for_error(self) -> GenerationResult:
        """Return self if it is text.

        :raises GenerationFailedError: `error` or `cancelled`, with the error's words
        """
        if not self.ok:
            detail = self.error.message if self.error else self.finish_reason.value
            raise GenerationFailedError(f"request {self.id!r}: {detail}")
        return self

    @classmethod
    def failed(
        cls,
        request_id: str,
        error: BaseException | ErrorDetail,
        *,
        finish_reason: Literal[FinishReason.ERROR, FinishReason.CANCELLED] = FinishReason.ERROR,
        **fields: Any,
    ) -> GenerationResult:
        """A result that has an error instead of text."""
        detail = error if isinstance(error, ErrorDetail) else ErrorDetail.of(error)
        return cls(id=request_id, finish_reason=finish_reason, error=detail, **fields)


def describe(error: ValidationError) -> str:
    """A pydantic error as one line: each wrong field as users write it, its value, the limit."""
    parts: dict[str, str] = {}
    for item in error.errors(include_url=False):
        field = _field_name(item["loc"])
        # a field that may be of several types fails once for each; the first, ours, says it best
        parts.setdefault(field, _complaint(field, item))
    # an element that is wrong says more than that the whole isn't the other type it may be
    within = {name[:place] for name in parts for place, letter in enumerate(name) if letter == "["}
    return "; ".join(complaint for field, complaint in parts.items() if field not in within)


def _field_name(location: tuple[int | str, ...]) -> str:
    """`prompt`, `max_tokens`, `messages[0].content`: without pydantic's words for its types."""
    if location == ("sampling",):
        return "sampling"
    name = ""
    for part in location:
        if isinstance(part, int) or part.isdecimal():
            name += f"[{part}]"
        elif part.isidentifier() and not (part == "sampling" and name == "") and part not in _TYPES:
            name += f".{part}" if name else part
    return name.encode(errors="backslashreplace").decode()[:MAX_SHOWN_CHARS]


MAX_SHOWN_CHARS = 80


class _ShortRepr(Repr):
    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python's guard, with advice that isn't for users
            return f"a number of more than {MAX_DIGITS} digits"


HALF_PAIR = "half a surrogate pair, as in a text that was cut within an emoji"
"""What Python's strings can hold, and neither UTF-8 nor JSON can."""

_SHORT = _ShortRepr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_TYPES = frozenset({"str", "int", "float", "bool", "list", "dict"})
"""pydantic's names of the branches of a union, where they look like fields."""
_LIMITS = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be more than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt}",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} items",
    "string_unicode": f"holds {HALF_PAIR}",
}


def _complaint(field: str, item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        hint = INSTEAD.get(field.rpartition(".")[2])
        return f"unknown field '{field}'" + (f" ({hint})" if hint else "")
    if kind == "missing":
        return f"'{field}' is missing"
    if kind in ("string_too_short", "too_short"):
        return f"'{field}' is empty"
    message = item["msg"].removeprefix("Value error, ")
    if kind == "value_error" and field == "sampling":
        return str(message)
    if kind in _LIMITS:
        message = _LIMITS[kind].format(**context)
    elif not field:
        return str(message)
    shown = _SHORT.repr(item["input"])
    message = message.replace("Input should be", "must be").replace("dictionary", "object")
    return f"'{field}' is {shown}: {message[0].lower()}{message[1:]}"
