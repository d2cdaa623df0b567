"""A run as its producers and readers hold it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace

from queue_api.client.reader import ResultReader, Subscription
from queue_api.store.bitmap import Bitmap
from queue_api.store.cancel import cancel_requests
from queue_api.store.jobs import chunk_job_id
from queue_api.store.reconcile import Reconciler
from queue_api.store.run_store import Entry, RunStore, if_possible, parse_result
from queue_api.store.runs import RunStatus
from queue_api.store.undone import open_chunks, pages, request_ids, undone
from queue_api.wire.errors import InvalidRequestError, RunIncompleteError, RunNotFoundError
from queue_api.wire.schemas import GenerationResult

__all__ = ["Run"]

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 0.05
LOOK_AT_ONCE = 1024
"""Requests whose ids are looked for at a time."""
MOST_TIMES_FORGOTTEN = 3
"""So often a run that vanished is submitted again by one handle."""


class Run:
    """A run: its results, how far it is, and a way to end it."""

    def __init__(
        self,
        run_id: str,
        store: RunStore,
        reader: ResultReader,
        ids: Sequence[str] | None = None,
        submit_again: Callable[[Collection[int]], Awaitable[None]] | None = None,
    ) -> None:
        self.id = run_id
        self._store = store
        self._reader = reader
        self._ids = ids
        self._submit_again = submit_again
        """Sends the requests at these indexes once more, where the producer still has them."""
        self._times_forgotten = 0

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    async def results(self) -> AsyncGenerator[GenerationResult, None]:
        """Every result once, in completion order, from the first on; ends with the run.

        Requests whose jobs died without an answer end in an error result, so it doesn't wait for
        ever; for requests on the queue it waits until there is a worker. What Redis lost is sent
        again if this is the handle of who submitted it, from a list.

        :raises RunNotFoundError: no such run, or it was deleted or expired
        :raises RunIncompleteError: the producer fell silent without saying how many there are,
            or results were taken off the stream: told once those that are there have been
        """
        async with aclosing(self._pages()) as pages:
            async for page in pages:
                # one by one: a page of results at once would keep the garbage collector busy
                for _, index, raw in page:
                    yield parse_result(self.id, index, raw)

    async def batches(
        self, *, follow: bool = True, whole: bool = True
    ) -> AsyncGenerator[list[GenerationResult], None]:
        """The same, as many at a time as there are.

        :param follow: until the run is complete; False takes only what is there
        :param whole: raise where results were taken off the stream; never without `follow`
        """
        async with aclosing(self._pages(follow=follow, whole=whole)) as pages:
            async for page in pages:
                yield [parse_result(self.id, index, raw) for _, index, raw in page]

    async def wait(self) -> RunStatus:
        """Wait until the run is complete, without reading its results; raises as `results`."""
        async with aclosing(self._pages(whole=False)) as pages:
            async for _ in pages:
                pass
        return await self._store.status(self.id)

    async def status(self) -> RunStatus:
        """How far it is, and in which states its unfinished jobs are.

        :raises RunNotFoundError: no such run
        """
        status = await self._store.status(self.id)
        if status.complete:
            return status
        chunks = open_chunks(await self._store.done(self.id), status)
        rows = await self._store.job_fields((chunk_job_id(self.id, c) for c in chunks), "status")
        states = Counter(state.decode() for (state,) in rows if state is not None)
        return replace(status, jobs=dict(states))

    async def cancel(self, request_id: str | None = None) -> int:
        """End everything that has no result yet, or that one request, with a `cancelled` result.

        The results are there at once. Queued jobs leave the queue; a worker notices within a
        heartbeat that it computes for nobody, and stops. One request of a job that goes on may
        be computed to its end: its text is then dropped. Returns how many were cancelled.

        :raises RunNotFoundError: no such run
        :raises InvalidRequestError: no such request in it; neither among those whose results
            were taken off the stream, for those aren't known any more
        """
        if request_id is None:
            await self._store.status(self.id)  # a mistyped id mustn't make a run
            await self._store.set(self.id, cancelled=1)
            self._submit_again = None
        status = await self._store.status(self.id)
        indexes: Iterable[int]
        if request_id is None:
            indexes = await undone(self._store, status)
        else:
            indexes = await self._open_index(request_id, status)
        return await cancel_requests(self._store, status, indexes, self._id_of)

    def _id_of(self, index: int) -> str | None:
        """The id of the request at an index, if this is who submitted it."""
        return self._ids[index] if self._ids is not None and index < len(self._ids) else None

    async def _open_index(self, request_id: str, status: RunStatus) -> list[int]:
        """Where the request is among those without a result; nowhere if it has one already."""
        missing = await undone(self._store, status)
        for page in pages(missing, status.chunk_size, LOOK_AT_ONCE):
            ids = await request_ids(self._store, status, page, self._id_of)
            for index, found in ids.items():
                if found == request_id:
                    return [index]
        if request_id in (self._ids or ()):
            return []
        async with aclosing(self.batches(follow=False)) as batches:
            async for batch in batches:
                if any(result.id == request_id for result in batch):
                    return []
        raise InvalidRequestError(f"run {self.id!r} has no request {request_id!r}")

    async def _pages(
        self, *, follow: bool = True, whole: bool = True
    ) -> AsyncGenerator[list[Entry], None]:
        """The stream from its start to the end of the run, or to where it is now."""
        # a Redis that lost its last second may tell a result twice
        seen = Bitmap()
        last = "0"
        if follow:
            subscription = await self._reader.subscribe(self.id)
            try:
                async with aclosing(self._until_complete(subscription, seen)) as pages:
                    async for page in pages:
                        yield page
            finally:
                subscription.close()
            last = subscription.last
        # complete, so the rest is in the stream; some of it may have been trimmed by its owner
        while page := await self._store.entries(self.id, last):
            yield [entry for entry in page if seen.add(entry[1])]
            last = page[-1][0]
        if follow and whole:
            await self._check_whole(len(seen))

    async def _until_complete(
        self, subscription: Subscription, seen: Bitmap
    ) -> AsyncGenerator[list[Entry], None]:
        """What comes, with sweeps for abandoned requests while nothing does."""
        reconcile_s = self._store.settings.reconcile_s
        sweeper = Reconciler(self._store.within(0.0), self.id, self._id_of, self._submit_again)
        status = await self._known_status()
        beyond = 0
        wait_s, heard_at, swept_at = FIRST_WAIT_S, time.monotonic(), time.monotonic()
        while status.total is None or len(seen) - beyond < status.total:
            page = await subscription.take(wait_s)
            if page:
                yield [entry for entry in self._asked_for(page, status) if seen.add(entry[1])]
                wait_s = FIRST_WAIT_S
                heard_at = swept_at = time.monotonic()
                continue
            before, status = status, await self._known_status()
            if before.total is None and status.total is not None:
                beyond = len(seen) - seen.count_below(status.total)
            if status.complete:
                break
            self._check_producer(status, time.monotonic() - heard_at)
            if time.monotonic() - swept_at >= reconcile_s:
                swept_at = time.monotonic()
                await if_possible(sweeper.sweep())
            wait_s = min(wait_s * 2, reconcile_s)
        self._submit_again = None  # whoever removes it from now on means it

    def _asked_for(self, page: list[Entry], status: RunStatus) -> list[Entry]:
        """Without results of requests that nobody made: whoever may write to Redis wrote them."""
        total = status.total
        if total is None or all(index < total for _, index, _ in page):
            return page
        logger.warning("run %s: results beyond its %d requests are passed over", self.id, total)
        return [entry for entry in page if entry[1] < total]

    async def _known_status(self) -> RunStatus:
        """How far it is; what Redis forgot of the submission is sent again, if it is at hand.

        :raises RunNotFoundError: no such run
        """
        count = len(self._ids or ())
        try:
            status = await self._store.status(self.id)
            if status.total is not None or self._submit_again is None:
                return status
            lost = range(status.submitted, count)
        except RunNotFoundError:
            if self._submit_again is None or self._times_forgotten >= MOST_TIMES_FORGOTTEN:
                raise
            self._times_forgotten += 1
            # those whose results were told already too: others may read the run
            lost = range(count)
        logger.warning("run %s: Redis lost %d of its requests; sent again", self.id, len(lost))
        await self._submit_again(lost)
        return await self._store.status(self.id)

    async def _check_whole(self, seen: int) -> None:
        status = await self._store.status(self.id)
        if status.total is not None and seen < status.total:
            raise RunIncompleteError(
                f"run {self.id!r}: {status.total - seen} of its {status.total} results aren't on "
                "its stream any more: whoever owns the run took them off (a `batchmill run` does "
                "once they are in its output file), or somebody trimmed the stream"
            )

    def _check_producer(self, status: RunStatus, silent_s: float) -> None:
        waiting_for_producer = status.total is None and status.done >= status.submitted
        if waiting_for_producer and silent_s > self._store.settings.producer_patience_s:
            raise RunIncompleteError(
                f"run {self.id!r}: its producer stopped after {status.submitted} requests, "
                "without an end; submit it again to go on"
            )
