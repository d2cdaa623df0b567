"""Single calls on one connection: those of the same millisecond share a round trip."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from uuid import uuid4

from queue_api.client.reader import ResultReader, Subscription
from queue_api.connection.tasks import end
from queue_api.store.cancel import cancel_requests
from queue_api.store.enqueue import KEY_TAKEN, QUEUE_FULL, key_taken
from queue_api.store.jobs import chunk_job_id, request_json, too_large
from queue_api.store.reconcile import Reconciler
from queue_api.store.run_store import RunStore, if_possible, parse_result
from queue_api.wire.errors import BatchmillError, ClientClosedError, QueueFullError, RequestError
from queue_api.wire.schemas import GenerationRequest, GenerationResult

__all__ = ["Interactive"]

GATHER_S = 0.001
FULL_PAUSE_S = 0.05
GOODBYE_S = 5.0
"""How long a client that is closed tries to take back what it has on the queue."""


@dataclass
class _Pending:
    id: str
    as_json: bytes
    future: asyncio.Future[GenerationResult]
    sent: bool = False
    """On the queue, or was: if it isn't there now, it got lost."""


class Interactive:
    """The calls of one client as a run of its own, one request to a job.

    Their results are trimmed from the stream as they come. When the client dies the run expires.
    """

    def __init__(self, store: RunStore, reader: ResultReader, wait_when_full: bool) -> None:
        self._store = store
        self._reader = reader
        self._wait_when_full = wait_when_full
        self._run = f"calls-{uuid4().hex}"
        self._pending: dict[int, _Pending] = {}
        self._unsent: list[int] = []
        self._withdrawn: set[int] = set()
        self._closed = False
        self._is_open = False
        """The run is in Redis, or was."""
        self._next = 0
        self._opening = asyncio.Lock()
        self._receiver: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Enqueue the request and wait for its result.

        :raises ClientClosedError: closed, now or while it waits
        :raises InvalidRequestError: it can't be written as JSON
        :raises RequestTooLargeError: no job could hold it
        """
        if self._closed:
            raise ClientClosedError("the client is closed; make another one")
        # now, and not among the calls that it would share a round trip with
        as_json = request_json(request)
        if (error := too_large(as_json)) is not None:
            raise error
        loop = asyncio.get_running_loop()
        index, self._next = self._next, self._next + 1
        pending = self._pending[index] = _Pending(request.id, as_json, loop.create_future())
        if not self._unsent:
            loop.call_later(GATHER_S, self._start, self._send)
        self._unsent.append(index)
        try:
            return await pending.future
        except asyncio.CancelledError:
            self._withdrawn.add(index)
            self._start(self._withdraw, index)
            raise
        finally:
            self._pending.pop(index, None)

    def stop(self) -> None:
        """Give up on what is pending; its callers are told so."""
        self._closed = True
        self._withdrawn.update(self._pending)
        for index in self._pending:
            self._fail(index, ClientClosedError("the client was closed while the call waited"))

    async def close(self) -> None:
        """After `stop`, take back what is on the queue and forget the run."""
        tasks = [*self._background, *([self._receiver] if self._receiver else [])]
        await end(tasks)
        if self._is_open:
            with contextlib.suppress(BatchmillError, TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self._cancel(sorted(self._withdrawn))
                    await self._store.delete(self._run)

    def _start(self, work: Callable[..., Coroutine[None, None, None]], *args: int) -> None:
        if self._closed:
            return
        task = asyncio.create_task(work(*args))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _send(self) -> None:
        indexes, self._unsent = [i for i in self._unsent if i in self._pending], []
        try:
            await self._listen()
            await self._enqueue(indexes)
        except Exception as error:  # whoever waits has to hear of it, whatever it is
            for index in indexes:
                self._fail(index, error)

    async def _send_again(self, indexes: Sequence[int]) -> None:
        self._unsent += [i for i in indexes if i in self._pending]
        # in a task of its own: a full queue mustn't keep us from receiving
        self._start(self._send)

    async def _listen(self) -> None:
        async with self._opening:
            if self._receiver is None:
                await self._open(self._store)
                subscription = await self._reader.subscribe(self._run)
                self._receiver = asyncio.create_task(
                    self._receive(subscription), name="batchmill calls"
                )

    async def _open(self, store: RunStore) -> None:
        await store.open(self._run, queue=store.settings.queue, chunk_size=1)
        self._is_open = True

    async def _enqueue(self, indexes: Sequence[int]) -> None:
        template = self._store.template(self._store.settings.queue)
        while indexes := [i for i in indexes if i in self._pending]:
            calls = [
                template.call(
                    chunk_job_id(self._run, i),
                    self._run,
                    [(i, self._pending[i].as_json)],
                )
                for i in indexes
            ]
            returned = await self._store.enqueue(calls)
            for index, call, answer in zip(indexes, calls, returned, strict=True):
                if index in self._pending:
                    self._pending[index].sent = answer != QUEUE_FULL
                if answer == KEY_TAKEN:
                    self._refuse(index, key_taken(call))
            indexes = [i for i, r in zip(indexes, returned, strict=True) if r == QUEUE_FULL]
            if indexes and not self._wait_when_full:
                error = QueueFullError(f"queue {template.queue.name!r} is full; try again later")
                for index in indexes:
                    self._fail(index, error)
            elif indexes:
                await asyncio.sleep(FULL_PAUSE_S * random.uniform(0.5, 1.5))

    async def _receive(self, subscription: Subscription) -> None:
        reconcile_s = self._store.settings.reconcile_s
        hasty = self._store.within(0.0)
        sweeper = Reconciler(hasty, self._run, self._id_of, self._send_again)
        swept_at = time.monotonic()
        try:
            while True:
                entries = await subscription.take(reconcile_s)
                for _, index, raw in entries:
                    self._settle(index, raw)
                if entries:
                    await if_possible(hasty.trim(self._run, entries[-1][0]))
                if time.monotonic() - swept_at >= reconcile_s:
                    swept_at = time.monotonic()
                    if self._pending:
                        await if_possible(self._keep_alive(hasty, sweeper))
        except Exception as error:  # as above
            self._receiver = None
            for index in list(self._pending):
                self._fail(index, error)
        finally:
            subscription.close()

    async def _keep_alive(self, store: RunStore, sweeper: Reconciler) -> None:
        # a Redis that lost it takes no results for it
        await self._open(store)
        await sweeper.sweep([i for i, p in self._pending.items() if p.sent])

    def _settle(self, index: int, raw: bytes) -> None:
        pending = self._pending.get(index)
        if pending is None or pending.future.done():
            return
        pending.future.set_result(parse_result(self._run, index, raw))

    def _refuse(self, index: int, error: RequestError) -> None:
        """Give a call a result that says what was wrong with its request."""
        pending = self._pending.get(index)
        if pending is not None and not pending.future.done():
            failed = GenerationResult.failed(pending.id, error, run=self._run, index=index)
            pending.future.set_result(failed)

    def _fail(self, index: int, error: Exception) -> None:
        pending = self._pending.get(index)
        if pending is not None and not pending.future.done():
            pending.future.set_exception(error)

    def _id_of(self, index: int) -> str | None:
        pending = self._pending.get(index)
        return pending.id if pending else None

    async def _withdraw(self, index: int) -> None:
        with contextlib.suppress(BatchmillError):
            await self._cancel([index])
        self._withdrawn.discard(index)

    async def _cancel(self, indexes: Sequence[int]) -> None:
        if indexes and self._is_open:
            status = await self._store.status(self._run)
            await cancel_requests(self._store, status, indexes)
