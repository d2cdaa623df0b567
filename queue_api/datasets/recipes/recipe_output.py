"""RecipeOutput: the rows of a recipe's output, from the input and what its stages said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from queue_api.datasets.certificate import write_certificate
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.formats.output_columns import free_name
from queue_api.datasets.formats.output_opening import open_sink
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_sink import MadeRow, RowSink
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.layout.shown_columns import ShownColumns
from queue_api.datasets.recipes.recipe import Recipe
from queue_api.datasets.recipes.stage_source import RowSoFar, StageSource
from queue_api.datasets.summary import RunSummary
from queue_api.store.bitmap import Bitmap
from queue_api.wire.errors import DatasetError, InvalidRequestError

__all__ = ["RecipeOutput", "RecipeSummary", "open_output"]

BATCH_ROWS = 1000


@dataclass
class RecipeSummary:
    """What a recipe came to."""

    rows: int = 0
    """Of the output."""
    left_out: int = 0
    """Rows that a stage's `keep` left out."""
    errors: int = 0
    invalid: dict[str, int] = field(default_factory=dict)
    """By stage: the texts of the output that its `validate` refuses."""
    parts: Mapping[str, RunSummary] = field(default_factory=dict)
    """Of this life: the passes that were asked, by name."""
    first_error: str = ""
    is_unchanged: bool = False
    """Whether nothing was asked or written: all was there."""


@contextmanager
def open_output(
    recipe: Recipe, source: RowSource, warn: Callable[[str], None]
) -> Iterator[RowSink]:
    """Where a recipe's rows go; no other process can write there meanwhile.

    :raises DatasetError: it can't be written, is the input, or has rows that no recipe wrote
    """
    sink = open_sink(recipe.output, recipe.outputs, warn=warn)
    is_done = False
    try:
        if source.is_same_file(sink.info()):
            raise DatasetError(f"{source.name} can't be both input and output")
        first = next(sink.written(), None)
        if first is not None and "attempt" in first.columns:  # a recipe's rows haven't one
            raise DatasetError(
                f"{sink.name} has the rows of a run without a recipe; choose another output file"
            )
        yield sink
        is_done = True
    finally:
        sink.close(keep_empty=is_done)


class RecipeOutput:
    """Brings an output up to what its recipe's stages said.

    A row has the input's columns, those of the stages, and of the last stage that was asked what
    any run writes. One that a stage's `keep` leaves out isn't there.
    """

    def __init__(
        self, recipe: Recipe, source: StageSource, is_chosen: Callable[[int], bool]
    ) -> None:
        """:param is_chosen: tells the rows that the recipe is of"""
        self._recipe = recipe
        self._source = source
        self._is_chosen = is_chosen
        self._shown = ShownColumns(recipe.layout)
        self._columns = [name for stage in recipe.stages for name in stage.columns]
        self._made_by = set[Maker]()

    def write(self, sink: RowSink, summary: RecipeSummary) -> None:
        """Take out what isn't so any more, and append what is missing.

        :raises DatasetError: it can't be written
        """
        if sink.rows:
            right = Bitmap()
            for row in self._made(RecipeSummary()):
                if row.index in sink and not sink.has_other(row.index, row.fingerprint):
                    right.add(row.index)
            if len(right) < sink.rows:
                sink.drop(lambda row: row not in right)
        waiting: list[MadeRow] = []
        for row in self._made(summary):
            if row.index not in sink:
                waiting.append(row)
            if len(waiting) >= BATCH_ROWS:
                sink.append(waiting)
                waiting = []
        sink.append(waiting)
        sink.finish()
        if sink.has_changed or not sink.certificate.exists():
            said = {"recipe": self._recipe.model_dump(mode="json", exclude_unset=True)}
            write_certificate(sink, summary.rows, self._made_by, said)

    def _made(self, summary: RecipeSummary) -> Iterator[MadeRow]:
        for row, (record, sofar) in enumerate(self._source.so_far()):
            if not self._is_chosen(row):
                continue
            if not sofar.is_kept and not sofar.error:
                summary.left_out += 1
                continue
            summary.rows += 1
            yield self._row(row, record, sofar, summary)

    def _row(self, row: int, record: Record, sofar: RowSoFar, summary: RecipeSummary) -> MadeRow:
        for stage, found in zip(self._recipe.stages, sofar.outcomes, strict=True):
            if found is not None and not found.error and not found.verdict.is_valid:
                summary.invalid[stage.name] = summary.invalid.get(stage.name, 0) + 1
        last, error = sofar.last, sofar.error
        line = dict(last.line) if last is not None else {}
        if record.error is not None:
            error = error or str(record.error)
        try:
            shown = self._shown.of(record.shown)
        except InvalidRequestError as clash:
            shown, error = self._shown.chosen(record.shown), error or str(clash)
        if error:
            summary.errors += 1
            summary.first_error = summary.first_error or error
        made = {free_name(name, shown): value for name, value in shown.items()}
        if made.get("id") is None:
            made = {**made, "id": line.get("id", str(row))}
        made |= {name: sofar.added.get(name) for name in self._columns}
        text = "" if error or last is None else last.text
        made |= {
            "row": row,
            "text": text,
            # of a row that no stage was asked with, as `when` has it, nothing came
            "finish_reason": "error" if error else line.get("finish_reason", "skipped"),
            "usage": _usage(sofar),
            **{name: line.get(name) or "" for name in ("model", "model_revision", "worker")},
            "error": error,
            "error_code": (line.get("error_code") or "invalid_request") if error else "",
        }
        made["fingerprint"] = _fingerprint(made)
        if made["model"]:
            self._made_by.add(Maker(made["model"], made["model_revision"]))
        return MadeRow(row, made["fingerprint"], made, record.number, record.raw)


def _usage(sofar: RowSoFar) -> dict[str, int]:
    """Tokens of all stages."""
    total = {"prompt_tokens": 0, "completion_tokens": 0}
    for found in sofar.outcomes:
        if found is not None:
            for name in total:
                total[name] += int(found.line["usage"][name])
    return total


def _fingerprint(made: Mapping[str, Any]) -> str:
    """Of all that the row says but which worker said it."""
    said = {name: value for name, value in made.items() if name != "worker"}
    as_json = json.dumps(said, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(as_json.encode(errors="surrogatepass"), digest_size=8).hexdigest()
