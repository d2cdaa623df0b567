"""A file of prompts to a file of answers: resumable, each row once, in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from queue_api.client.client import Client
from queue_api.datasets.certificate import contradiction, write_certificate
from queue_api.datasets.columns import RowParser, check_fields
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.error_limit import ErrorLimit
from queue_api.datasets.feed import DatasetRun, OpenedRun
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.formats.opening import Inputs, open_source
from queue_api.datasets.formats.output_opening import open_sink
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.formats.row_sink import RowSink
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.response_cache import ResponseCache
from queue_api.datasets.resume import changed_rows, check_makers
from queue_api.datasets.summary import Progress, RunSummary
from queue_api.store.bitmap import Bitmap
from queue_api.store.jobs import request_json
from queue_api.store.run_store import parse_result
from queue_api.store.runs import check_run_id
from queue_api.wire.errors import DatasetError, InvalidRequestError, RedisAuthError
from queue_api.wire.schemas import GenerationRequest, SamplingParams

__all__ = [
    "DEFAULT_WINDOW",
    "Dataset",
    "dataset_run_id",
    "open_dataset",
    "run_dataset",
    "run_id_of",
]

logger = logging.getLogger(__name__)

DEFAULT_WINDOW = 8192


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
    warn: Callable[[str], None]
    redo_changed: bool
    ordered: bool = False
    keeps_empty: bool = False
    """Whether an output without rows is kept."""

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
    ) -> RunSummary:
        """Ask for what isn't written yet, and write it; as run_dataset."""
        self.keeps_empty = True
        queue = queue or client.settings.queue
        makers = await _models(client, queue)
        await self._drop_other_models(makers)
        opened = await _open(client, self, queue, chunk_size, makers)
        kept = None if cache is None else ResponseCache(cache, cache_scope)
        work = DatasetRun(
            client,
            opened,
            self.sink,
            data=self.data,
            parser=self.parser(self.warn),
            window=window,
            limit=ErrorLimit.of(max_errors),
            ordered=self.ordered,
            cache=kept,
            makers=makers,
            listener=on_progress,
        )
        try:
            summary = await work.run()
        finally:
            if kept is not None:
                kept.close()
        await asyncio.to_thread(self._finish, work)
        return summary

    def _finish(self, work: DatasetRun) -> None:
        """Bring the output into its last form, and say beside it what it is."""
        sink = self.sink
        sink.finish()
        # one that is there and of this output stays: what changed since is to be found out
        if sink.is_durable and (sink.has_changed or not sink.certificate.exists()):
            options = (self.defaults or SamplingParams()).model_dump(
                mode="json", exclude_unset=True
            )
            said = {"run": self.run_id, "input": self.data.source.name, "sampling": options}
            try:
                write_certificate(sink, work.total, work.made_by, said)
            except DatasetError as error:
                # each row is on disk; that isn't undone by a folder where nothing may be made
                self.warn(f"the output is complete and has no certificate: {error}")

    def parser(self, warn: Callable[[str], None] = logger.warning) -> RowParser:
        """Of the input's rows, from the first."""
        place = self.data.source.place
        return RowParser(self.defaults, warn=warn, fields=self.fields, place=place)

    async def _drop_other_models(self, now: Collection[Maker]) -> None:
        if rows := check_makers(self.sink, now, redo=self.redo_changed):
            await asyncio.to_thread(self.sink.drop, rows.__contains__)


@asynccontextmanager
async def open_dataset(
    input: Inputs,  # noqa: A002 - as on the command line
    output: Path | str,
    *,
    defaults: SamplingParams | None = None,
    run: str | None = None,
    model: str = "",
    format: str | None = None,  # noqa: A002
    fields: Collection[str] | None = None,
    retry_errors: bool = False,
    redo_changed: bool = False,
    ordered: bool = False,
    outputs: OutputOptions | None = None,
    warn: Callable[[str], None] | None = None,
) -> AsyncGenerator[Dataset, None]:
    """Look at both files, before anything else is started; the parameters are run_dataset's.

    :param model: what the run's workers load, if that is known
    :raises DatasetError: a file can't be used, or the output belongs to another input
    :raises ConfigurationError: `fields` has one that no request has
    :raises InvalidRequestError: no request could be sent with these defaults
    """
    names = None if fields is None else check_fields(fields)
    _check_defaults(defaults)
    data = DatasetInput(input, format=format, output=output)
    source = data.source
    try:
        outputs, warn = outputs or OutputOptions(), warn or logger.warning
        _check_apart(source, output)
        if errors := outputs.errors_of(output):
            _check_apart(source, errors)
        sink = open_sink(output, outputs, schema=source.schema, warn=warn)
        dataset = Dataset(
            data,
            sink,
            check_run_id(run) if run is not None else run_id_of(source, output, defaults, model),
            _fingerprint(source, output, defaults, model),
            defaults,
            names,
            warn,
            redo_changed,
            ordered,
        )
        try:
            if source.is_same_file(sink.info()):
                raise DatasetError(f"{source.name} can't be both input and output")
            # scripts read the output whatever the run ended with: of a wrong input it is empty
            dataset.keeps_empty = True
            if told := contradiction(sink):
                warn(told)
            await data.look(defaults, names)
            await _prepare(dataset, retry_errors=retry_errors)
            dataset.keeps_empty = False
            yield dataset
        finally:
            sink.close(keep_empty=dataset.keeps_empty)
    finally:
        await data.close()


