"""An engine that generates nothing: for measuring the queue and testing the worker.

A model name `echo:` selects it, with options such as `echo:tokens=8,step_s=0.001`, so that
nobody gets it by accident. Every request's text is its prompt repeated, one word per token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from queue_api.wire.errors import (
    ConfigurationError,
    InvalidRequestError,
    PromptTooLongError,
    UnsupportedRequestError,
)
from queue_api.wire.schemas import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    StructuredOutputStatus,
    TokenLogprobs,
)

__all__ = ["ECHO_PREFIX", "EchoEngine"]

ECHO_PREFIX = "echo:"
MAX_PROMPT_WORDS = 4096


@dataclass(slots=True)
class EchoCompletion:
    """How an echoed request ended; the fields are the engine's."""

    key: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    error: BaseException | None
    added_at: float | None
    admitted_at: float | None
    first_token_at: float | None
    finished_at: float | None
    logprobs: list[TokenLogprobs] | None = None
    stage_s: list[float] = field(default_factory=list)
    structured_output: StructuredOutputStatus | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    samples: Sequence[EchoCompletion] = ()
    applied_defaults: tuple[str, ...] = ()


@dataclass(slots=True)
class _Echo:
    key: str
    words: list[str]
    num_tokens: int
    added_at: float
    generated: list[int]
    admitted_at: float | None = None
    first_token_at: float | None = None


class EchoEngine:
    """One word per request and step, for at most `max_num_seqs` requests at a time.

    :param tokens: words per text, unless the request's max_tokens are fewer
    :param step_s: what a step takes, in seconds
    :param marked: with `on_marked`, what to do with a prompt that contains this word
    """

    model_revision: str | None = None

    def __init__(
        self,
        tokens: int = 1,
        step_s: float = 0.0,
        max_num_seqs: int = 1 << 30,
        marked: str = "",
        on_marked: str = "raise",
    ) -> None:
        # an echo of another length is another model: its texts are others
        self.model_name = "echo" if tokens == 1 else f"{ECHO_PREFIX}tokens={tokens}"
        self._tokens = tokens
        self._step_s = step_s
        self._max_num_seqs = max_num_seqs
        self._marked = marked
        self._on_marked = on_marked
        self._waiting: dict[str, _Echo] = {}
        self._running: dict[str, _Echo] = {}

    @classmethod
    def from_name(cls, name: str) -> EchoEngine:
        """Build from `echo:` or `echo:tokens=8,step_s=0.001`.

        :raises ConfigurationError: an unknown option or a value of the wrong type
        """
        kinds: dict[str, Callable[[str], Any]] = {
            "tokens": int,
            "step_s": float,
            "max_num_seqs": int,
        }
        kinds |= {"marked": str, "on_marked": str}
        pairs = [part.partition("=") for part in name.removeprefix(ECHO_PREFIX).split(",") if part]
        try:
            return cls(**{key: kinds[key](value) for key, _, value in pairs})
        except (KeyError, ValueError) as error:
            raise ConfigurationError(
                f"model {name!r}: {error}; known options are {', '.join(kinds)}"
            ) from None

    def add(
        self,
        key: str,
        request: GenerationRequest,
        *,
        generated: Sequence[int] = (),
        seed_key: str | None = None,  # noqa: ARG002  nothing is drawn here
    ) -> None:
        if request.sampling.n > 1:
            raise InvalidRequestError(f"'n' is {request.sampling.n}: an echo has one sample")
        if request.sampling.structured_outputs is not None:
            raise UnsupportedRequestError(
                "'structured_outputs': an echo is the prompt, whatever was asked for"
            )
        words = _words(request)
        if len(words) > MAX_PROMPT_WORDS:
            raise PromptTooLongError(
                f"prompt has {len(words)} words; the limit is {MAX_PROMPT_WORDS}"
            )
        num_tokens = min(self._tokens, request.sampling.max_tokens)
        self._waiting[key] = _Echo(key, words, num_tokens, time.perf_counter(), list(generated))

    def cancel(self, key: str) -> bool:
        return (self._waiting.pop(key, None) or self._running.pop(key, None)) is not None

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def num_free_seqs(self) -> int:
        return max(0, self._max_num_seqs - len(self._running) - len(self._waiting))

    def progress(self) -> Mapping[str, Sequence[int]]:
        return {key: tuple(echo.generated) for key, echo in self._running.items()}

    def step(self) -> list[EchoCompletion]:
        now = time.perf_counter()
        while self._waiting and len(self._running) < self._max_num_seqs:
            key = next(iter(self._waiting))
            echo = self._running[key] = self._waiting.pop(key)
            echo.admitted_at = now
        if self._step_s:
            time.sleep(self._step_s)
        return [done for echo in list(self._running.values()) if (done := self._advance(echo))]

    def _advance(self, echo: _Echo) -> EchoCompletion | None:
        if self._marked and self._marked in echo.words:
            if self._on_marked == "abort":
                os.abort()
            if self._on_marked == "raise":
                raise RuntimeError(f"the engine met the marked word {self._marked!r}")
            return self._complete(echo, RuntimeError(f"marked word {self._marked!r}"))
        echo.generated.append(len(echo.generated) % len(echo.words))
        echo.first_token_at = echo.first_token_at or time.perf_counter()
        return self._complete(echo, None) if len(echo.generated) >= echo.num_tokens else None

    def _complete(self, echo: _Echo, error: BaseException | None) -> EchoCompletion:
        del self._running[echo.key]
        text = " ".join(echo.words[index] for index in echo.generated)
        reason = FinishReason.ERROR if error else FinishReason.LENGTH
        return EchoCompletion(
            key=echo.key,
            text="" if error else text,
            token_ids=echo.generated,
            finish_reason=reason,
            prompt_tokens=len(echo.words),
            completion_tokens=len(echo.generated),
            error=error,
            added_at=echo.added_at,
            admitted_at=echo.admitted_at,
            first_token_at=echo.first_token_at,
            finished_at=time.perf_counter(),
        )

    def describe_work(self) -> str:
        return "echoing"

    def close(self) -> None:
        self._waiting.clear()
        self._running.clear()


def _words(request: GenerationRequest) -> list[str]:
    if isinstance(request.prompt, list):
        return [str(token) for token in request.prompt]
    if request.prompt is not None:
        return request.prompt.split() or [""]
    return [word for message in request.messages or () for word in _said(message)] or [""]


def _said(message: ChatMessage) -> list[str]:
    if isinstance(message.content, str):
        return message.content.split()
    return [word for part in message.content for word in part.text.split()]
