"""What a report shows of a run: gathered row by row, in memory that doesn't grow with the rows.

It is of one life of a run. Rows that an earlier life wrote are a number here; rows whose results
were there before, in the cache or in Redis, have that time's times, and are counted apart.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from queue_api.datasets.columns import Row
from queue_api.datasets.distribution import Distribution
from queue_api.datasets.formats.row_sink import RowSink
from queue_api.datasets.summary import RunSummary
from queue_api.wire.errors import RequestError
from queue_api.wire.schemas import FinishReason, GenerationRequest, GenerationResult

__all__ = ["Origin", "RunStatistics"]

MOST_BUCKETS = 240
FIRST_BUCKET_S = 0.25
NUM_SAMPLES = 8
MOST_NAMED = 50
"""Kinds of errors, workers and models; the rest is counted as one."""
OTHERS = "others"
CHARS_KEPT = 1000
"""Of a prompt and of a text."""


class Origin(StrEnum):
    """Where a row that is written now has its result from."""

    MADE = "made"
    """Workers made it since this life began."""
    FOUND = "found"
    """It was in Redis: workers made it for an earlier life, which didn't get to write it."""
    CACHED = "cached"
    """It was in the cache."""


class TimeBuckets:
    """Counts over time; when they are too many, each two become one of twice the width."""

    NAMES = (*Origin, "errors", "prompt_tokens", "completion_tokens")
    """Errors and tokens are of what was made."""

    def __init__(self) -> None:
        self.width_s = FIRST_BUCKET_S
        self._buckets: list[list[int]] = []

    def at(self, elapsed_s: float) -> list[int]:
        """The counts of that time, in the order of NAMES."""
        while (place := int(elapsed_s / self.width_s)) >= MOST_BUCKETS:
            self._merge()
        while len(self._buckets) <= place:
            self._buckets.append([0] * len(self.NAMES))
        return self._buckets[place]

    def _merge(self) -> None:
        self.width_s *= 2
        if len(self._buckets) % 2:
            self._buckets.append([0] * len(self.NAMES))
        pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
        self._buckets = [[*map(sum, zip(*pair, strict=True))] for pair in pairs]

    def as_json(self) -> dict[str, Any]:
        """The width, and a list of counts for each name; the last bucket may be a part of one."""
        columns = zip(*self._buckets, strict=True) if self._buckets else [()] * len(self.NAMES)
        return {
            "bucket_s": self.width_s,
            **{str(n): [*c] for n, c in zip(self.NAMES, columns, strict=True)},
        }


_PLACE = {name: place for place, name in enumerate(TimeBuckets.NAMES)}


@dataclass
class ErrorKind:
    """The rows with one code, and the first of them."""

    row: int
    message: str
    count: int = 0


