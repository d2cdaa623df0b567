"""A batchmill worker: one engine and, to RQ and its tools, one more RQ worker."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import time
from typing import Any
from uuid import uuid4

import redis
from rq.worker.base import BaseWorker

from queue_api.connection.connect import ServerInfo, check_server, connect
from queue_api.connection.failures import REDIS_ERRORS, friendly, is_answer, is_passing
from queue_api.store.jobs import GenerateJob, GenerateQueue
from queue_api.store.keys import MODEL_FIELD
from workers.maintenance import Maintenance
from workers.patience import OUTAGE_S
from workers.rq_side.handlers import RQHandlers
from workers.rq_side.process_identity import own_identity
from workers.rq_side.reclaim import Reclaimer
from workers.rq_side.registration import PROCESS, register, warn_of_others
from workers.running.engine_loop import Engine
from workers.running.engines import load_engine
from workers.service import Service
from workers.settings import WorkerSettings

__all__ = ["BatchWorker", "run_worker"]

logger = logging.getLogger(__name__)

COLLECT_AFTER = 20_000
"""New objects after which the garbage collector looks at them."""


class BatchWorker(BaseWorker):
    """An RQ worker that runs many jobs at a time through one engine.

    RQ sees its usual worker: registration, heartbeats, state, executions, commands. Jobs are
    claimed and finished by scripts; what is rare goes through RQ's own handlers.
    """

    job_class = GenerateJob
    queue_class = GenerateQueue
    log_job_description = False

    def __init__(self, settings: WorkerSettings, engine: Engine, connection: redis.Redis) -> None:
        name = settings.name or f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:4]}"
        super().__init__(
            list(dict.fromkeys(settings.queues)),
            name=name,
            connection=connection,
            serializer="json",
            worker_ttl=int(2 * settings.lease_s),
        )
        self._settings = settings
        self._engine = engine
        self._handlers = RQHandlers(self, connection)
        reclaimer = Reclaimer(
            connection,
            self._handlers,
            most_deaths=settings.max_deaths,
            run_ttl_s=settings.run_ttl_s,
        )
        self._maintenance = Maintenance(self, connection, reclaimer, settings)

    def _set_connection(self, connection: redis.Redis) -> redis.Redis:
        """RQ would raise the socket timeout above its blocking reads; here are none."""
        return connection

    def serialize(self) -> dict[str, Any]:
        """What RQ's tools read; what tells a successor that this process is gone; and the model."""
        fields: dict[str, Any] = super().serialize()
        fields[MODEL_FIELD] = f"{self._engine.model_name}\n{self._engine.model_revision or ''}"
        identity = own_identity()
        return fields if identity is None else {**fields, PROCESS: identity}

    def subscribe(self) -> None:
        """RQ would start a thread; see listen_for_commands."""

    def unsubscribe(self) -> None:
        """See subscribe."""

    def serve(self) -> int:
        """Serve until told to stop; returns the exit code, 0 after a drain.

        If a worker of this name may live, waits until it is gone.
        """
        register(self, self.connection)
        warn_of_others(self, self.connection)
        logger.info("worker %s serves %s", self.name, ", ".join(self.queue_names()))
        _collect_seldom()
        try:
            return asyncio.run(self._serve())
        finally:
            try:
                self._maintenance.close()
                self.register_death()  # type: ignore[no-untyped-call]
            except REDIS_ERRORS as error:
                logger.warning("couldn't sign off from RQ: %s", error)

    async def _serve(self) -> int:
        service = Service(self, self._settings, self._engine, self._handlers, self._maintenance)
        return await service.run()


def _collect_seldom() -> None:
    """Keep the garbage collector from looking in vain; that took a tenth of the queue's time.

    The model and all modules stay. What a request is made of goes without it, but not before the
    request ends, so looking after each 700 new objects finds nothing. Nor do an engine's steps
    leave cycles, which could keep tensors.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def _check(connection: redis.Redis) -> ServerInfo:
    """What `check_server` says once the server is ready; isn't patient with one that's silent."""
    while True:
        try:
            return check_server(connection)
        except REDIS_ERRORS as error:
            if not is_passing(error) or not is_answer(error):
                raise
            logger.warning("Redis isn't ready (%s); trying again", error)
        time.sleep(OUTAGE_S)


def run_worker(settings: WorkerSettings) -> int:
    """Check Redis, load the engine, serve until told to stop; returns the exit code.

    :raises BatchmillError: the settings, the model or Redis can't be used
    """
    connection = connect(settings.redis_url, max_connections=4, timeout_s=settings.redis_timeout_s)
    try:
        for warning in _check(connection).warnings():
            logger.warning("%s", warning)
        engine = load_engine(settings)
        return BatchWorker(settings, engine, connection).serve()
    except redis.RedisError as error:
        raise friendly(error, settings.redis_url) from None
