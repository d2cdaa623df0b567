"""What `batchmill run` shows on stderr: progress, then a summary."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from batchmill.offline.time_left import TimeLeft
from queue_api.datasets.formats.output_opening import open_sink
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.summary import Progress, Quantiles, RunSummary
from queue_api.wire.plain_text import on_one_line

__all__ = ["ProgressDisplay", "progress_display", "sample_table", "summary_table"]

PLAIN_EVERY_S = 5.0
"""Without a terminal, a line so often."""


class ProgressDisplay(Protocol):
    """Shows how far a run is."""

    def update(self, progress: Progress) -> None: ...


@contextmanager
def progress_display(console: Console) -> Iterator[ProgressDisplay]:
    """A live bar on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield _PlainLines(console)
        return
    with RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows  {task.fields[speed]}  {task.fields[left]}"),
        console=console,
    ) as bar:
        yield _LiveBar(bar)


def _tokens_per_s(progress: Progress) -> float:
    return progress.completion_tokens / progress.elapsed_s if progress.elapsed_s else 0.0


def _rows_per_s(progress: Progress) -> float:
    new = progress.done - progress.resumed
    return new / progress.elapsed_s if progress.elapsed_s else 0.0


def _speed(progress: Progress) -> str:
    """Of this process's time."""
    rows = _rows_per_s(progress)
    shown = f"{rows:,.0f}" if rows >= 10 or not rows else f"{rows:.2g}"
    return f"{shown} rows/s  {_tokens_per_s(progress):,.0f} tokens/s"


def _time_left(progress: Progress, time_left: TimeLeft) -> str:
    """A range, or one time where both ends are the same."""
    time_left.note(progress)
    if (found := time_left.seconds(progress)) is None:
        return ""
    least, most = map(_clock, found)
    return f"  ETA {least}" if least == most else f"  ETA {least} to {most}"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class _LiveBar:
    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._time_left = TimeLeft()
        self._task = bar.add_task("starting workers", total=None, speed="", left="")

    def update(self, progress: Progress) -> None:
        self._bar.update(
            self._task,
            description="generating" if progress.done else "starting workers",
            completed=progress.done,
            total=progress.total,
            speed=_speed(progress),
            left=(_time_left(progress, self._time_left) + _errors(progress)).lstrip(),
        )


class _PlainLines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._time_left = TimeLeft()
        self._due_at = 0.0
        self._finished = False

    def update(self, progress: Progress) -> None:
        left = _time_left(progress, self._time_left)
        finished = progress.total is not None and progress.done >= progress.total
        if self._finished or (time.monotonic() < self._due_at and not finished):
            return
        self._finished = finished
        self._due_at = time.monotonic() + PLAIN_EVERY_S
        total = "?" if progress.total is None else progress.total
        self._console.print(
            f"{progress.done}/{total} rows  {_speed(progress)}{left}{_errors(progress)}",
            highlight=False,
        )


def _errors(progress: Progress) -> str:
    return f"  {progress.errors} errors" if progress.errors else ""


def summary_table(summary: RunSummary) -> Table:
    """Counts of this process's work, and median and 99th percentile of the rows' times."""
    table = Table(title=f"run {escape(summary.run)}", title_justify="left")
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("p99", justify="right")
    table.add_row("rows", f"{summary.rows:,}", "")
    if summary.resumed:
        table.add_row("rows written before", f"{summary.resumed:,}", "")
    if summary.cached:
        table.add_row("rows from the cache", f"{summary.cached:,}", "")
    table.add_row("errors", f"{summary.errors:,}", "")
    if summary.errors_before:
        table.add_row("errors written before", f"{summary.errors_before:,}", "")
    if summary.cancelled:
        table.add_row("cancelled", f"{summary.cancelled:,}", "")
    if summary.ended_by_length:
        table.add_row("ended by length", f"{summary.ended_by_length:,}", "")
    table.add_row("prompt tokens", f"{summary.prompt_tokens:,}", "")
    table.add_row("generated tokens", f"{summary.completion_tokens:,}", "")
    table.add_row("tokens/s", f"{summary.tokens_per_s:,.0f}", "")
    table.add_row("elapsed", f"{summary.elapsed_s:.1f} s", "", end_section=True)
    times: list[tuple[str, Quantiles]] = [
        ("queue", summary.queue_s),
        ("time to first token", summary.time_to_first_token_s),
        ("decode", summary.decode_s),
        ("total", summary.total_s),
    ]
    for name, quantiles in times:
        table.add_row(name, _seconds(quantiles.median), _seconds(quantiles.p99))
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def sample_table(output: str, outputs: OutputOptions, count: int) -> Table:
    """`count` rows of an output, spread over it."""
    table = Table("id", "prompt", "text", "finish", title="samples", title_justify="left")
    sink = open_sink(output, outputs)
    try:
        step = max(1, sink.rows // count)
        for written in itertools.islice(sink.written(), 0, step * count, step):
            row = written.columns
            table.add_row(
                escape(_shorten(str(row["id"]))),
                escape(_shorten(_prompt_of(row))),
                escape(_shorten(row.get("text") or row["error"])),
                row["finish_reason"],
            )
    finally:
        sink.close()
    return table


def _prompt_of(row: Mapping[str, Any]) -> str:
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content", ""))
    return str(row.get("prompt", ""))


def _shorten(text: str, limit: int = 160) -> str:
    # the texts are strangers': an escape sequence in one could move the cursor, or worse
    text = on_one_line(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"
