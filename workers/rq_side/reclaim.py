"""Jobs whose worker died go back on their queue; what keeps killing workers is quarantined."""

from __future__ import annotations

import logging
import time

import redis
from rq.queue import Queue
from rq.registry import StartedJobRegistry

from queue_api.connection.failures import Failure, failure_of
from queue_api.store.jobs import GenerateJob, JobPayloadError, decode_chunk
from queue_api.store.keys import RQ_KEY_PREFIX, RunKeys
from queue_api.store.runs import emit_args
from queue_api.store.scripts import load_script
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import ErrorDetail, GenerationResult
from workers.leases import Lease
from workers.rq_side.handlers import RQHandlers
from workers.running.outcomes import request_id, request_metadata
from workers.scripts import load_worker_script

__all__ = ["Reclaimer"]

logger = logging.getLogger(__name__)

MOST_JOBS_PER_CALL = 128
QUARANTINED = "quarantined"


class Reclaimer:
    """Looks for leases that have run out; to be called from one thread.

    :param most_deaths: a job that so many workers died holding, the last time with nothing
        else to hold, goes to the dead letter
    """

    def __init__(
        self,
        connection: redis.Redis,
        handlers: RQHandlers,
        *,
        most_deaths: int,
        run_ttl_s: int,
    ) -> None:
        self._connection = connection
        self._handlers = handlers
        self._most_deaths = most_deaths
        self._run_ttl_s = run_ttl_s
        self._reclaim = connection.register_script(load_worker_script("reclaim"))
        self._emit = connection.register_script(load_script("emit"))

    def reclaim(self, queue: Queue, before: float = float("inf")) -> int:
        """Deal with every job of the queue that nobody holds any more; returns how many.

        :param before: does nothing once the server's clock is there (epoch seconds)
        """
        keys = [StartedJobRegistry.key_template.format(queue.name), queue.key]
        args: list[str | int] = [
            RQ_KEY_PREFIX,
            self._most_deaths,
            alone_after(self._most_deaths),
            MOST_JOBS_PER_CALL,
            str(before),
        ]
        total = 0
        while True:
            reply = self._reclaim(keys, args)
            returned, culprits = reply[0], reply[1:]
            for job_id, execution_id in zip(culprits[::2], culprits[1::2], strict=True):
                self._quarantine(queue, job_id.decode(), execution_id.decode())
            found = returned + len(culprits) // 2
            if returned:
                logger.warning("queue %s: %d abandoned jobs run again", queue.name, returned)
            if not found:
                return total
            total += found

    def _quarantine(self, queue: Queue, job_id: str, execution_id: str) -> None:
        reason = (
            f"{self._most_deaths} workers died holding this job, the last one while it had no "
            "other; it isn't tried again"
        )
        logger.error("job %s is quarantined: %s", job_id, reason)
        fields: dict[bytes, bytes] = self._connection.hgetall(GenerateJob.key_for(job_id))  # type: ignore[assignment]
        lease = Lease(
            job_id,
            execution_id,
            queue.name,
            {name.decode(errors="replace"): value for name, value in fields.items()},
            time.time(),
        )
        self._tell_run(lease, ErrorDetail(code=QUARANTINED, message=reason))
        self._handlers.fail(lease, reason, may_retry=False)

    def _tell_run(self, lease: Lease, error: ErrorDetail) -> None:
        try:
            chunk = decode_chunk(lease.job_id, lease.fields.get("data", b""))
        except (JobPayloadError, InvalidRequestError):
            return
        if chunk.run is None:
            return
        results = [
            GenerationResult.failed(
                request_id(item, f"{lease.job_id}-{index}"),
                error,
                run=chunk.run,
                index=index,
                attempt=lease.attempt,
                metadata=request_metadata(item),
            )
            for index, item in chunk.items
        ]
        try:
            self._emit(RunKeys.of(chunk.run), emit_args(results, self._run_ttl_s))
        except redis.RedisError as error_:
            if failure_of(error_) is not Failure.KEY:
                raise
            logger.error("results of run %s can't be written: %s", chunk.run, error_)


def alone_after(most_deaths: int) -> int:
    """The deaths after which a job runs with nothing beside it: one before the last."""
    return max(1, most_deaths - 1)
