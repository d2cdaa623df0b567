"""What a run came to: counts, tokens per second, and where the time went."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from queue_api.datasets.error_limit import ErrorLimit
from queue_api.wire.schemas import FinishReason, GenerationResult

__all__ = ["Progress", "Quantiles", "RunSummary"]

SAMPLE_SIZE = 10_000


class Quantiles:
    """Quantiles of a stream of numbers from an even random sample of it; exact up to its size."""

    def __init__(self, size: int = SAMPLE_SIZE) -> None:
        self.count = 0
        self._size = size
        self._sample: list[float] = []
        # its own generator: a summary mustn't move anyone's seeded draws
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        self.count += 1
        if len(self._sample) < self._size:
            self._sample.append(value)
        elif (place := int(self._random.random() * self.count)) < self._size:
            self._sample[place] = value

    def at(self, fraction: float) -> float | None:
        """The value that this fraction of all doesn't exceed; None without any."""
        if not self._sample:
            return None
        ordered = sorted(self._sample)
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]

    @property
    def median(self) -> float | None:
        return self.at(0.5)

    @property
    def p99(self) -> float | None:
        return self.at(0.99)


@dataclass(frozen=True)
class Progress:
    """How far a dataset run is. Rows of an earlier, broken-off run count as done."""

    done: int
    total: int | None
    """None until the input has been counted."""
    errors: int
    completion_tokens: int
    """Of this process's time only, so that tokens per second are true."""
    elapsed_s: float
    resumed: int = 0
    """How many of the rows done are of an earlier run."""


@dataclass
class RunSummary:
    """What a dataset run came to. Everything but `resumed` and `errors_before` is of this
    process's time."""

    run: str = ""
    rows: int = 0
    """Written now."""
    resumed: int = 0
    """Written before, by a run that was broken off."""
    errors: int = 0
    errors_before: int = 0
    """Of the rows written before; they stand until they are asked for again."""
    first_error: str = ""
    """Of those of this process's time."""
    cached: int = 0
    """Of the rows written now: their texts were in the cache."""
    cancelled: int = 0
    ended_by_length: int = 0
    """Texts that reached max_tokens, or the model's length."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    elapsed_s: float = 0.0
    output: Any = None
    """The rows, where no file was asked for."""
    queue_s: Quantiles = field(default_factory=Quantiles)
    time_to_first_token_s: Quantiles = field(default_factory=Quantiles)
    decode_s: Quantiles = field(default_factory=Quantiles)
    total_s: Quantiles = field(default_factory=Quantiles)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of wall time."""
        return self.completion_tokens / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def errors_of_rows(self) -> tuple[int, int]:
        """Errors and rows, those written before, too."""
        return self.errors + self.errors_before, self.rows + self.resumed

    @property
    def all_failed(self) -> bool:
        """True if there are rows and each has an error."""
        errors, rows = self.errors_of_rows
        return 0 < rows == errors

    def too_many_errors(self, limit: ErrorLimit) -> str:
        """What to say if more of all rows have errors than that; else nothing."""
        return limit.exceeded(*self.errors_of_rows)

    def add(self, result: GenerationResult, *, is_cached: bool = False) -> None:
        """Count one result.

        :param is_cached: it was made by an earlier run, whose tokens and times it has
        """
        self.rows += 1
        self.cached += is_cached
        self.errors += result.finish_reason is FinishReason.ERROR
        self.cancelled += result.finish_reason is FinishReason.CANCELLED
        self.ended_by_length += result.finish_reason is FinishReason.LENGTH
        if is_cached:
            return
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        if result.error is not None and not self.first_error:
            self.first_error = result.error.message
        if not result.ok:
            return  # a refused request has no times that say anything
        timings = result.timings
        self.queue_s.add(timings.queue_s)
        self.decode_s.add(timings.decode_s)
        self.total_s.add(timings.total_s)
        if timings.time_to_first_token_s is not None:
            self.time_to_first_token_s.add(timings.time_to_first_token_s)
