"""A file of prompts to a file of answers: resumable, each row once, in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from queue_api.client.client import Client
from queue_api.datasets.certificate import contradiction, write_certificate
from queue_api.datasets.chosen_source import ChosenSource
from queue_api.datasets.columns import RowParser, check_fields, say_nothing
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.error_limit import ErrorLimit
from queue_api.datasets.feed import DatasetRun, OpenedRun, WrittenListener
from queue_api.datasets.formats.jsonl_sink import JsonLinesSink
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.formats.memory_sink import MemorySink
from queue_api.datasets.formats.object_source import Rows
from queue_api.datasets.formats.opening import Inputs, open_source
from queue_api.datasets.formats.output_opening import open_sink
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.formats.row_sink import RowSink
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.layout.shown_columns import shown_columns
from queue_api.datasets.prefix_order import prefix_order
from queue_api.datasets.response_cache import ResponseCache
from queue_api.datasets.resume import changed_rows, check_chosen, check_makers
from queue_api.datasets.row_numbers import chosen_rows
from queue_api.datasets.row_selection import RowSelection
from queue_api.datasets.run_statistics import RunStatistics
from queue_api.datasets.summary import Progress, RunSummary
from queue_api.datasets.turns import Answers, TurnPass, place_of_answers
from queue_api.store.bitmap import Bitmap
from queue_api.store.jobs import request_json
from queue_api.store.run_store import parse_result
from queue_api.store.runs import check_run_id
from queue_api.wire.errors import (
    ConfigurationError,
    DatasetError,
    InvalidRequestError,
    RedisAuthError,
    RunNotFoundError,
)
from queue_api.wire.schemas import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "DEFAULT_WINDOW",
    "Dataset",
    "dataset_run_id",
    "open_dataset",
    "open_dataset_of",
    "run_dataset",
    "run_id_of",
]

logger = logging.getLogger(__name__)

DEFAULT_WINDOW = 8192
MOST_LOSSES = 10
"""Of a run by Redis, without a row written between: it doesn't keep anything."""


