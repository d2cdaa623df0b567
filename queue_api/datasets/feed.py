"""One life of a dataset run: rows to Redis on one side, answers to the file on the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from queue_api.client.chunk_writer import ChunkWriter
from queue_api.client.client import Client
from queue_api.client.reader import Subscription
from queue_api.connection.tasks import in_thread
from queue_api.datasets.columns import Row, RowParser, output_row
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.draws import is_drawn, seed_key_of
from queue_api.datasets.error_limit import ErrorLimit, ErrorWatch
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_sink import MadeRow, RowSink
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.in_order import InOrder
from queue_api.datasets.response_cache import ResponseCache
from queue_api.datasets.resume import no_such_row, other_model, other_row
from queue_api.datasets.row_numbers import RowNumbers
from queue_api.datasets.run_statistics import Origin
from queue_api.datasets.summary import Progress, RunSummary
from queue_api.store.bitmap import Bitmap
from queue_api.store.reconcile import Reconciler
from queue_api.store.run_store import Entry, if_possible, parse_result
from queue_api.wire.errors import DatasetError, RequestError, RowsFailedError
from queue_api.wire.schemas import FinishReason, GenerationRequest, GenerationResult

__all__ = ["DatasetRun", "OpenedRun", "WrittenListener"]

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.1
FINISHED_JOB_TTL_S = 5
"""A finished job holds its prompts, and a long run finishes many: at most so many seconds' worth of
them stay in Redis beside the window."""


class WrittenListener(Protocol):
    """Is told of rows that are written."""

    def __call__(self, row: Row, result: GenerationResult, origin: Origin) -> None: ...


@dataclass(frozen=True)
class OpenedRun:
    """What is known of the run in Redis when this life of it begins."""

    run: str
    queue: str
    chunk_size: int
    fingerprint: str
    submitted: int
    done: Bitmap
    """What Redis takes for done."""
    waiting: dict[int, bytes]
    """Results that an earlier process didn't get to write."""
    last: str
    """Where in the stream they end."""


