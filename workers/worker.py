"""A batchmill worker: one engine and, to RQ and its tools, one more RQ worker."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import redis
from rq import worker_registration
from rq.worker.base import BaseWorker, WorkerStatus

from queue_api.connection import CONNECTION_LOST, check_server, connect, connect_async, friendly
from queue_api.errors import ConfigurationError
from queue_api.jobs import GenerateJob, GenerateQueue
from workers.active import ActiveJob
from workers.checkpoints import Checkpoints
from workers.commands import listen_for_commands
from workers.doorbell import Doorbell
from workers.engine_loop import Engine, EngineLoop
from workers.engines import load_engine
from workers.intake import Intake, patiently
from workers.leases import Lease, Leases
from workers.maintenance import Maintenance
from workers.publisher import Publisher
from workers.reclaim import Reclaimer, alone_after
from workers.rq_handlers import RQHandlers
from workers.runner import Runner
from workers.scripts import Scripts
from workers.settings import WorkerSettings
from workers.splitting import Because

__all__ = ["BatchWorker", "run_worker"]

logger = logging.getLogger(__name__)

LONGEST_BEAT_S = 2.0
"""Leases are renewed, and cancelled jobs noticed, at least so often."""
GOODBYE_S = 10.0
"""How long a worker that ends waits for a Redis that is away."""
EXIT_DRAINED, EXIT_FAILED = 0, 1


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
        self._exit_code = EXIT_DRAINED
        self._has_failed_engine = False

    def _set_connection(self, connection: redis.Redis) -> redis.Redis:
        """RQ would raise the socket timeout above its blocking reads; here are none."""
        return connection

    def subscribe(self) -> None:
        """RQ would start a thread; see listen_for_commands."""

    def unsubscribe(self) -> None:
        """See subscribe."""

    def serve(self) -> int:
        """Serve until told to stop; returns the exit code, 0 after a drain.

        :raises ConfigurationError: a live worker has this name
        """
        try:
            self.register_birth()  # type: ignore[no-untyped-call]
        except ValueError:
            raise ConfigurationError(
                f"a worker named {self.name!r} is alive; choose another BATCHMILL_NAME"
            ) from None
        self.set_state(WorkerStatus.STARTED)
        logger.info("worker %s serves %s", self.name, ", ".join(self.queue_names()))
        try:
            return asyncio.run(self._main())
        finally:
            try:
                self._maintenance.close()
                self.register_death()  # type: ignore[no-untyped-call]
            except CONNECTION_LOST as error:
                logger.warning("couldn't sign off from RQ: %s", error)

    # --- the event loop ----------------------------------------------------------------------

    async def _main(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._rq_thread = ThreadPoolExecutor(1, "rq")
        connection = connect_async(self._settings.redis_url, 8 + len(self.queues))
        scripts = Scripts(connection)
        leases = Leases(
            connection,
            scripts,
            worker_name=self.name,
            worker_key=self.key,
            executions_key=self.executions_key,
            queues=self.queue_names(),
            lease_s=self._settings.lease_s,
            alone_after=alone_after(self._settings.max_deaths),
            worker_ttl_s=self.worker_ttl + 60,
            result_ttl_s=self.default_result_ttl,
        )
        self._publisher = Publisher(
            connection,
            scripts,
            leases,
            run_ttl_s=self._settings.run_ttl_s,
            on_left_to_rq=self._succeed_in_rq,
            on_ended=self._let_go,
        )
        engine_loop = EngineLoop(self._engine)
        checkpoints = Checkpoints(
            connection,
            self._settings.checkpoint_tokens,
            f"{self._engine.model_name}@{self._engine.model_revision}",
        )
        self._runner = Runner(
            connection,
            leases,
            self._publisher,
            engine_loop,
            worker_name=self.name,
            checkpoints=checkpoints,
            ends=self,
        )
        self._intake = Intake(
            connection, leases, checkpoints, self._runner, self._settings.requests_held
        )
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(signum, self.request_drain)
        await patiently(scripts.load)  # a user who may not run scripts is to know it now
        doorbell = Doorbell(connection, self.queue_keys())
        engine_loop.start(
            self._runner.on_done,
            self._runner.on_progress,
            self._on_engine_crash,
            steps_between=checkpoints.steps_between,
        )
        listening = asyncio.Event()
        claiming = self._watch(self._claim_forever(doorbell, listening))
        services = [
            self._watch(self._publisher.run()),
            self._watch(self._beat_forever()),
            self._watch(self._maintain_forever()),
            self._watch(
                listen_for_commands(connection, self.pubsub_channel_name, self._obey, listening)
            ),
        ]
        await self._stop.wait()
        self._intake.stop()
        doorbell.ring()
        await asyncio.wait([claiming], timeout=GOODBYE_S)
        claiming.cancel()
        await self._drain()
        for task in services:
            task.cancel()
        await asyncio.gather(claiming, *services, return_exceptions=True)
        await doorbell.close()
        await asyncio.wait_for(engine_loop.stop(), GOODBYE_S)
        self._rq_thread.shutdown()
        await connection.aclose()
        return self._exit_code

    def _watch(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a service; if it fails, the worker ends and gives its work back."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_service_end)
        return task

    def _on_service_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("worker can't go on: %s", error, exc_info=error)
            self._end_at_once()

    def _on_engine_crash(self, error: BaseException) -> None:
        logger.critical("engine can't go on, its work is given back: %s", error)
        self._has_failed_engine = True
        self._end_at_once()

    def _end_at_once(self) -> None:
        self._exit_code = EXIT_FAILED
        self._hurry.set()
        self._stop.set()

    def request_drain(self) -> None:
        """Stop claiming and finish what finishes in time; asked again, give it back at once."""
        if self._stop.is_set():
            logger.warning("asked to stop again: running work is given back now")
            self._hurry.set()
            return
        logger.info("draining: %d jobs are held", len(self._runner.active))
        self._stop.set()

    async def _drain(self) -> None:
        hurry = asyncio.create_task(self._hurry.wait())
        idle = asyncio.create_task(self._runner.idle.wait())
        waiting = {hurry, idle}
        await asyncio.wait(
            waiting,
            timeout=self._settings.drain_grace_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if self._has_failed_engine:
            await asyncio.wait([asyncio.create_task(self._abandon())], timeout=GOODBYE_S)
        elif self._runner.active:
            await asyncio.wait(
                [asyncio.create_task(self._runner.save_progress())], timeout=GOODBYE_S
            )
        # each goes to the front of its queue, so the last first keeps their order
        for job in reversed(list(self._runner.active.values())):
            self._runner.release(job)
        settled = [idle, asyncio.create_task(self._publisher.flushed())]
        _, late = await asyncio.wait(settled, timeout=GOODBYE_S)
        hurry.cancel()
        for task in late:
            task.cancel()
        if late:
            logger.error("Redis is away: %d jobs end with their leases", len(self._runner.active))
            self._exit_code = EXIT_FAILED

    async def _abandon(self) -> None:
        """Give work back as a worker does that dies: it may be the cause."""
        await self._publisher.flushed()
        await patiently(self._runner.abandon)
        await patiently(lambda: self._in_rq_thread(self._maintenance.reclaim))

    # --- services ----------------------------------------------------------------------------

    async def _claim_forever(self, doorbell: Doorbell, listening: asyncio.Event) -> None:
        await listening.wait()  # a job must be stoppable from its first moment
        await self._intake.claim_forever(doorbell)

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(min(self._settings.lease_s / 4, LONGEST_BEAT_S))
            try:
                if not await self._runner.beat():
                    await self._in_rq_thread(self._register_again)
            except CONNECTION_LOST as error:
                logger.warning("leases couldn't be renewed: %s", error)
                self._maintenance.postpone()

    async def _maintain_forever(self) -> None:
        while True:
            try:
                await self._in_rq_thread(self._maintenance.tick)
            except CONNECTION_LOST as error:
                logger.debug("no maintenance: %s", error)
            await asyncio.sleep(self._maintenance.interval_s)

    def _register_again(self) -> None:
        """RQ forgot this worker, because it or Redis stood still for long."""
        logger.warning("worker %s registers again", self.name)
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping=self.serialize())
            worker_registration.register(self, pipeline)
            pipeline.execute()

    def _obey(self, command: str, arguments: Mapping[str, object]) -> None:
        if command == "shutdown":
            self.request_drain()
        elif command in ("stop-job", "stop-execution"):
            wanted = {arguments.get("execution_id"), arguments.get("job_id")}
            for execution_id, job in list(self._runner.active.items()):
                known = execution_id if command == "stop-execution" else job.lease.job_id
                if known in wanted:
                    self._stop_job(job)
        else:
            logger.warning("command %r isn't one for this worker", command)

    # --- RQ's handlers -----------------------------------------------------------------------

    def _stop_job(self, job: ActiveJob) -> None:
        if self._runner.stop(job):
            self._later(job.lease, lambda: self._handlers.stop(job.lease))

    def fail(self, job: ActiveJob, reason: str, *, may_retry: bool) -> None:
        """End a job as failed, or enqueue it again if it may and has retries left."""
        lease = job.lease
        self._later(lease, lambda: self._handlers.fail(lease, reason, may_retry=may_retry))

    def split(
        self, job: ActiveJob, run: str, requests: dict[int, tuple[object, str]], because: Because
    ) -> None:
        """Give requests of a chunk jobs of their own, then end the chunk."""
        self._later(
            job.lease,
            lambda: self._handlers.split(job.lease, run=run, requests=requests, because=because),
            then=lambda: self._runner.finish(job),
        )

    def _succeed_in_rq(self, lease: Lease, return_value: bytes) -> None:
        self._later(lease, lambda: self._handlers.succeed(lease, return_value))

    def _later(
        self, lease: Lease, handle: Callable[[], None], then: Callable[[], None] | None = None
    ) -> None:
        """Write the results so far, then have RQ's handler end the job, then let go of it."""

        async def end() -> None:
            await patiently(lambda: self._in_rq_thread(handle))
            if then is not None:
                then()
            else:
                self._let_go(lease)

        def start() -> None:
            task = self._watch(end())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

        self._publisher.then(start)

    def _let_go(self, lease: Lease) -> None:
        self._runner.ended(lease)

    async def _in_rq_thread(self, handle: Callable[[], None]) -> None:
        await self._loop.run_in_executor(self._rq_thread, handle)


def run_worker(settings: WorkerSettings) -> int:
    """Check Redis, load the engine, serve until told to stop; returns the exit code.

    :raises BatchmillError: the settings, the model or Redis can't be used
    """
    connection = connect(settings.redis_url, max_connections=4)
    try:
        for warning in check_server(connection).warnings():
            logger.warning("%s", warning)
        engine = load_engine(settings)
        return BatchWorker(settings, engine, connection).serve()
    except redis.RedisError as error:
        raise friendly(error, settings.redis_url) from None