@dataclass
class Dataset:
    """An input and an output that were looked at and fit together."""

    data: DatasetInput
    sink: RowSink
    run_id: str
    mark: str
    """Tells the run from others of its name."""
    defaults: SamplingParams | None
    fields: frozenset[str] | None
    layout: Layout
    warn: Callable[[str], None]
    redo_changed: bool
    ordered: bool = False
    retry_errors: bool = False
    redo_all: bool = False
    group_prefixes: int = 0
    turn: TurnPass | None = None
    """Which turn of its rows is asked; None: all of them, one after the other."""
    keeps_empty: bool = False
    """Whether an output without rows is kept."""
    is_part: bool = False
    """Whether the output is for further passes."""

    async def run(
        self,
        client: Client,
        *,
        queue: str | None = None,
        chunk_size: int | None = None,
        window: int = DEFAULT_WINDOW,
        max_errors: ErrorLimit | int | str | None = None,
        cache: Path | str | None = None,
        cache_scope: str = "",
        on_progress: Callable[[Progress], None] | None = None,
        statistics: RunStatistics | None = None,
    ) -> RunSummary:
        """Ask for what isn't written yet, and write it; as run_dataset.

        :param statistics: gathers what a report shows
        """
        self.keeps_empty = True
        queue = queue or client.settings.queue
        kept = None if cache is None else ResponseCache(cache, cache_scope)
        ask = partial(
            Dataset._ask,
            client=client,
            queue=queue,
            chunk_size=chunk_size,
            window=window,
            kept=kept,
            listener=on_progress,
            statistics=statistics,
        )
        limit = ErrorLimit.of(max_errors)
        if statistics is not None:
            statistics.start()
        try:
            if self.layout.turns_column is None:
                return await ask(self, limit=limit)
            await self._drop_other_models(await _models(client, queue))
            return await self._ask_in_turns(ask, limit)
        finally:
            if statistics is not None:
                statistics.end(self.sink)
            if kept is not None:
                kept.close()

    async def _ask(
        self,
        *,
        client: Client,
        queue: str,
        chunk_size: int | None,
        window: int,
        kept: ResponseCache | None,
        listener: Callable[[Progress], None] | None,
        statistics: RunStatistics | None,
        limit: ErrorLimit | None = None,
    ) -> RunSummary:
        makers = await _models(client, queue)
        await self._drop_other_models(makers)
        summary: RunSummary | None = None
        losses = 0
        is_last = self.turn is None or self.turn.number == self.turn.total
        on_written: WrittenListener | None = None
        if statistics is not None:
            on_written = statistics.add if is_last else statistics.add_earlier_turn
        while True:
            written, data = self.sink.rows, self.data
            try:
                opened = await _open(client, self, queue, chunk_size, makers)
                data = await self._grouped(opened.chunk_size)
                work = DatasetRun(
                    client,
                    opened,
                    self.sink,
                    data=data,
                    parser=self.parser(self.warn if summary is None else say_nothing),
                    window=window,
                    limit=limit,
                    ordered=self.ordered,
                    cache=kept,
                    makers=makers,
                    num_lanes=self.group_prefixes,
                    listener=listener,
                    on_written=on_written,
                    summary=summary,
                )
                summary = work.summary
                try:
                    await work.run()
                finally:
                    if statistics is not None and is_last:
                        statistics.note_rows(work.summary, work.counted)
                break
            except RunNotFoundError:
                losses = 1 if self.sink.rows > written else losses + 1
                if not self.data.source.is_repeatable or losses > MOST_LOSSES:
                    raise
                self.warn("Redis lost the run: what isn't written is asked for again")
                await self.data.start_over()
            finally:
                if data is not self.data:
                    await data.stop_reading()
        if is_last:
            await asyncio.to_thread(self._finish, work)
        return summary

    async def _grouped(self, chunk_size: int) -> DatasetInput:
        """The input in the order in which it is asked for."""
        if not self.group_prefixes:
            return self.data
        numbers = await asyncio.to_thread(
            prefix_order,
            self.data.chosen,
            self.parser(say_nothing),
            num_lanes=self.group_prefixes,
            chunk_size=chunk_size,
        )
        return self.data.of_rows(numbers, are_sorted=False)

    def _finish(self, work: DatasetRun) -> None:
        """Bring the output into its last form, and say beside it what it is."""
        sink = self.sink
        sink.finish()
        if self.is_part:
            return
        # one that is there and of this output stays: what changed since is to be found out
        if sink.is_durable and (sink.has_changed or not sink.certificate.exists()):
            options = (self.defaults or SamplingParams()).model_dump(
                mode="json", exclude_unset=True
            )
            said = {
                "run": self.run_id,
                "input": self.data.source.name,
                "sampling": options,
                "fields": None if self.fields is None else sorted(self.fields),
                "layout": self.layout.as_options(),
            }
            try:
                write_certificate(sink, work.total, work.made_by, said)
            except DatasetError as error:
                # each row is on disk; that isn't undone by a folder where nothing may be made
                self.warn(f"the output is complete and has no certificate: {error}")

    async def _ask_in_turns(
        self, ask: Callable[..., Awaitable[RunSummary]], limit: ErrorLimit | None
    ) -> RunSummary:
        """A pass for each turn; the files between them are removed when all rows are written."""
        source, places = self.data.source, list[Path]()
        each = map(self.parser(say_nothing).num_turns, source.records())
        turns = await asyncio.to_thread(array, "B", each)
        chosen = self.data.chosen
        numbers = chosen.numbers if isinstance(chosen, ChosenSource) else range(len(turns))
        rows = [row for row in numbers if row < len(turns)]
        total = max((turns[row] for row in rows if row not in self.sink), default=1)
        if total > 1:
            total = max(turns[row] for row in rows)  # the same whatever is written already
        with contextlib.ExitStack() as files:
            answers: list[Answers] = []
            for number in range(1, total):
                place = place_of_answers(self.sink.name, number, total)
                turn = TurnPass(number, total, tuple(answers))
                part = self.data.of_rows(sorted(row for row in rows if turn.takes(turns[row])))
                with contextlib.closing(JsonLinesSink(place)) as sink:
                    earlier = replace(
                        self,
                        data=part,
                        sink=sink,
                        run_id=f"{self.run_id}-turn{number}of{total}",
                        ordered=False,
                        redo_changed=True,
                        warn=say_nothing,
                        turn=turn,
                    )
                    try:
                        await _drop_stale(earlier, retry_errors=self.retry_errors)
                        await ask(earlier)
                    finally:
                        await part.stop_reading()
                places.append(place)
                answers.append(files.enter_context(contextlib.closing(Answers(place))))
            summary = await ask(replace(self, turn=TurnPass(total, total, answers)), limit=limit)
        for place in places:
            place.unlink(missing_ok=True)
        return summary

    def parser(self, warn: Callable[[str], None] = logger.warning) -> RowParser:
        """Of the input's rows, from the first."""
        return RowParser(
            self.defaults,
            warn=warn,
            fields=self.fields,
            layout=self.layout,
            turn=self.turn,
            place=self.data.source.place,
        )

    async def _drop_other_models(self, now: Collection[Maker]) -> None:
        if rows := check_makers(self.sink, now, redo=self.redo_changed):
            await asyncio.to_thread(self.sink.drop, rows.__contains__)