@dataclass
class WorkerShare:
    """What one worker did."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stage_s: list[float] = field(default_factory=list)
    """How long each of its stages was at work."""

    def add(self, result: GenerationResult) -> None:
        """Count a result of its."""
        self.requests += 1
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        times = result.timings.stage_s
        if len(self.stage_s) < len(times):
            self.stage_s += [0.0] * (len(times) - len(self.stage_s))
        for stage, seconds in enumerate(times):
            self.stage_s[stage] += seconds


class RunStatistics:
    """Throughput over time, times, lengths, endings, errors, workers and samples of one life."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started_at: float | None = None
        self._ended_at = 0.0
        self._random = random.Random(0)  # its own: it mustn't move anyone's seeded draws
        self.rows: Counter[Origin] = Counter()
        """Written by this life."""
        self.rows_before: int | None = None
        """Rows that were in the output when this life began; None: it isn't known."""
        self.errors_before = 0
        self.rows_in: int | None = None
        """Rows that are asked for in all; None: they weren't counted."""
        self.rows_out = 0
        self.retried = 0
        self._tokens = {origin: {"prompt": 0, "completion": 0} for origin in Origin}
        self.earlier_turns = 0
        """Requests for turns before the last, which are no rows."""
        self._buckets = TimeBuckets()
        self._times = {
            name: Distribution(is_logarithmic=True)
            for name in ("queue", "time_to_first_token", "decode", "total")
        }
        self._prompt = Distribution(is_logarithmic=False)
        self._completion = Distribution(is_logarithmic=False)
        self._endings: dict[Origin, Counter[str]] = {origin: Counter() for origin in Origin}
        self._errors: dict[str, ErrorKind] = {}
        self._workers: dict[str, WorkerShare] = {}
        self._models: Counter[tuple[str, str]] = Counter()
        self._samples: list[dict[str, Any]] = []
        self._num_texts = 0

    def start(self) -> None:
        """From here on time counts."""
        if self._started_at is None:
            self._started_at = self._clock()

    @property
    def is_started(self) -> bool:
        """True if there is anything to tell."""
        return self._started_at is not None

    def end(self, sink: RowSink) -> None:
        """To here; `sink` is the output, which may have rows that weren't counted any more."""
        self._ended_at = self._clock()
        self.rows_out = sink.rows

    def note_rows(self, summary: RunSummary, rows_in: int | None) -> None:
        """What the run found: rows that were there, and how many are asked for if it knows that."""
        self.rows_before, self.errors_before = summary.resumed, summary.errors_before
        self.rows_in = rows_in

    @property
    def elapsed_s(self) -> float:
        """Between start and end."""
        return 0.0 if self._started_at is None else self._ended_at - self._started_at

    def add(self, row: Row, result: GenerationResult, origin: Origin) -> None:
        """Count a row that is written."""
        bucket = self._bucket()
        self.rows[origin] += 1
        bucket[_PLACE[origin]] += 1
        self._endings[origin][result.finish_reason] += 1
        self._add_request(result, origin, bucket)
        if result.finish_reason is FinishReason.ERROR:
            bucket[_PLACE["errors"]] += origin is Origin.MADE
            self._add_error(row, result)
        elif result.ok:
            self._maybe_keep(row, result, origin)

    def add_earlier_turn(self, row: Row, result: GenerationResult, origin: Origin) -> None:  # noqa: ARG002 - as `add`
        """Count a request for a turn before the last, whose tokens count and which is no row."""
        self.earlier_turns += 1
        self._add_request(result, origin, self._bucket())

    def _bucket(self) -> list[int]:
        self.start()
        assert self._started_at is not None
        return self._buckets.at(self._clock() - self._started_at)

    def _add_request(self, result: GenerationResult, origin: Origin, bucket: list[int]) -> None:
        tokens = self._tokens[origin]
        tokens["prompt"] += result.prompt_tokens
        tokens["completion"] += result.completion_tokens
        if origin is not Origin.MADE:
            return  # the times are those of another life
        bucket[_PLACE["prompt_tokens"]] += result.prompt_tokens
        bucket[_PLACE["completion_tokens"]] += result.completion_tokens
        self.retried += result.attempt > 1
        if result.worker:
            self._worker(result.worker).add(result)
        if not result.ok:
            return  # a refused request has no times or lengths that say anything
        if result.model:
            model = (result.model, result.model_revision or "")
            is_new = model not in self._models and len(self._models) >= MOST_NAMED
            self._models[(OTHERS, "") if is_new else model] += 1
        timings = result.timings
        self._times["queue"].add(timings.queue_s)
        self._times["decode"].add(timings.decode_s)
        self._times["total"].add(timings.total_s)
        if timings.time_to_first_token_s is not None:
            self._times["time_to_first_token"].add(timings.time_to_first_token_s)
        self._prompt.add(result.prompt_tokens)
        self._completion.add(result.completion_tokens)

    def _worker(self, name: str) -> WorkerShare:
        if name not in self._workers and len(self._workers) >= MOST_NAMED:
            name = OTHERS
        return self._workers.setdefault(name, WorkerShare())

    def _add_error(self, row: Row, result: GenerationResult) -> None:
        code = result.error.code if result.error else "unknown"
        if code not in self._errors and len(self._errors) >= MOST_NAMED:
            code = OTHERS
        message = result.error.message if result.error else ""
        kind = self._errors.setdefault(code, ErrorKind(row.row, message[:CHARS_KEPT]))
        kind.count += 1

    def _maybe_keep(self, row: Row, result: GenerationResult, origin: Origin) -> None:
        """Keep it as a sample with the same chance as any other text."""
        self._num_texts += 1
        if len(self._samples) < NUM_SAMPLES:
            self._samples.append(_sample(row, result, origin))
        elif (place := self._random.randrange(self._num_texts)) < NUM_SAMPLES:
            self._samples[place] = _sample(row, result, origin)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON can say it."""
        elapsed_s, made = self.elapsed_s, self._tokens[Origin.MADE]
        kinds = sorted(self._errors.items(), key=lambda item: -item[1].count)
        return {
            "elapsed_s": elapsed_s,
            "rows": {
                "in": self.rows_in,
                "out": self.rows_out,
                "before": self.rows_before,
                **{str(origin): self.rows[origin] for origin in Origin},
                "errors": sum(kind.count for kind in self._errors.values()),
                "errors_before": self.errors_before,
                "retried": self.retried,
            },
            "earlier_turns": self.earlier_turns,
            "tokens": {str(origin): tokens for origin, tokens in self._tokens.items()},
            "rows_per_s": self.rows.total() / elapsed_s if elapsed_s else 0.0,
            "tokens_per_s": made["completion"] / elapsed_s if elapsed_s else 0.0,
            "over_time": self._buckets.as_json(),
            "times_s": {name: spread.as_json() for name, spread in self._times.items()},
            "lengths": {
                "prompt": self._prompt.as_json(),
                "completion": self._completion.as_json(),
            },
            "finish_reasons": {
                str(origin): {str(name): count for name, count in endings.items()}
                for origin, endings in self._endings.items()
            },
            "errors": [{"code": code, **vars(kind)} for code, kind in kinds],
            "workers": [
                {"worker": name, **vars(share)} for name, share in sorted(self._workers.items())
            ],
            "models": [
                {"model": model, "revision": revision, "requests": count}
                for (model, revision), count in self._models.most_common()
            ],
            "samples": sorted(self._samples, key=lambda sample: sample["row"]),
        }


def _sample(row: Row, result: GenerationResult, origin: Origin) -> dict[str, Any]:
    return {
        "row": row.row,
        "id": row.id,
        "prompt": _prompt_of(row.request),
        "text": _shortened(result.text),
        "finish_reason": str(result.finish_reason),
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "origin": str(origin),
    }


def _prompt_of(request: GenerationRequest | RequestError) -> str:
    if isinstance(request, RequestError):
        return ""
    if isinstance(request.prompt, str):
        return _shortened(request.prompt)
    if request.prompt is not None:
        tokens = ", ".join(map(str, request.prompt[:CHARS_KEPT]))
        return _shortened(f"{len(request.prompt):,} token ids: {tokens}")
    turns = []
    for turn in request.messages or ():
        content = turn.content
        parts = content if isinstance(content, str) else "".join(part.text for part in content)
        turns.append(f"[{turn.role}] {_shortened(parts)}")
    return _shortened("\n".join(turns))


def _shortened(text: str) -> str:
    return text if len(text) <= CHARS_KEPT else text[: CHARS_KEPT - 1] + "…"