async def run_dataset(
    client: Client,
    input: Inputs,  # noqa: A002 - as on the command line
    output: Path | str,
    *,
    defaults: SamplingParams | None = None,
    run: str | None = None,
    queue: str | None = None,
    chunk_size: int | None = None,
    window: int = DEFAULT_WINDOW,
    format: str | None = None,  # noqa: A002
    fields: Collection[str] | None = None,
    retry_errors: bool = False,
    redo_changed: bool = False,
    max_errors: ErrorLimit | int | str | None = None,
    ordered: bool = False,
    cache: Path | str | None = None,
    cache_scope: str = "",
    outputs: OutputOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> RunSummary:
    """Generate for each row of a file, or of several, and append it, answered, to another.

    Doing it again with the same input, output and defaults after any crash goes on where it
    stopped. At most `window` requests are in Redis at a time. A row that is wrong becomes a row
    with an `error`. `-` is stdin or stdout. Formats and columns are in docs/datasets.md.

    :param input: files, patterns, folders, addresses that fsspec knows, or, alone, a pipe
    :param format: what the input is in, such as `"txt"`; None: its content tells
    :param fields: the columns that are read as fields of their requests, besides `id`, `prompt`
        and `messages`; all others come back untouched. None: all that have the name of a field
    :param retry_errors: ask again for the rows of the output that have an error
    :param redo_changed: make the rows of the output anew that were made of something else
    :param max_errors: stop when more rows than that have errors, `20`, or a greater share of the
        last thousand, `"5%"`
    :param ordered: write rows in the order of the input; those that are answered before their turn
        are held, `window` at most
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
        retry_errors=retry_errors,
        redo_changed=redo_changed,
        ordered=ordered,
        outputs=outputs,
        warn=warn,
    )
    async with opened as dataset:
        return await dataset.run(
            client,
            queue=queue,
            chunk_size=chunk_size,
            window=window,
            max_errors=max_errors,
            cache=cache,
            cache_scope=cache_scope,
            on_progress=on_progress,
        )


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
    source: RowSource, output: Path | str, defaults: SamplingParams | None, model: str = ""
) -> str:
    """The same of an input that is open."""
    if source.name == "-":
        return f"stdin-{uuid4().hex[:12]}"
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source.name).stem).strip("-_")[:40] or "rows"
    if not source.is_repeatable:
        return f"{name}-{uuid4().hex[:12]}"
    return f"{name}-{_fingerprint(source, output, defaults, model)[:12]}"


def _fingerprint(
    source: RowSource, output: Path | str, defaults: SamplingParams | None, model: str
) -> str:
    """Of the files and options. The input's size, time and samples stand for its content."""
    parts = [str(output) if output == "-" else os.path.realpath(output)]
    parts.append((defaults or SamplingParams()).model_dump_json(exclude_unset=True))
    if model:
        parts.append(model)
    if source.name != "-":
        parts += source.identity()
    return hashlib.blake2b("\0".join(parts).encode(errors="replace"), digest_size=16).hexdigest()


def _check_defaults(defaults: SamplingParams | None) -> None:
    if defaults is not None:
        request_json(GenerationRequest(id="defaults", prompt="x", sampling=defaults))


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
    if not sink.rows:
        return
    unwanted = Bitmap()
    if source.is_repeatable:
        unwanted = await asyncio.to_thread(
            changed_rows, source.records(), dataset.parser(), sink, redo=dataset.redo_changed
        )
    elif dataset.redo_changed:
        raise DatasetError(
            f"--redo-changed has to read the input twice, which {source.name} can't be: "
            "write it into a file first"
        )
    if retry_errors:
        for row in range(sink.end):
            if sink.has_error(row):
                unwanted.add(row)
    if len(unwanted):
        await asyncio.to_thread(sink.drop, unwanted.__contains__)
    if dataset.ordered and sink.rows < sink.end:
        missing = next(row for row in range(sink.end) if row not in sink)
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
