"""`batchmill run --dry-run`: what would be asked, and how much that is; nothing is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from batchmill.offline.offline import OfflineRun
from queue_api.datasets.chosen_source import ChosenSource
from queue_api.datasets.columns import Row, RowParser, say_nothing
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.formats.record import Record
from queue_api.datasets.row_selection import RowSelection
from queue_api.wire.errors import RequestError
from queue_api.wire.plain_text import visible
from queue_api.wire.schemas import GenerationRequest

__all__ = ["PromptReader", "dry_run"]

ROWS_SHOWN = 3
ROWS_COUNTED = 1000
CHARS_SHOWN = 2000


class PromptReader(Protocol):
    """A model's tokenizer."""

    def encode(self, request: GenerationRequest) -> list[int]: ...
    def text_with_specials(self, token_ids: list[int]) -> str: ...


async def dry_run(
    job: OfflineRun,
    tokenizer: PromptReader | None,
    max_model_len: int | None,
    warn: Callable[[str], None],
) -> list[str]:
    """Lines to show: the first rows as the model would get them, and an estimate of the tokens.

    :param tokenizer: None if there is none at hand
    :raises DatasetError: the input can't be used
    :raises ConfigurationError: the layout can't
    """
    data = DatasetInput(job.inputs, format=job.format, selection=job.selection)

    def parser(warn: Callable[[str], None]) -> RowParser:
        return RowParser(
            job.defaults, warn=warn, fields=job.fields, layout=job.layout, place=data.source.place
        )

    try:
        await data.look(job.defaults, job.fields, job.layout)
        first, sample, total = await asyncio.to_thread(_rows_of, data)
        shown = [line for row in map(parser(warn).parse, first) for line in _row(row, tokenizer)]
        estimate = _Estimate(total, max_model_len)
        for row in map(parser(say_nothing).parse, sample):
            estimate.count(row, tokenizer)
        return [data.how_read or "no row can be read", "", *shown, *estimate.lines()]
    finally:
        await data.close()


def _rows_of(data: DatasetInput) -> tuple[list[Record], list[Record], int | None]:
    """The first rows, rows drawn from all of a file, and how many there are; of what can be read
    only once, those that were looked at stand for all."""
    if not data.source.is_repeatable:
        return data.held[:ROWS_SHOWN], data.held[:ROWS_COUNTED], None
    sample = ChosenSource(data.chosen, RowSelection(sample=ROWS_COUNTED))
    first = list(islice(data.chosen.records(), ROWS_SHOWN))
    return first, list(sample.records()), data.chosen.count()


def _row(row: Row, tokenizer: PromptReader | None) -> list[str]:
    name = f"row {row.row}, id {row.id!r}"
    try:
        if isinstance(row.request, RequestError):
            raise row.request
        tokens = None if tokenizer is None else tokenizer.encode(row.request)
    except RequestError as error:
        return [f"{name}: {visible(str(error))}", ""]
    if tokenizer is None or tokens is None:
        return [f"{name}:", *_indented(_plain(row.request)), ""]
    size = f"{len(tokens):,} tokens, at most {_num_new(row.request):,} new ones"
    return [f"{name}, {size}:", *_indented(tokenizer.text_with_specials(tokens)), ""]


def _plain(request: GenerationRequest) -> str:
    """A request as far as it can be shown without its model's chat template."""
    if request.messages is None:
        return str(request.prompt)
    return "\n".join(f"[{turn.role}] {turn.content}" for turn in request.messages)


def _indented(text: str) -> list[str]:
    more = len(text) - CHARS_SHOWN
    lines = [f"  | {visible(line)}" for line in text[:CHARS_SHOWN].split("\n")]
    return [*lines, f"  … and {more:,} characters more"] if more > 0 else lines


def _num_new(request: GenerationRequest) -> int:
    return request.sampling.max_tokens * request.sampling.n


@dataclass
class _Estimate:
    """Of the rows that were looked at, and what follows for all."""

    total: int | None
    max_model_len: int | None
    num_rows: int = 0
    num_wrong: int = 0
    num_too_long: int = 0
    first_wrong: str = ""
    prompts: list[int] = field(default_factory=list)
    """Tokens of each."""
    new: int = 0

    def count(self, row: Row, tokenizer: PromptReader | None) -> None:
        """Look at a row."""
        self.num_rows += 1
        try:
            if isinstance(row.request, RequestError):
                raise row.request
            self.new += _num_new(row.request)
            if tokenizer is not None:
                self.prompts.append(len(tokenizer.encode(row.request)))
                if self.max_model_len is not None and self.prompts[-1] >= self.max_model_len:
                    self.num_too_long += 1
        except RequestError as error:
            self.num_wrong += 1
            self.first_wrong = self.first_wrong or visible(str(error))

    def lines(self) -> Iterator[str]:
        """What to show."""
        rows = "unknown" if self.total is None else f"{self.total:,}"
        yield f"rows: {rows}, {self.num_rows:,} of them looked at"
        if self.num_wrong:
            yield f"{self.num_wrong:,} of those are wrong, the first: {self.first_wrong}"
        if self.num_too_long:
            yield (
                f"{self.num_too_long:,} of those are as long as the model's {self.max_model_len:,} "
                "tokens, or longer, and would be refused"
            )
        if not self.prompts:
            yield "tokens aren't counted: no tokenizer is at hand"
            return
        mean = sum(self.prompts) / len(self.prompts)
        yield (
            f"prompts of {min(self.prompts):,} to {max(self.prompts):,} tokens, {mean:,.1f} on "
            "average"
        )
        if self.total is not None:
            scale = self.total / self.num_rows
            yield (
                f"in all about {sum(self.prompts) * scale:,.0f} tokens of prompts, and at most "
                f"about {self.new * scale:,.0f} new ones"
            )
