"""Ending requests with `cancelled` results, and withdrawing the jobs that hold nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

import redis
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.serializers import JSONSerializer

from queue_api.connection.failures import raise_unless_key
from queue_api.store.bitmap import Bitmap
from queue_api.store.jobs import GenerateJob, chunk_job_id, single_job_id
from queue_api.store.run_store import CANCELLED, LEFT_TO_RQ, RunStore
from queue_api.store.runs import RunStatus
from queue_api.store.undone import pages, request_ids
from queue_api.wire.schemas import ErrorDetail, FinishReason, GenerationResult

__all__ = ["cancel_requests"]

logger = logging.getLogger(__name__)

REQUESTS_AT_ONCE = 1024
"""Bounds memory, and how long an event loop is kept from its other work."""


async def cancel_requests(
    store: RunStore,
    status: RunStatus,
    indexes: Iterable[int],
    id_of: Callable[[int], str | None] = lambda _: None,
) -> int:
    """End these requests with a `cancelled` result, then withdraw jobs that have nothing left.

    Returns how many were cancelled; the others had their result already.

    :param indexes: rising
    """
    done, new = await store.done(status.id), 0
    for page in pages(indexes, status.chunk_size, REQUESTS_AT_ONCE):
        ids = await request_ids(store, status, page, id_of)
        new += await store.emit(status.id, [_cancelled(status.id, i, ids[i]) for i in page])
        for index in page:
            done.add(index)
        await _withdraw(store, status, page, done)
    return new


def _cancelled(run: str, index: int, request_id: str) -> GenerationResult:
    return GenerationResult.failed(
        request_id,
        ErrorDetail(code="cancelled", message="cancelled by a client"),
        finish_reason=FinishReason.CANCELLED,
        run=run,
        index=index,
    )


async def _withdraw(
    store: RunStore, status: RunStatus, indexes: Sequence[int], done: Bitmap
) -> None:
    """Cancel the jobs of these requests, unless they hold others that go on."""
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
    # a chunk that waited whole has no singles; read after the chunks, since a worker splits a chunk
    # before it ends it
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
        except redis.ResponseError as error:
            # somebody's key of another type where RQ has its own: this job runs on, its results are
            # in already
            raise_unless_key([error])
            logger.warning("job %s can't be cancelled: %s", job_id, error)
