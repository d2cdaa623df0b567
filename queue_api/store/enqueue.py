"""Chunks to RQ jobs, many at a time: the arguments of enqueue.lua."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import redis
from rq.job import JobStatus, Retry
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from queue_api.connection.settings import QueueSettings
from queue_api.store.jobs import (
    BATCH_SIZE_FIELD,
    GENERATE,
    LANE_FIELD,
    MAX_RETRIES_FIELD,
    RUN_FINGERPRINT_FIELD,
    GenerateJob,
    GenerateQueue,
    chunk_payload,
)
from queue_api.store.keys import failed_key
from queue_api.wire.errors import JobKeyTakenError

__all__ = ["ENQUEUED", "KEY_TAKEN", "QUEUE_FULL", "EnqueueCall", "JobTemplate", "key_taken"]

ENQUEUED, ALREADY_ALIVE, QUEUE_FULL, KEY_TAKEN = 1, 0, -1, -2
"""What enqueue.lua returns."""


class EnqueueCall(NamedTuple):
    """One call of enqueue.lua."""

    keys: list[str]
    args: list[Any]
    items: Sequence[tuple[int, bytes]]
    """What the job holds: (index in the run, request as JSON)."""


def key_taken(call: EnqueueCall) -> JobKeyTakenError:
    """What is to be said of each request of a job that Redis has no place for."""
    return JobKeyTakenError(
        f"Redis holds somebody's key of another type as {call.keys[0]!r}, where the request's job "
        "would be; remove or rename that key, then submit the request again"
    )


class JobTemplate:
    """Makes jobs of one queue that differ in their requests alone.

    RQ lays out the first job's hash; the others copy it. That is an order of magnitude faster
    than an RQ job object each, and stays true to RQ's layout without knowing it.
    """

    def __init__(self, connection: redis.Redis, queue: str, settings: QueueSettings) -> None:
        self.queue = GenerateQueue(queue, connection=connection, serializer=JSONSerializer)
        self._limit = settings.max_queue
        job = GenerateJob.create(
            GENERATE,
            kwargs={},
            connection=connection,
            serializer=JSONSerializer,
            status=JobStatus.QUEUED,
            origin=queue,
            # the worker watches over each request; a time limit for the whole chunk would
            # punish the rest for the slowest
            timeout=-1,
            result_ttl=settings.job_ttl_s,
            failure_ttl=settings.run_ttl_s,
            retry=Retry(max=settings.retries) if settings.retries else None,
        )
        self._fields: Mapping[str, Any] = {**job.to_dict(), MAX_RETRIES_FIELD: settings.retries}

    def call(
        self,
        job_id: str,
        run: str,
        items: Sequence[tuple[int, bytes]],
        *,
        at_front: bool = False,
        fingerprint: str = "",
        lane: str = "",
    ) -> EnqueueCall:
        """Enqueue these requests of the run as the job of that id.

        :param items: (index in the run, request as JSON)
        :param fingerprint: tells the run from others that had its name before
        :param lane: a worker that took a job of it goes on with others of it, if it can
        """
        time = utcformat(now())
        payload = chunk_payload(run, items)
        fields = {
            **self._fields,
            "data": zlib.compress(payload, 1),
            "created_at": time,
            "enqueued_at": time,
            "description": f"{GENERATE} {run} {items[0][0]}-{items[-1][0]}",
            BATCH_SIZE_FIELD: len(items),
        }
        if fingerprint:
            fields[RUN_FINGERPRINT_FIELD] = fingerprint
        if lane:
            fields[LANE_FIELD] = lane
        keys = [
            GenerateJob.key_for(job_id),
            self.queue.key,
            GenerateQueue.redis_queues_keys,
            failed_key(self.queue.name),
        ]
        args: list[Any] = [job_id, "LPUSH" if at_front else "RPUSH", self._limit]
        args.append(fingerprint)
        for field, value in fields.items():
            args += (field, value)
        return EnqueueCall(keys, args, items)
