"""From what the engine says about a request to the result that a client gets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic_core import to_json

from queue_api.wire.schemas import MAX_ID_CHARS, CompletionOutput, ErrorDetail, GenerationRequest
from workers.running.engine_loop import Completion

__all__ = [
    "CANCELLED",
    "TIMEOUT",
    "Outcome",
    "TimeLimit",
    "request_id",
    "request_metadata",
    "time_limit",
    "timings_of",
]

TIMEOUT = "timeout"
CANCELLED = ErrorDetail(code="cancelled", message="cancelled before it was finished")


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """What ends a request that takes too long."""

    seconds: float
    """From now; not positive if it is over."""
    error: ErrorDetail


def time_limit(request: GenerationRequest) -> TimeLimit | None:
    """The nearer of a request's timeout and deadline, if it has one."""
    if request.timeout_s is None and request.deadline is None:
        return None
    limits = []
    if request.timeout_s is not None:
        message = f"took longer than its timeout_s of {request.timeout_s:g}"
        detail = ErrorDetail(code=TIMEOUT, message=message)
        limits.append(TimeLimit(request.timeout_s, detail))
    if request.deadline is not None:
        message = f"wasn't done by its deadline, {request.deadline:.3f} (epoch seconds)"
        detail = ErrorDetail(code="deadline_exceeded", message=message)
        limits.append(TimeLimit(request.deadline - time.time(), detail))
    return min(limits, key=lambda limit: limit.seconds, default=None)


@dataclass(slots=True)
class Outcome:
    """How one request ended: what its result is made of when it is written."""

    run: str | None
    index: int
    id: str
    completion: Completion
    error: ErrorDetail | None
    request: GenerationRequest | None
    """None if it couldn't be read."""
    enqueued_at: float
    """Epoch seconds."""
    about: Mapping[str, object]
    """What all results of its job have in common: model, model_revision, worker, attempt."""

    def fields(self) -> dict[str, object]:
        """Those of a GenerationResult that are set, written now.

        No GenerationResult: checking what was checked before takes longer than all the rest.
        """
        completion, request = self.completion, self.request
        with_tokens = request is not None and request.return_token_ids
        fields = {
            "id": self.id,
            "run": self.run,
            "index": self.index,
            **self.about,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "timings": timings_of(completion, self.enqueued_at),
        }
        # what is left out isn't written either: most results have none of these
        if with_tokens:
            fields["token_ids"] = list(completion.token_ids)
        if completion.logprobs is not None:
            fields["logprobs"] = completion.logprobs
        if completion.prompt_logprobs is not None:
            fields["prompt_logprobs"] = completion.prompt_logprobs
        if completion.structured_output is not None:
            fields["structured_output"] = completion.structured_output
        if completion.applied_defaults:
            fields["applied_defaults"] = list(completion.applied_defaults)
        if completion.samples:
            fields["outputs"] = _outputs(completion, with_tokens=with_tokens)
        if self.error is not None:
            fields["error"] = self.error
        if request is not None and request.metadata:
            fields["metadata"] = request.metadata
        return fields

    def args(self) -> tuple[str | int | bytes, ...]:
        """What emit.lua takes of it.

        :raises ValueError: it can't be written as JSON
        """
        completion = self.completion
        return (
            self.index,
            completion.finish_reason.value,
            completion.prompt_tokens,
            completion.completion_tokens,
            to_json(self.fields(), inf_nan_mode="null"),
        )


def _outputs(completion: Completion, *, with_tokens: bool) -> list[CompletionOutput]:
    return [
        CompletionOutput(
            index=index,
            text=sample.text,
            token_ids=list(sample.token_ids) if with_tokens else None,
            logprobs=sample.logprobs,
            structured_output=sample.structured_output,
            finish_reason=sample.finish_reason,
        )
        for index, sample in enumerate(completion.samples)
    ]


def timings_of(completion: Completion, enqueued_at: float) -> dict[str, object]:
    """The JobTimings, where the time went until now; what didn't happen takes no time.

    :param enqueued_at: epoch seconds, of another host's clock: clamped, never negative
    """
    now_s, epoch_s = time.perf_counter(), time.time()
    ended_at = completion.finished_at or now_s
    admitted_at = completion.admitted_at or ended_at
    first_at = completion.first_token_at or ended_at
    queue_s = max(0.0, epoch_s - (now_s - admitted_at) - enqueued_at)
    prefill_s = max(0.0, first_at - admitted_at)
    decode_s = max(0.0, ended_at - first_at)
    publish_s = max(0.0, now_s - ended_at)
    num_tokens = completion.completion_tokens
    fields: dict[str, object] = {
        "queue_s": queue_s,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "publish_s": publish_s,
        "total_s": queue_s + prefill_s + decode_s + publish_s,
    }
    if completion.first_token_at:
        fields["time_to_first_token_s"] = queue_s + prefill_s
    if num_tokens > 1:
        fields["inter_token_s"] = decode_s / (num_tokens - 1)
    if completion.stage_s:
        fields["stage_s"] = completion.stage_s
    return fields


def request_id(item: object, fallback: str) -> str:
    """The id that a request which can't be parsed gives itself, if it does."""
    if isinstance(item, Mapping) and isinstance(given := item.get("id"), str) and given:
        return given[:MAX_ID_CHARS].encode(errors="backslashreplace").decode()
    return fallback


def request_metadata(item: object) -> dict[str, object]:
    """What a request that isn't parsed wants back in its result."""
    given = item.get("metadata") if isinstance(item, Mapping) else None
    return dict(given) if isinstance(given, Mapping) else {}
