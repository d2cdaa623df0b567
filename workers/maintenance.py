"""Housekeeping that RQ leaves to workers: abandoned jobs, registries, scheduled jobs.

All of it is RQ's own code, called often enough that a dead worker's jobs run again within two
lease times, and without forking: RQ's scheduler process would copy a loaded model.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

import redis
from rq import worker_registration
from rq.rate_limit import RateLimitRegistry
from rq.registry import ReadyJobRegistry
from rq.scheduler import RQScheduler
from rq.utils import now
from rq.worker.base import BaseWorker

from queue_api.connection.failures import Failure, failure_of
from queue_api.store.jobs import GenerateJob
from workers.rq_side.reclaim import Reclaimer
from workers.settings import WorkerSettings

__all__ = ["Maintenance"]

logger = logging.getLogger(__name__)

SCHEDULER_S = 1.0
LOCKS_S = 15.0
"""How often to try for the scheduler locks of a worker that died."""


class Maintenance:
    """One worker's share of it; to be called from one thread."""

    def __init__(
        self,
        worker: BaseWorker,
        connection: redis.Redis,
        reclaimer: Reclaimer,
        settings: WorkerSettings,
    ) -> None:
        self._worker = worker
        self._connection = connection
        self._reclaimer = reclaimer
        self._reclaim_s = settings.lease_s / 2
        self._timeout_s = settings.redis_timeout_s
        # not at once: if Redis has just come back, everyone else is about to renew their leases
        self._next_reclaim = time.monotonic() + self._reclaim_s
        self._next_locks = 0.0
        self._scheduler: RQScheduler | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between two ticks."""
        return min(SCHEDULER_S, self._reclaim_s)

    def postpone(self) -> None:
        """After an outage, give everyone time to renew leases before taking them for dead.

        It may go on for a timeout more before the next try tells.
        """
        self._next_reclaim = time.monotonic() + self._timeout_s + self._reclaim_s

    def tick(self) -> None:
        """Do what is due."""
        _unless_a_key_is_odd(self._enqueue_scheduled)
        if time.monotonic() >= self._next_reclaim:
            self._next_reclaim = time.monotonic() + self._reclaim_s
            self.reclaim()
        if self._worker.should_run_maintenance_tasks:
            _unless_a_key_is_odd(self._clean_registries)

    def reclaim(self) -> None:
        """Take over the jobs whose worker has let their leases run out.

        Without RQ's maintenance lock: the script needs none, and a worker that stands still while
        it holds the lock mustn't keep the others from its jobs.

        If Redis stood still, the leases of all ran out, and it mustn't be asked before they had a
        chance to renew them: neither by a request sent now nor by one that was on its way.
        """
        asked_at = time.monotonic()
        seconds, micros = self._connection.time()
        if (still_s := time.monotonic() - asked_at) > self._timeout_s / 2:
            logger.warning("Redis stood still for %.1f s; leases are given time", still_s)
            self.postpone()
            return
        for queue in self._worker.queues:
            before = seconds + micros / 1e6 + self._timeout_s / 2
            _unless_a_key_is_odd(functools.partial(self._reclaimer.reclaim, queue, before))

    def _clean_registries(self) -> None:
        """What RQ's workers do now and then, but for abandoned jobs: those are reclaimed."""
        for queue in self._worker.queues:
            if queue.acquire_maintenance_lock():
                try:
                    for registry in (
                        queue.finished_job_registry,
                        queue.failed_job_registry,
                        queue.deferred_job_registry,
                        ReadyJobRegistry(queue=queue, job_class=GenerateJob),
                        *RateLimitRegistry.all(self._connection),
                    ):
                        registry.cleanup()
                    worker_registration.clean_worker_registry(queue)
                    queue.intermediate_queue.cleanup(self._worker, queue)
                finally:
                    queue.release_maintenance_lock()
        self._worker.clean_group_registries()
        self._worker.last_cleaned_at = now()  # type: ignore[assignment]

    def _enqueue_scheduled(self) -> None:
        if self._scheduler is None:
            self._scheduler = RQScheduler(
                self._worker.queues,
                self._connection,
                logging_level=logger.getEffectiveLevel(),
                serializer=self._worker.serializer,
            )
            self._scheduler.register_birth()
        if time.monotonic() >= self._next_locks:
            self._next_locks = time.monotonic() + LOCKS_S
            self._scheduler.acquire_locks()
        self._scheduler.heartbeat()
        self._scheduler.enqueue_scheduled_jobs()

    def register_again(self) -> None:
        """RQ forgot the worker, because it or Redis stood still for long."""
        worker = self._worker
        logger.warning("worker %s registers again", worker.name)
        with self._connection.pipeline() as pipeline:
            pipeline.hset(worker.key, mapping=worker.serialize())
            worker_registration.register(worker, pipeline)
            pipeline.execute()

    def close(self) -> None:
        """Let others schedule."""
        if self._scheduler is not None:
            self._scheduler.stop()


def _unless_a_key_is_odd(act: Callable[[], object]) -> None:
    """What fails over one key, such as one of another type, leaves the rest to be done."""
    try:
        act()
    except redis.RedisError as error:
        if failure_of(error) is not Failure.KEY:
            raise
        logger.error("maintenance: %s", error)