@asynccontextmanager
async def open_dataset(
    input: Inputs | Rows,  # noqa: A002 - as on the command line
    output: Path | str | None,
    *,
    defaults: SamplingParams | None = None,
    run: str | None = None,
    model: str = "",
    format: str | None = None,  # noqa: A002
    fields: Collection[str] | None = None,
    layout: Layout | None = None,
    selection: RowSelection | None = None,
    retry_errors: bool = False,
    redo_changed: bool = False,
    redo_all: bool = False,
    ordered: bool = False,
    group_prefixes: int = 0,
    outputs: OutputOptions | None = None,
    warn: Callable[[str], None] | None = None,
) -> AsyncGenerator[Dataset, None]:
    """Look at both files, before anything else is started; the parameters are run_dataset's.

    :param model: what the run's workers load, if that is known
    :raises DatasetError: a file can't be used, or the output belongs to another input
    :raises ConfigurationError: `fields` has one that no request has
    :raises InvalidRequestError: no request could be sent with these defaults
    """
    if ordered and selection is not None and selection.shuffle:
        raise ConfigurationError("--ordered is the input's order, --shuffle another: give one")
    _check_grouping(group_prefixes, ordered=ordered, selection=selection)
    data = DatasetInput(input, format=format, output=output or "", selection=selection)
    opened = open_dataset_of(
        data,
        output,
        defaults=defaults,
        run=run,
        model=model,
        fields=fields,
        layout=layout,
        retry_errors=retry_errors,
        redo_changed=redo_changed,
        redo_all=redo_all,
        ordered=ordered,
        group_prefixes=group_prefixes,
        outputs=outputs,
        warn=warn,
    )
    async with opened as dataset:
        yield dataset


@asynccontextmanager
async def open_dataset_of(
    data: DatasetInput,
    output: Path | str | None,
    *,
    defaults: SamplingParams | None = None,
    run: str | None = None,
    model: str = "",
    fields: Collection[str] | None = None,
    layout: Layout | None = None,
    retry_errors: bool = False,
    redo_changed: bool = False,
    redo_all: bool = False,
    ordered: bool = False,
    group_prefixes: int = 0,
    is_part: bool = False,
    outputs: OutputOptions | None = None,
    warn: Callable[[str], None] | None = None,
) -> AsyncGenerator[Dataset, None]:
    """The same of an input that is open; it is closed at the end.

    :param is_part: the output is for further passes: without a certificate, and what it has of rows
        that aren't asked for now may be of anything
    """
    source = data.source
    try:
        names = None if fields is None else check_fields(fields)
        _check_defaults(defaults)
        layout, outputs, warn = (
            layout or Layout(),
            outputs or OutputOptions(),
            warn or logger.warning,
        )
        sink = _sink(source, output, layout, outputs, warn)
        if group_prefixes and not source.is_repeatable:
            raise DatasetError(
                f"{source.name} can be read only once, and --group-prefixes has to read it twice: "
                "write it into a file first"
            )
        mark = _fingerprint(
            data.chosen, output, defaults, model, layout, group_prefixes=group_prefixes
        )
        dataset = Dataset(
            data,
            sink,
            _run_id(source, mark) if run is None else check_run_id(run),
            mark,
            defaults,
            names,
            layout,
            warn,
            redo_changed,
            ordered,
            retry_errors,
            redo_all,
            group_prefixes,
            is_part=is_part,
        )
        try:
            if source.is_same_file(sink.info()):
                raise DatasetError(f"{source.name} can't be both input and output")
            # scripts read the output whatever the run ended with: of a wrong input it is empty
            dataset.keeps_empty = True
            if told := contradiction(sink):
                warn(told)
            await data.look(defaults, names, layout)
            await _prepare(dataset, retry_errors=retry_errors)
            dataset.keeps_empty = False
            yield dataset
        finally:
            sink.close(keep_empty=dataset.keeps_empty)
    finally:
        await data.close()


