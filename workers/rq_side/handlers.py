"""The rare ends of a job, through RQ's own handlers: failure, retry, stop, dependents.

They are synchronous and cost many round trips, so they run in a thread of their own and only
for what the scripts leave alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

import redis
from rq.defaults import DEFAULT_FAILURE_TTL
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.utils import current_timestamp, now
from rq.worker.base import BaseWorker

from queue_api.connection.failures import (
    REDIS_ERRORS,
    Failure,
    failure_of,
    raise_unless_key,
)
from queue_api.store.jobs import GenerateJob
from workers.leases import Lease
from workers.rq_side.splitting import split_off
from workers.running.active import Because

__all__ = ["RQHandlers"]

logger = logging.getLogger(__name__)


class RQHandlers:
    """RQ's handlers for one worker; to be called from one thread."""

    def __init__(self, worker: BaseWorker, connection: redis.Redis) -> None:
        self._worker = worker
        self._connection = connection

    def succeed(self, lease: Lease, return_value: bytes) -> None:
        """End a job with success, with all that RQ hangs on it."""
        if (job := self._held(lease)) is None:
            return
        job._result = json.loads(return_value)
        queue = self._queue(lease)
        with self._burying(lease):
            self._worker.handle_job_success(
                job, queue, queue.started_job_registry, self._execution(lease)
            )

    def fail(self, lease: Lease, reason: str, *, may_retry: bool) -> None:
        """End a job as failed, or enqueue it again if it has retries left."""
        self._end_badly(lease, reason, may_retry=may_retry, stopped=False)

    def split(
        self,
        lease: Lease,
        *,
        run: str,
        requests: Mapping[int, tuple[object, str]],
        because: Because,
    ) -> None:
        """Give requests of a chunk jobs of their own; see split_off."""
        if self._held(lease) is None:
            return
        with self._burying(lease):
            split_off(
                self._connection,
                self._queue(lease),
                lease,
                run=run,
                requests=requests,
                because=because,
            )

    def stop(self, lease: Lease) -> None:
        """End a job that was stopped by a command; such a job isn't retried."""
        self._end_badly(lease, "stopped by command", may_retry=False, stopped=True)

    def _end_badly(self, lease: Lease, reason: str, *, may_retry: bool, stopped: bool) -> None:
        if (job := self._held(lease)) is None:
            return
        if not may_retry:
            job.retries_left = None
        self._worker._stopped_job_id = job.id if stopped else None
        with self._burying(lease):
            for _ in range(2):
                self._worker.handle_job_failure(
                    job, self._queue(lease), exc_string=reason, execution=self._execution(lease)
                )
                if not self._is_held(lease):
                    return
                # RQ logs what kept it from writing that, and goes on: is it Redis, or the job?
                self._worker.heartbeat()
            self._bury(lease, reason)

    def _is_held(self, lease: Lease) -> bool:
        return self._connection.zscore(_registry_key(lease), lease.composite) is not None

    def _held(self, lease: Lease) -> Job | None:
        """The job as it stands now, if its lease is still ours and it can be read."""
        if not self._is_held(lease):
            logger.info("job %s ended here, but its lease was lost", lease.job_id)
            return None
        try:
            job = GenerateJob.fetch(lease.job_id, self._connection, self._worker.serializer)
        except Exception as error:  # whatever somebody wrote into the hash
            _raise_if_not_the_jobs(error)
            logger.warning("job %s can't be read by RQ: %s", lease.job_id, error)
            self._bury(lease, f"not a job that RQ can read: {error}")
            return None
        job.origin = lease.queue
        job.started_at = datetime.fromtimestamp(lease.claimed_at, tz=UTC)
        job.ended_at = now()
        return job

    @contextmanager
    def _burying(self, lease: Lease) -> Iterator[None]:
        """What RQ's handlers raise, over a hash that somebody filled oddly, fails that job."""
        try:
            yield
        except Exception as error:
            _raise_if_not_the_jobs(error)
            logger.exception("job %s: RQ's handler failed", lease.job_id)
            self._bury(lease, f"RQ's handler failed: {type(error).__name__}: {error}")

    def _bury(self, lease: Lease, reason: str) -> None:
        """Make a job failed that RQ's handlers can't cope with."""
        execution = self._execution(lease)
        is_job = self._connection.type(GenerateJob.key_for(lease.job_id)) in (b"hash", b"none")
        with self._connection.pipeline() as pipeline:
            pipeline.zrem(_registry_key(lease), lease.composite)
            pipeline.delete(execution.key)
            pipeline.srem(execution.worker_executions_key, lease.composite)
            if is_job:  # else it is somebody's key of another type, which stays as it is
                pipeline.hset(
                    GenerateJob.key_for(lease.job_id),
                    mapping={"status": JobStatus.FAILED.value, "exc_info": reason},
                )
                pipeline.expire(GenerateJob.key_for(lease.job_id), DEFAULT_FAILURE_TTL)
                failed = FailedJobRegistry.key_template.format(lease.queue)
                pipeline.zadd(failed, {lease.job_id: current_timestamp() + DEFAULT_FAILURE_TTL})
            raise_unless_key(pipeline.execute(raise_on_error=False))

    def _queue(self, lease: Lease) -> Queue:
        return next(queue for queue in self._worker.queues if queue.name == lease.queue)

    def _execution(self, lease: Lease) -> Execution:
        execution = Execution(lease.execution_id, lease.job_id, self._connection, self._worker.name)
        execution.created_at = datetime.fromtimestamp(lease.claimed_at, tz=UTC)
        return execution


def _registry_key(lease: Lease) -> str:
    return StartedJobRegistry.key_template.format(lease.queue)


def _raise_if_not_the_jobs(error: Exception) -> None:
    """Raise on what Redis says of more than this job; the job isn't to be blamed for it."""
    if isinstance(error, REDIS_ERRORS) and failure_of(error) is not Failure.KEY:
        raise error
