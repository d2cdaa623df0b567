"""Results for requests that no job will answer any more, so that nobody waits for ever.

A worker answers every request that it can read. What remains: jobs in the dead letter, stopped
or cancelled with RQ's tools, deleted, or lost with a Redis that didn't keep them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from queue_api.store.jobs import (
    GenerateJob,
    JobPayloadError,
    chunk_job_id,
    decode_chunk,
    single_job_id,
)
from queue_api.store.run_store import CANCELLED, LEFT_TO_RQ, RunStore
from queue_api.store.runs import RunStatus
from queue_api.wire.schemas import ErrorDetail, FinishReason, GenerationResult

__all__ = ["Reconciler", "cancel_requests", "undone"]

logger = logging.getLogger(__name__)

_DEAD = {
    JobStatus.FAILED.value: "job_failed",
    JobStatus.STOPPED.value: "job_stopped",
    JobStatus.CANCELED.value: "cancelled",
}
# RQ's word for a job that ended well; if a request of it has no result, that was lost
_ENDED = {None, JobStatus.FINISHED.value}
LOST = "job_lost"
Resubmit = Callable[[Sequence[int]], Awaitable[None]]


@dataclass
class Reconciler:
    """Looks now and then for requests of one run that were left without a job."""

    store: RunStore
    run: str
    id_of: Callable[[int], str | None] = lambda _: None
    """The id of the request at an index, if this process knows it."""
    resubmit: Resubmit | None = None
    """Puts requests whose jobs vanished on the queue again; without it they end in an error."""
    _suspects: dict[int, str] = field(default_factory=dict)
    _resubmitted: set[int] = field(default_factory=set)

    async def sweep(self, indexes: Iterable[int] | None = None) -> int:
        """Emit an error for each of these requests (default: all) that no job will answer.

        A request has to look abandoned in two sweeps running: one look may fall between two
        steps of a worker. Returns how many look so now: 0 means that nothing is amiss.
        """
        status = await self.store.status(self.run)
        abandoned = await self._abandoned(status, await undone(self.store, status, indexes))
        certain = {i: code for i, code in abandoned.items() if self._suspects.get(i) == code}
        self._suspects = {i: code for i, code in abandoned.items() if i not in certain}
        if certain:
            await self._settle(status, certain)
        return len(abandoned)

    async def _abandoned(self, status: RunStatus, indexes: list[int]) -> dict[int, str]:
        chunks = sorted({index // status.chunk_size for index in indexes})
        states = await self._states(chunk_job_id(self.run, chunk) for chunk in chunks)
        by_chunk = dict(zip(chunks, states, strict=True))
        found = {i: by_chunk[i // status.chunk_size] for i in indexes}
        # read after the chunks: a worker splits a chunk into singles before it ends the chunk
        gone = [i for i, state in found.items() if state in _ENDED]
        singles = await self._states(single_job_id(self.run, index) for index in gone)
        found.update(
            {i: single for i, single in zip(gone, singles, strict=True) if single not in _ENDED}
        )
        return {
            index: _DEAD.get(state, LOST) if state is not None else LOST
            for index, state in found.items()
            if state in _ENDED or state in _DEAD
        }

    async def _states(self, job_ids: Iterable[str]) -> list[str | None]:
        rows = await self.store.job_fields(job_ids, "status")
        return [row[0].decode() if row[0] is not None else None for row in rows]

    async def _settle(self, status: RunStatus, abandoned: dict[int, str]) -> None:
        lost = [i for i, code in abandoned.items() if code == LOST and i not in self._resubmitted]
        if self.resubmit is not None and lost:
            logger.warning("run %s: %d requests lost their jobs; sent again", self.run, len(lost))
            self._resubmitted.update(lost)
            await self.resubmit(lost)
            abandoned = {i: code for i, code in abandoned.items() if i not in set(lost)}
        ids = await request_ids(self.store, status, abandoned, self.id_of)
        causes = await asyncio.to_thread(self._causes, status, abandoned)
        results = [
            GenerationResult.failed(
                ids[index],
                ErrorDetail(code=code, message=causes[index]),
                finish_reason=FinishReason.CANCELLED if code == "cancelled" else FinishReason.ERROR,
                run=self.run,
                index=index,
            )
            for index, code in abandoned.items()
        ]
        await self.store.emit(self.run, results)

    def _causes(self, status: RunStatus, abandoned: dict[int, str]) -> dict[int, str]:
        """Why, in words; the last line of the traceback that RQ kept for a failed job."""
        texts: dict[str, str] = {}
        causes = {}
        for index, code in abandoned.items():
            if code == LOST:
                causes[index] = "the request's job is gone and left no result; submit it again"
                continue
            if code == "cancelled":
                causes[index] = "the request's job was cancelled"
                continue
            chunk = chunk_job_id(self.run, index // status.chunk_size)
            for job_id in (single_job_id(self.run, index), chunk):
                if job_id not in texts:
                    texts[job_id] = self._last_words(job_id)
                if texts[job_id]:
                    causes[index] = texts[job_id]
                    break
            else:
                causes[index] = f"job {chunk} ended: {code}"
        return causes

    def _last_words(self, job_id: str) -> str:
        try:
            job = GenerateJob.fetch(job_id, self.store.rq_connection, serializer=JSONSerializer)
            latest = job.latest_result()
        except NoSuchJobError:
            return ""
        lines = ((latest and latest.exc_string) or "").strip().splitlines()
        return f"job {job_id} failed: {lines[-1][:1000]}" if lines else ""


async def undone(
    store: RunStore, status: RunStatus, indexes: Iterable[int] | None = None
) -> list[int]:
    """Which of these requests (default: all that were submitted) have no result."""
    done = await store.done(status.id)
    if indexes is not None:
        return [index for index in indexes if index not in done]
    return list(done.missing(status.submitted))


async def request_ids(
    store: RunStore,
    status: RunStatus,
    indexes: Iterable[int],
    id_of: Callable[[int], str | None] = lambda _: None,
) -> dict[int, str]:
    """The ids of these requests: known here, read from their jobs, else the index as text."""
    ids = {index: id_of(index) for index in indexes}
    chunks = sorted({index // status.chunk_size for index, known in ids.items() if known is None})
    await _read_ids(store, [chunk_job_id(status.id, chunk) for chunk in chunks], ids)
    # only of a chunk that is gone: there are as many singles as requests
    unknown = [index for index, known in ids.items() if known is None]
    await _read_ids(store, [single_job_id(status.id, index) for index in unknown], ids)
    return {index: known if known is not None else str(index) for index, known in ids.items()}


async def _read_ids(store: RunStore, job_ids: list[str], ids: dict[int, str | None]) -> None:
    for job_id, (data,) in zip(job_ids, await store.job_fields(job_ids, "data"), strict=True):
        for index, request in _items(job_id, data):
            if index in ids and ids[index] is None and isinstance(request, dict):
                ids[index] = str(request.get("id", index))


def _items(job_id: str, data: bytes | None) -> list[tuple[int, object]]:
    if data is None:
        return []
    try:
        return decode_chunk(job_id, data).items
    except JobPayloadError:
        return []


async def cancel_requests(
    store: RunStore,
    status: RunStatus,
    indexes: Sequence[int],
    id_of: Callable[[int], str | None] = lambda _: None,
) -> int:
    """End these requests with a `cancelled` result, then withdraw jobs that have nothing left.

    Returns how many were cancelled; the others had their result already.
    """
    ids = await request_ids(store, status, indexes, id_of)
    results = [
        GenerationResult.failed(
            ids[index],
            ErrorDetail(code="cancelled", message="cancelled by a client"),
            finish_reason=FinishReason.CANCELLED,
            run=status.id,
            index=index,
        )
        for index in indexes
    ]
    new = await store.emit(status.id, results)
    await _withdraw(store, status, indexes)
    return new


async def _withdraw(store: RunStore, status: RunStatus, indexes: Sequence[int]) -> None:
    """Cancel the jobs of these requests, unless they hold others that go on."""
    done = await store.done(status.id)
    size = status.chunk_size
    by_chunk: dict[int, list[int]] = {}
    for index in indexes:
        by_chunk.setdefault(index // size, []).append(index)
    over = {
        chunk: chunk_job_id(status.id, chunk)
        for chunk in sorted(by_chunk)
        if next(done.missing(min((chunk + 1) * size, status.submitted), chunk * size), None) is None
    }
    answers = await store.cancel_queued(status.queue, over.values())
    # a chunk that waited whole has no singles; read after the chunks: see _abandoned
    singles = [
        single_job_id(status.id, index)
        for chunk, inside in by_chunk.items()
        if answers.get(over.get(chunk, "")) != CANCELLED
        for index in inside
    ]
    answers |= await store.cancel_queued(status.queue, singles)
    left = [job_id for job_id, answer in answers.items() if answer == LEFT_TO_RQ]
    await asyncio.to_thread(_cancel_jobs, store, left)


def _cancel_jobs(store: RunStore, job_ids: Sequence[str]) -> None:
    """With RQ's own API: running jobs lose their lease, others leave what they wait in."""
    for job_id in job_ids:
        try:
            job = GenerateJob.fetch(job_id, store.rq_connection, serializer=JSONSerializer)
            job.cancel()
            # RQ keeps cancelled jobs for ever
            store.rq_connection.expire(job.key, store.settings.job_ttl_s)
        except (NoSuchJobError, InvalidJobOperation):
            continue