def _sink(
    source: RowSource,
    output: Path | str | None,
    layout: Layout,
    outputs: OutputOptions,
    warn: Callable[[str], None],
) -> RowSink:
    """:raises DatasetError: the output can't be written, or is the input"""
    if output is None:
        if layout.turns_column is not None:
            raise DatasetError("several turns are several passes: give an output")
        return MemorySink()
    _check_apart(source, output)
    if layout.turns_column is not None:
        _check_turns(source, output)
    if errors := outputs.errors_of(output):
        _check_apart(source, errors)
    return open_sink(output, outputs, schema=partial(_schema_of, source, layout), warn=warn)


async def run_dataset(
    client: Client,
    input: Inputs | Rows,  # noqa: A002 - as on the command line
    output: Path | str | None = None,
    *,
    defaults: SamplingParams | None = None,
    run: str | None = None,
    queue: str | None = None,
    chunk_size: int | None = None,
    window: int = DEFAULT_WINDOW,
    format: str | None = None,  # noqa: A002
    fields: Collection[str] | None = None,
    layout: Layout | None = None,
    selection: RowSelection | None = None,
    retry_errors: bool = False,
    redo_changed: bool = False,
    redo_all: bool = False,
    max_errors: ErrorLimit | int | str | None = None,
    ordered: bool = False,
    group_prefixes: int = 0,
    cache: Path | str | None = None,
    cache_scope: str = "",
    outputs: OutputOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> RunSummary:
    """Generate for each row of a file, or of several, and append it, answered, to another; or for
    each of rows that are given, and give them back as `output` of the summary.

    Doing it again with the same input, output and defaults after any crash goes on where it
    stopped. At most `window` requests are in Redis at a time. A row that is wrong becomes a row
    with an `error`. `-` is stdin or stdout. Formats and columns are in docs/datasets.md.

    :param input: files, patterns, folders, addresses that fsspec knows, or, alone, a pipe; or
        mappings, iterated over in another thread, or asynchronously, unless they are a list; or a
        table of pandas, Polars, Arrow or `datasets`
    :param output: None: the rows are given back, in order, as a table of the input's kind or a list
        of dicts; all of them are in memory, and lost with the process
    :param format: what the input is in, such as `"txt"`; None: its content tells
    :param fields: the columns that are read as fields of their requests, besides `id`, `prompt`
        and `messages`; all others come back untouched. None: all that have the name of a field
    :param layout: where in a row its prompt is, if not in `prompt` or `messages`
    :param selection: which rows are asked for; an output may get those of several
    :param retry_errors: ask again for the rows of the output that have an error
    :param redo_changed: make the rows of the output anew that were made of something else
    :param redo_all: make all rows of the output anew that are asked for
    :param max_errors: stop when more rows than that have errors, `20`, or a greater share of the
        last thousand, `"5%"`
    :param ordered: write rows in the order of the input; those that are answered before their turn
        are held, `window` at most
    :param group_prefixes: ask for rows together whose prompts begin alike, shared out among so many
        workers; 0: in the order of the input
    :param cache: a folder of results of earlier runs: what the same model was asked before isn't
        asked again
    :param cache_scope: names the workers' settings that texts depend on, if they vary
    :param outputs: the output's format, if not that of its name, and a file for errors
    :raises DatasetError: a file can't be used, no row of it can be read, or the output belongs to
        another input, other defaults or another model
    :raises InvalidRequestError: the run id belongs to another input or other defaults
    :raises RowsFailedError: see `max_errors`
    """
    opened = open_dataset(
        input,
        output,
        defaults=defaults,
        run=run,
        format=format,
        fields=fields,
        layout=layout,
        selection=selection,
        retry_errors=retry_errors,
        redo_changed=redo_changed,
        redo_all=redo_all,
        ordered=ordered,
        group_prefixes=group_prefixes,
        outputs=outputs,
        warn=warn,
    )
    async with opened as dataset:
        summary = await dataset.run(
            client,
            queue=queue,
            chunk_size=chunk_size,
            window=window,
            max_errors=max_errors,
            cache=cache,
            cache_scope=cache_scope,
            on_progress=on_progress,
        )
        if isinstance(dataset.sink, MemorySink):
            summary.output = dataset.sink.given_back(input)
        return summary


def dataset_run_id(
    input: Inputs,  # noqa: A002
    output: Path | str,
    defaults: SamplingParams | None = None,
) -> str:
    """The run of these files and defaults: the same until the input changes.

    :raises DatasetError: the input can't be read
    """
    source = open_source(input, output=output)
    try:
        return run_id_of(source, output, defaults)
    finally:
        source.close()


def run_id_of(
    source: RowSource,
    output: Path | str,
    defaults: SamplingParams | None,
    layout: Layout | None = None,
) -> str:
    """The same of an input that is open."""
    return _run_id(source, _fingerprint(source, output, defaults, "", layout or Layout()))


def _run_id(source: RowSource, mark: str) -> str:
    if source.name == "-":
        return f"stdin-{uuid4().hex[:12]}"
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source.name).stem).strip("-_")[:40] or "rows"
    return f"{name}-{mark[:12] if source.is_repeatable else uuid4().hex[:12]}"


