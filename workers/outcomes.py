"""From what the engine says about a request to the result that a client gets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from queue_api.schemas import (
    MAX_ID_CHARS,
    ErrorDetail,
    GenerationRequest,
    GenerationResult,
    JobTimings,
)
from workers.engine_loop import Completion

__all__ = [
    "CANCELLED",
    "TIMEOUT",
    "TimeLimit",
    "request_id",
    "result_of",
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


def result_of(
    completion: Completion,
    error: ErrorDetail | None,
    request: GenerationRequest | None,
    enqueued_at: float,
    about: Mapping[str, Any],
) -> GenerationResult:
    """The result of one request, to be written now.

    :param request: None if it couldn't be read
    :param enqueued_at: epoch seconds
    :param about: id, run, index, model, model_revision, worker, attempt
    """
    with_tokens = request is not None and request.return_token_ids
    return GenerationResult(
        **about,
        text=completion.text,
        token_ids=list(completion.token_ids) if with_tokens else None,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        error=error,
        timings=timings_of(completion, enqueued_at),
        metadata=request.metadata if request is not None else {},
    )


def timings_of(completion: Completion, enqueued_at: float) -> JobTimings:
    """Where the time went until now; what didn't happen takes no time.

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
    return JobTimings(
        queue_s=queue_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        publish_s=publish_s,
        total_s=queue_s + prefill_s + decode_s + publish_s,
        time_to_first_token_s=queue_s + prefill_s if completion.first_token_at else None,
        inter_token_s=decode_s / (num_tokens - 1) if num_tokens > 1 else None,
        stage_s=completion.stage_s,
    )


def request_id(item: object, fallback: str) -> str:
    """The id that a request which can't be parsed gives itself, if it does."""
    if isinstance(item, Mapping) and isinstance(given := item.get("id"), str) and given:
        return given[:MAX_ID_CHARS].encode(errors="backslashreplace").decode()
    return fallback
