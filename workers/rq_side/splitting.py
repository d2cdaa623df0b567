"""Takes requests out of a chunk into jobs of their own, so that one can't harm the others.

Each single inherits the chunk's retries, times to live and history. Its id follows from run and
index, so a split that was interrupted can be done again: what is alive already is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import redis
from redis.client import Pipeline
from rq.job import Job, JobStatus
from rq.job_lifecycle import record_job_failure
from rq.queue import Queue

from queue_api.connection.failures import raise_unless_key
from queue_api.store.jobs import (
    BATCH_SIZE_FIELD,
    GENERATE,
    MAX_RETRIES_FIELD,
    GenerateJob,
    single_job_id,
)
from workers.leases import Lease
from workers.running.active import Because

__all__ = ["split_off"]

logger = logging.getLogger(__name__)

ALIVE = {b"queued", b"started", b"scheduled", b"deferred"}


def split_off(
    connection: redis.Redis,
    queue: Queue,
    lease: Lease,
    *,
    run: str,
    requests: Mapping[int, tuple[object, str]],
    because: Because,
) -> None:
    """Give each of these requests a job of its own.

    :param requests: by index, the request as JSON value and why it failed
    """
    parent = GenerateJob.fetch(lease.job_id, connection, queue.serializer)
    ids = {index: single_job_id(run, index) for index in requests}
    unfree = _unfree(connection, list(ids.values()))
    with connection.pipeline() as pipeline:
        for index, (request, reason) in requests.items():
            if ids[index] in unfree:
                continue
            single = _single(parent, ids[index], {"run": run, "requests": [[index, request]]})
            single.origin = lease.queue
            fields = _inherited(lease, because)
            if because is Because.SUSPECT:
                queue._enqueue_job(single, pipeline=pipeline, at_front=True)
            elif because is Because.FAILED:
                single.retry(queue, pipeline)
            else:
                fields |= {"claims": lease.number("claims", 1)}
                record_job_failure(single, reason, pipeline)
            pipeline.hset(single.key, mapping=fields)  # type: ignore[arg-type]
        pipeline.execute()
    logger.info("job %s: %d requests split off: %s", lease.job_id, len(ids), because.value)


def _unfree(connection: redis.Redis, job_ids: Sequence[str]) -> set[str]:
    """Those that are alive already, or whose key is somebody's of another type: nobody runs their
    requests, which whoever reads the run will find without a job."""
    pipeline: Pipeline = connection.pipeline(transaction=False)
    for job_id in job_ids:
        pipeline.hget(GenerateJob.key_for(job_id), "status")
    statuses = pipeline.execute(raise_on_error=False)
    raise_unless_key(statuses)
    found = set()
    for job_id, status in zip(job_ids, statuses, strict=True):
        if isinstance(status, Exception):
            logger.error("job %s can't be made: %s", job_id, status)
        if isinstance(status, Exception) or status in ALIVE:
            found.add(job_id)
    return found


def _single(parent: Job, job_id: str, kwargs: dict[str, object]) -> Job:
    single = GenerateJob.create(
        GENERATE,
        kwargs=kwargs,
        id=job_id,
        connection=parent.connection,
        serializer=parent.serializer,
        status=JobStatus.CREATED,
        result_ttl=parent.result_ttl,
        failure_ttl=parent.failure_ttl,
        description=f"{GENERATE} {job_id}",
    )
    single.timeout = parent.timeout
    single.retries_left = parent.retries_left
    single.retry_intervals = parent.retry_intervals
    single.enqueue_at_front_on_retry = parent.enqueue_at_front_on_retry
    return single


def _inherited(lease: Lease, because: Because) -> dict[str, int]:
    # the claim that only split a suspect chunk ran nothing: it isn't an attempt
    spent = 1 if because is Because.SUSPECT else 0
    return {
        BATCH_SIZE_FIELD: 1,
        MAX_RETRIES_FIELD: lease.number(MAX_RETRIES_FIELD, 0),
        "claims": lease.number("claims", 1) - spent,
        "released": lease.number("released", 0),
        "deaths": lease.number("deaths", 0),
    }