def _fingerprint(
    source: RowSource,
    output: Path | str | None,
    defaults: SamplingParams | None,
    model: str,
    layout: Layout,
    *,
    group_prefixes: int = 0,
) -> str:
    """Of the files and options. The input's size, time and samples stand for its content."""
    # rows that are given back are nobody else's: no run of before is gone on with
    where = uuid4().hex if output is None else output
    parts = [str(where) if output in ("-", None) else os.path.realpath(where)]
    parts.append((defaults or SamplingParams()).model_dump_json(exclude_unset=True))
    parts += layout.identity()
    if group_prefixes:  # its requests are numbered in another order
        parts.append(f"prefixes {group_prefixes}")
    if model:
        parts.append(model)
    if source.name != "-":
        parts += source.identity()
    return hashlib.blake2b("\0".join(parts).encode(errors="replace"), digest_size=16).hexdigest()


def _check_grouping(num_workers: int, *, ordered: bool, selection: RowSelection | None) -> None:
    """:raises ConfigurationError: rows are asked for in another order"""
    if num_workers < 0:
        raise ConfigurationError(f"group_prefixes is {num_workers}: must be a number of workers")
    if num_workers and ordered:
        raise ConfigurationError(
            "--ordered is the input's order, --group-prefixes another: give one"
        )
    if num_workers and selection is not None and selection.shuffle:
        raise ConfigurationError("--shuffle is one order, --group-prefixes another: give one")


def _check_defaults(defaults: SamplingParams | None) -> None:
    if defaults is not None:
        request_json(GenerationRequest(id="defaults", prompt="x", sampling=defaults))


def _schema_of(source: RowSource, layout: Layout) -> pyarrow.Schema | None:
    """The types of the columns that come back, under the names that they come back under."""
    schema = source.schema()
    if schema is None or layout == Layout():
        return schema
    import pyarrow as pa

    columns = shown_columns({field.name: field for field in schema}, layout)
    return pa.schema([field.with_name(name) for name, field in columns.items()])


