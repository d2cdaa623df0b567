"""Numbered requests of one run onto the queue, a chunk to a job."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence

from queue_api.store.bitmap import Bitmap
from queue_api.store.cancel import cancel_requests
from queue_api.store.enqueue import KEY_TAKEN, QUEUE_FULL, EnqueueCall, key_taken
from queue_api.store.jobs import (
    chunk_job_id,
    fit_together,
    request_json,
    single_job_id,
    too_large,
)
from queue_api.store.run_store import RunStore
from queue_api.store.undone import undone
from queue_api.wire.errors import QueueFullError
from queue_api.wire.schemas import GenerationRequest, GenerationResult

__all__ = ["ChunkWriter"]

ENQUEUE_AT_ONCE = 512
"""Requests to one round trip."""
BYTES_AT_ONCE = 32 * 2**20
"""The same in bytes of requests, before they are compressed."""
LINGER_S = 0.05
"""Full chunks wait so long for more of their kind."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0


class ChunkWriter:
    """Takes requests in the order of their indexes, and enqueues what is neither done nor alive.

    Chunks are fixed ranges of indexes, so that whoever knows an index knows its job, and doing it
    all again after a crash makes the same jobs. The requests of a chunk that together are too large
    for a job get one each, as a worker gives them that splits a chunk.
    """

    def __init__(
        self,
        store: RunStore,
        run: str,
        *,
        queue: str,
        chunk_size: int,
        done: Bitmap,
        submitted: int = 0,
        wait_when_full: bool = True,
        job_ttl_s: int | None = None,
        fingerprint: str = "",
        num_lanes: int = 0,
    ) -> None:
        """:param num_lanes: a worker goes on with every so manieth chunk, if it can; 0: with any"""
        self._store = store
        self._run = run
        self._template = store.template(queue, job_ttl_s)
        self._fingerprint = fingerprint
        self._num_lanes = num_lanes
        self._chunk_size = chunk_size
        self._done = done
        self._wait_when_full = wait_when_full
        self._chunk: list[tuple[int, bytes]] = []
        self._calls: list[EnqueueCall] = []
        self._results: list[GenerationResult] = []
        self._waiting = 0
        self._bytes = 0
        self._end = 0
        self._flushed_at = 0.0
        self._submitted_before = submitted
        self.submitted = 0
        """Requests below this index are on the queue or have ended."""

    async def put(
        self, index: int, item: GenerationRequest | GenerationResult, as_json: bytes | None = None
    ) -> None:
        """Take the next request, or what became of it already, and send what is due.

        :param as_json: as of `add`
        :raises QueueFullError: unless it is to wait; to go on, submit the run again
        """
        if self.add(index, item, as_json):
            await self.flush()

    def add(
        self, index: int, item: GenerationRequest | GenerationResult, as_json: bytes | None = None
    ) -> bool:
        """Take the next request; True if it is time to `flush`.

        :param as_json: the request in that form, if the caller has it
        """
        if self._chunk and self._chunk[0][0] // self._chunk_size != index // self._chunk_size:
            self._seal()
        self._end = index + 1
        if index not in self._done:
            self._waiting += 1
            if isinstance(item, GenerationRequest):
                self._take(index, item, as_json or request_json(item))
            else:
                self._results.append(item)
        if (index + 1) % self._chunk_size:
            return False
        is_much = self._waiting >= ENQUEUE_AT_ONCE or self._bytes >= BYTES_AT_ONCE
        return is_much or time.monotonic() - self._flushed_at > LINGER_S

    def _take(self, index: int, item: GenerationRequest, as_json: bytes) -> None:
        self._bytes += len(as_json)
        if (error := too_large(as_json)) is None:
            self._chunk.append((index, as_json))
        else:
            failed = GenerationResult.failed(item.id, error, run=self._run, index=index)
            self._results.append(failed)

    def skip(self, index: int) -> None:
        """Pass over a request that somebody knows to be done."""
        self._end = index + 1

    async def again(self, items: Sequence[tuple[int, GenerationRequest]]) -> None:
        """Enqueue requests whose jobs are gone once more; doesn't wait for a Redis that refuses."""
        chunks: dict[int, list[tuple[int, bytes]]] = {}
        for index, request in items:
            chunks.setdefault(index // self._chunk_size, []).append((index, request_json(request)))
        await self._enqueue(
            [c for number, chunk in chunks.items() for c in self._jobs(number, chunk)],
            self._store.within(0.0),
        )

    async def flush(self) -> None:
        """Send what has been taken. Only the last chunk of a run may be sent while it isn't full:
        more of it couldn't be sent before it has ended."""
        self._seal()
        calls, self._calls = self._calls, []
        results, self._results = self._results, []
        self._waiting = self._bytes = 0
        await self._enqueue(calls, self._store)
        await self._store.emit(self._run, results)
        self._flushed_at = time.monotonic()
        self.submitted = self._end
        # an earlier life of the run may have come further
        await self._store.set(self._run, submitted=max(self._end, self._submitted_before))
        # in this order: either we see that the run is cancelled, or who cancels sees our requests
        status = await self._store.status(self._run)
        if status.cancelled:
            await cancel_requests(self._store, status, await undone(self._store, status))

    def _seal(self) -> None:
        if self._chunk:
            self._calls += self._jobs(self._chunk[0][0] // self._chunk_size, self._chunk)
            self._chunk = []

    def _jobs(self, number: int, chunk: list[tuple[int, bytes]]) -> Iterator[EnqueueCall]:
        """What enqueues these requests of a chunk."""
        if fit_together([as_json for _, as_json in chunk]):
            yield self._call(chunk_job_id(self._run, number), chunk)
            return
        for index, as_json in chunk:
            job_id = single_job_id(self._run, index)
            yield self._call(job_id, [(index, as_json)])

    def _call(self, job_id: str, items: list[tuple[int, bytes]]) -> EnqueueCall:
        lane = ""
        if self._num_lanes:
            lane = f"{self._run}/{items[0][0] // self._chunk_size % self._num_lanes}"
        return self._template.call(
            job_id, self._run, items, fingerprint=self._fingerprint, lane=lane
        )

    def _without_job(self, call: EnqueueCall) -> Iterator[GenerationResult]:
        """Results of requests whose job's key is somebody else's."""
        error = key_taken(call)
        for index, as_json in call.items:
            request = json.loads(as_json)
            metadata = request.get("metadata", {})
            yield GenerationResult.failed(
                request["id"], error, run=self._run, index=index, metadata=metadata
            )

    async def _enqueue(self, calls: Sequence[EnqueueCall], store: RunStore) -> None:
        pause_s = FIRST_PAUSE_S
        while calls:
            returned = await store.enqueue(calls)
            taken = [c for c, r in zip(calls, returned, strict=True) if r == KEY_TAKEN]
            await store.emit(self._run, [r for call in taken for r in self._without_job(call)])
            calls = [c for c, r in zip(calls, returned, strict=True) if r == QUEUE_FULL]
            if not calls:
                return
            if not self._wait_when_full:
                raise QueueFullError(
                    f"queue {self._template.queue.name!r} holds its limit of "
                    f"{self._store.settings.max_queue} jobs (BATCHMILL_MAX_QUEUE); submit run "
                    f"{self._run!r} again later, what it has so far isn't made twice"
                )
            # spread out, so that producers that wait don't all come back at once
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