class DatasetRun:
    """Two tasks: one feeds rows to Redis, one writes results; `_pending` is between them."""

    def __init__(
        self,
        client: Client,
        opened: OpenedRun,
        sink: RowSink,
        *,
        data: DatasetInput,
        parser: RowParser,
        window: int,
        limit: ErrorLimit | None,
        ordered: bool,
        cache: ResponseCache | None,
        makers: Collection[Maker],
        num_lanes: int,
        listener: Callable[[Progress], None] | None,
        on_written: WrittenListener | None = None,
        summary: RunSummary | None = None,
    ) -> None:
        """:param on_written: is called with each row when it is on disk
        :param summary: of a life before, in the same process, to be gone on with
        """
        self._store = client.store
        self._reader = client.reader
        self._opened = opened
        self._input = data
        self._sink = sink
        self._numbers = RowNumbers(data)
        self._parser = parser
        self._window = max(window, opened.chunk_size)
        self._errors = ErrorWatch(limit)
        self._cache = cache
        self._maker = next(iter(makers)) if len(set(makers)) == 1 else None
        """The one model that the workers have, if they have one."""
        self._found: dict[int, GenerationResult] = {}
        """Rows that are ready, from the cache."""
        self._in_order = InOrder(self._is_written) if ordered else None
        self._makers = sink.makers
        """Models that made rows of the output."""
        self._allowed = {*makers, *sink.makers}
        self._listener = listener
        self._on_written = on_written
        self._chunks = ChunkWriter(
            self._store,
            opened.run,
            queue=opened.queue,
            chunk_size=opened.chunk_size,
            submitted=opened.submitted,
            fingerprint=opened.fingerprint,
            done=Bitmap(),  # which rows are done is decided here, with the output file
            job_ttl_s=min(self._store.settings.job_ttl_s, FINISHED_JOB_TTL_S),
            num_lanes=num_lanes,
        )
        self._pending: dict[int, Row] = {}
        """Rows read and not yet written."""
        self._outstanding = 0
        """Rows whose request or result may be in Redis: those pending, and those written and not
        yet trimmed."""
        self._early = dict(opened.waiting)
        """Results whose rows haven't been read yet."""
        self._ready: list[tuple[Row, bytes]] = []
        """Such rows, once they have been read."""
        self._fed_chunk = -1
        self._room = asyncio.Event()
        self._total: int | None = None
        """How many rows there are, or can be read; None until all are."""
        self._broken: DatasetError | None = None
        """Why the input can't be read to its end."""
        self._counted: int | None = None
        self._told_at = 0.0
        self._started_at = time.perf_counter() - (summary.elapsed_s if summary else 0.0)
        self._goes_on = summary is not None
        self.summary = summary or RunSummary(run=opened.run)

    async def run(self) -> RunSummary:
        """Until every row is written.

        :raises DatasetError: the input can't be read to its end; the rows before are written
        """
        if not self._goes_on:
            self.summary.resumed, self.summary.errors_before = self._numbers.written(self._sink)
        subscription = await self._reader.subscribe(self._opened.run, self._opened.last)
        try:
            async with asyncio.TaskGroup() as tasks:
                counter = tasks.create_task(self._count())
                tasks.create_task(self._feed(subscription))
                await self._write_on(subscription)
                counter.cancel()
        except BaseExceptionGroup as group:
            # one error is enough to know what was wrong
            first: BaseException = group
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
        finally:
            subscription.close()
            self.summary.elapsed_s = time.perf_counter() - self._started_at
        self._tell(final=True)
        if self._broken is not None:
            raise self._broken
        return self.summary

    @property
    def total(self) -> int:
        """How many rows the input has; once `run` has ended."""
        return self._total or 0

    @property
    def counted(self) -> int | None:
        """The same, as far as it is known by now."""
        return self._total if self._total is not None else self._counted

    @property
    def made_by(self) -> set[Maker]:
        """The models that made rows of the output."""
        return self._makers

    async def _count(self) -> None:
        self._counted = await asyncio.to_thread(_count_rows, self._input.chosen)

    async def _feed(self, subscription: Subscription) -> None:
        total = 0
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                for record in batch:
                    total += 1
                    await self._take(record, subscription)
        await self._chunks.flush()
        if self._broken is None:
            self._check_end(total)
            await self._store.set(self._opened.run, total=total)
        self._total = total
        self._early.clear()  # of no row that there is
        subscription.poke()

    async def _take(self, record: Record, subscription: Subscription) -> None:
        """Send the next row, unless its text is there already."""
        row = self._parser.parse(record)
        self._numbers.note(row)
        if row.row in self._sink:
            if self._sink.has_other(row.row, row.fingerprint):
                raise other_row(self._sink, row.row, row.columns)
            self._chunks.skip(row.index)
        elif (raw := self._early.pop(row.index, None)) is not None:
            self._chunks.skip(row.index)
            self._ready.append((row, raw))
            subscription.poke()
        elif (found := self._cached(row)) is not None:
            # these come faster than they are written
            while len(self._ready) + self._num_held >= self._window:
                await self._wait_for_writing()
            self._chunks.skip(row.index)
            self._found[row.index] = found
            self._ready.append((row, b""))
            subscription.poke()
        else:
            await self._submit(row)

    def _cached(self, row: Row) -> GenerationResult | None:
        """What the model made of it before."""
        if self._cache is None or self._maker is None:
            return None
        if not isinstance(row.request, GenerationRequest):
            return None
        found = self._cache.find(row.request, self._maker)
        return found and found.model_copy(update={"run": self._opened.run, "index": row.index})

    async def _wait_for_writing(self) -> None:
        await self._chunks.flush()  # among what is asked for may be what the others wait for
        self._room.clear()
        await self._room.wait()

    async def _batches(self) -> AsyncGenerator[list[Record], None]:
        """Those that can be read: what is damaged further on costs none of the rows before it."""
        try:
            async with aclosing(self._input.batches()) as batches:
                async for batch in batches:
                    yield batch
        except DatasetError as error:
            self._broken = error

    def _check_end(self, total: int) -> None:
        if not self._numbers.is_all:
            return  # other rows than these may have been asked for before
        for row in range(total, self._sink.end):
            if row in self._sink:
                raise no_such_row(row, total)

    async def _submit(self, row: Row) -> None:
        chunk = row.index // self._opened.chunk_size
        if chunk != self._fed_chunk:
            # parts of a chunk can't be sent apart, so there has to be room for all of it
            self._fed_chunk = chunk
            await self._wait_for_room()
            await self._reopen_lost(row.index)
        self._pending[row.index] = row
        self._outstanding += 1
        if isinstance(row.request, RequestError):
            run = self._opened.run
            failed = GenerationResult.failed(row.id, row.request, run=run, index=row.index)
            await self._chunks.put(row.index, failed)
        else:
            await self._chunks.put(row.index, row.request, row.as_json)

    async def _wait_for_room(self) -> None:
        while self._outstanding + self._opened.chunk_size > self._window:
            await self._wait_for_writing()

    async def _reopen_lost(self, first: int) -> None:
        """Rows that were answered, but the answer is neither in the stream nor in the output.

        :param first: the first row of its chunk that has to be asked for; those before it have
            their answers, even if they aren't written yet
        """
        size = self._opened.chunk_size
        lost = [
            index
            for index in range(first, (first // size + 1) * size)
            if index in self._opened.done
            and index not in self._early
            and not self._is_written(index)
        ]
        if lost:
            await self._store.reopen(self._opened.run, lost)

    async def _write_on(self, subscription: Subscription) -> None:
        reconcile_s = self._store.settings.reconcile_s
        hasty = self._store.within(0.0)
        sweeper = Reconciler(hasty, self._opened.run, self._id_of, self._resubmit)
        heard_at = time.monotonic()
        while self._total is None or self._pending or self._ready or self._num_held:
            entries = await subscription.take(reconcile_s)
            answered, self._ready = self._ready, []
            answered += self._match(entries)
            if self._in_order is not None:
                answered = self._those_whose_turn_it_is(answered, entries)
            if answered:
                await self._write(answered)
            if entries and (through := self._safe_through(entries)):
                await if_possible(hasty.trim(self._opened.run, through))
            self._outstanding = len(self._pending) + self._num_held
            self._room.set()
            if entries or answered:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at >= reconcile_s and self._pending:
                heard_at = time.monotonic()
                waiting = [i for i in self._pending if i < self._chunks.submitted]
                await if_possible(sweeper.sweep(waiting))
        if subscription.last != "0":
            await self._store.trim(self._opened.run, subscription.last)

    @property
    def _num_held(self) -> int:
        """Answered rows that wait for those before them."""
        return 0 if self._in_order is None else len(self._in_order)

    def _those_whose_turn_it_is(
        self, answered: Sequence[tuple[Row, bytes]], entries: Sequence[Entry]
    ) -> list[tuple[Row, bytes]]:
        assert self._in_order is not None
        places = {index: entry for entry, index, _ in entries}
        for row, raw in answered:
            self._in_order.put(row, raw, places.get(row.index))
        return self._in_order.take()

    def _safe_through(self, entries: Sequence[Entry]) -> str | None:
        """Up to which entry of the stream all results are in the output."""
        if self._early:
            return None  # a result whose row hasn't been read yet is nowhere but in the stream
        if self._num_held:
            assert self._in_order is not None
            return self._in_order.through()
        return entries[-1][0]

    def _match(self, entries: Sequence[Entry]) -> list[tuple[Row, bytes]]:
        answered = []
        for _, index, raw in entries:
            if (row := self._pending.pop(index, None)) is not None:
                answered.append((row, raw))
            elif not self._is_written(index) and self._may_be_early(index):
                self._early[index] = raw
        return answered

    def _is_written(self, index: int) -> bool:
        number = self._numbers.of(index)
        return number is not None and number in self._sink

    def _may_be_early(self, index: int) -> bool:
        """Whether an earlier life may have asked for it, and its row is still to be read."""
        return self._total is None and index < self._opened.submitted + self._window

    async def _write(self, answered: Sequence[tuple[Row, bytes]]) -> None:
        rows, results, made_now = [], [], []
        for row, raw in answered:
            cached = self._found.pop(row.index, None)
            result = cached or parse_result(self._opened.run, row.index, raw)
            self._check_maker(result)
            results.append((row, result, self._origin(row, is_cached=cached is not None)))
            if cached is None and isinstance(row.request, GenerationRequest):
                made_now.append((row.request, result))
            made = output_row(
                *(row.columns, result, row.fingerprint, row.row, row.answers),
                seed_key=_seed_key(row, result),
            )
            rows.append(MadeRow(row.row, row.fingerprint, made, row.number, row.raw))
        await in_thread(partial(self._append, rows, results))
        if self._cache is not None:
            await in_thread(partial(self._cache.keep, made_now))
        self._tell()
        self._check_errors()

    def _append(
        self, rows: Sequence[MadeRow], results: Sequence[tuple[Row, GenerationResult, Origin]]
    ) -> None:
        """Write rows and count them: both or none, whatever becomes of the task."""
        self._sink.append(rows)
        for row, result, origin in results:
            self.summary.add(result, is_cached=origin is Origin.CACHED)
            self._errors.note(is_error=result.finish_reason is FinishReason.ERROR)
            if self._on_written is not None:
                self._on_written(row, result, origin)

    def _origin(self, row: Row, *, is_cached: bool) -> Origin:
        if is_cached:
            return Origin.CACHED
        return Origin.FOUND if row.index in self._opened.waiting else Origin.MADE

    def _check_maker(self, result: GenerationResult) -> None:
        """:raises DatasetError: the output was begun with another model"""
        maker = Maker.of(result)
        if not maker or maker in self._makers:
            return
        if self._makers and maker not in self._allowed:
            raise other_model(self._makers, {maker})
        if self._makers:
            logger.warning("workers of the queue have different models; rows name their own")
        self._makers.add(maker)
        self._allowed.add(maker)

    def _check_errors(self) -> None:
        """:raises RowsFailedError: so many of the rows have errors that it isn't worth going on"""
        if told := self._errors.exceeded(*self.summary.errors_of_rows):
            raise RowsFailedError(f"{told}; the rest isn't asked for")

    def _tell(self, *, final: bool = False) -> None:
        now = time.perf_counter()
        if self._listener is None or (not final and now - self._told_at < PROGRESS_EVERY_S):
            return
        self._told_at = now
        self._listener(
            Progress(
                done=self.summary.resumed + self.summary.rows,
                total=self.counted,
                errors=self.summary.errors,
                completion_tokens=self.summary.completion_tokens,
                elapsed_s=now - self._started_at,
                resumed=self.summary.resumed,
            )
        )

    def _id_of(self, index: int) -> str | None:
        row = self._pending.get(index)
        return row.id if row else None

    async def _resubmit(self, indexes: Sequence[int]) -> None:
        rows = [self._pending[i] for i in indexes if i in self._pending]
        await self._chunks.again(
            [(r.index, r.request) for r in rows if isinstance(r.request, GenerationRequest)]
        )


def _seed_key(row: Row, result: GenerationResult) -> str | None:
    if isinstance(row.request, RequestError) or not result.ok:
        return None
    return seed_key_of(result) if is_drawn(row.request, result) else None


def _count_rows(source: RowSource) -> int | None:
    """How many rows there will be; None if it can't be read, which its reader will say."""
    if source.waits:  # it would come over the network once more
        return None
    try:
        return source.count()
    except DatasetError:
        return None