def _check_turns(source: RowSource, output: Path | str) -> None:
    """:raises DatasetError: rows can't be asked in turns"""
    place_of_answers(output, 1, 2)
    if not source.is_repeatable:
        raise DatasetError(
            f"{source.name} can be read only once, and several turns are several passes: write it "
            "into a file first"
        )


async def _drop_stale(earlier: Dataset, *, retry_errors: bool) -> None:
    """Take out of an earlier turn's answers what something else made."""
    sink, records = earlier.sink, earlier.data.source.records()
    stale = await asyncio.to_thread(changed_rows, records, earlier.parser(), sink, redo=True)
    for row in range(sink.end):
        if earlier.redo_all or (retry_errors and sink.has_error(row)):
            stale.add(row)
    if len(stale):
        await asyncio.to_thread(sink.drop, stale.__contains__)


def _check_apart(source: RowSource, output: Path | str) -> None:
    """:raises DatasetError: what is written would be read"""
    try:
        info = os.stat(output)  # noqa: PTH116 - of a str or a Path
    except OSError:
        return
    if source.is_same_file(info):
        raise DatasetError(f"{source.name} can't be both input and output")


async def _models(client: Client, queue: str) -> Collection[Maker]:
    """Those of the workers, if we may know: a user for producers needn't see workers."""
    try:
        return {Maker(*model) for model in await client.store.models(queue)}
    except RedisAuthError:
        return ()


async def _prepare(dataset: Dataset, *, retry_errors: bool) -> None:
    """Take out of the output what is to be made again.

    :raises DatasetError: there are rows of something else, and they aren't to be made again
    """
    source, sink = dataset.data.source, dataset.sink
    is_chosen = await asyncio.to_thread(chosen_rows, dataset.data)
    if not sink.rows:
        return
    unwanted = Bitmap()
    redoes = dataset.redo_changed or dataset.redo_all
    if source.is_repeatable:
        unwanted = await asyncio.to_thread(
            changed_rows, source.records(), dataset.parser(), sink, redo=redoes
        )
    elif dataset.redo_changed:
        raise DatasetError(
            f"--redo-changed has to read the input twice, which {source.name} can't be: "
            "write it into a file first"
        )
    if not dataset.is_part:
        check_chosen(unwanted, sink, is_chosen)
    for row in range(sink.end):
        is_wrong = retry_errors and sink.has_error(row)
        if (is_wrong or dataset.redo_all) and row in sink and is_chosen(row):
            unwanted.add(row)
    if len(unwanted):
        await asyncio.to_thread(sink.drop, unwanted.__contains__)
    chosen = (row for row in range(sink.end) if row not in sink and is_chosen(row))
    if dataset.ordered and (missing := next(chosen, None)) is not None:
        raise DatasetError(
            f"the output has rows behind row {missing}, which is still to be made: without "
            "--ordered it goes to the end, with it take another output"
        )


async def _open(
    client: Client,
    dataset: Dataset,
    queue: str,
    chunk_size: int | None,
    makers: Collection[Maker],
) -> OpenedRun:
    """Take up the run in Redis; results of other models than the workers have now are left out,
    as if they had been lost."""
    store, run, mark = client.store, dataset.run_id, dataset.mark
    there = await store.open(
        run,
        queue=queue,
        chunk_size=chunk_size or client.settings.chunk_size,
        fingerprint=mark,
    )
    if there.get("fingerprint") != mark:
        raise InvalidRequestError(
            f"run {run!r} belongs to another input, output or other defaults; choose another id"
        )
    # who runs it again wants the rest
    await store.set(run, cancelled=0)
    # before the stream: what is done later comes through the subscription
    done = await store.done(run)
    waiting: dict[int, bytes] = {}
    last = "0"
    while entries := await store.entries(run, last):
        waiting.update(
            (index, raw)
            for _, index, raw in entries
            if not makers or Maker.of(parse_result(run, index, raw)) in {*makers, Maker()}
        )
        last = entries[-1][0]
    return OpenedRun(
        run=run,
        queue=there["queue"],
        chunk_size=int(there["chunk_size"]),
        fingerprint=mark,
        submitted=int(there.get("submitted", 0)),
        done=done,
        waiting=waiting,
        last=last,
    )
