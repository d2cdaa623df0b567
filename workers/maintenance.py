"""Housekeeping that RQ leaves to workers: abandoned jobs, registries, scheduled jobs.

All of it is RQ's own code, called often enough that a dead worker's jobs run again within two
lease times, and without forking: RQ's scheduler process would copy a loaded model.
"""

from __future__ import annotations

import logging
import time

import redis
from rq.registry import StartedJobRegistry
from rq.scheduler import RQScheduler
from rq.worker.base import BaseWorker

from queue_api.jobs import GenerateJob
from workers.settings import WorkerSettings

__all__ = ["Maintenance"]

logger = logging.getLogger(__name__)

SCHEDULER_S = 1.0
LOCKS_S = 15.0
"""How often to try for the scheduler locks of a worker that died."""


class Maintenance:
    """What one worker does of it; to be called from one thread."""

    def __init__(
        self, worker: BaseWorker, connection: redis.Redis, settings: WorkerSettings
    ) -> None:
        self._worker = worker
        self._connection = connection
        self._reclaim_s = settings.lease_s / 2
        self._next_reclaim = 0.0
        self._next_locks = 0.0
        self._scheduler: RQScheduler | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between two ticks."""
        return min(SCHEDULER_S, self._reclaim_s)

    def postpone(self) -> None:
        """After an outage, give everyone time to renew leases before taking them for dead."""
        self._next_reclaim = time.monotonic() + self._reclaim_s

    def tick(self) -> None:
        """Do what is due."""
        self._enqueue_scheduled()
        if time.monotonic() >= self._next_reclaim:
            self._next_reclaim = time.monotonic() + self._reclaim_s
            self._reclaim()
        if self._worker.should_run_maintenance_tasks:
            self._worker.run_maintenance_tasks()

    def _reclaim(self) -> None:
        """Retry or fail the jobs whose worker has let their leases run out."""
        for queue in self._worker.queues:
            registry = StartedJobRegistry(
                queue.name,
                self._connection,
                job_class=GenerateJob,
                serializer=self._worker.serializer,
            )
            if queue.acquire_maintenance_lock():
                try:
                    registry.cleanup()
                finally:
                    queue.release_maintenance_lock()

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

    def close(self) -> None:
        """Let others schedule."""
        if self._scheduler is not None:
            self._scheduler.stop()
