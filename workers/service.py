"""One life of a worker on the event loop: put together, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any

from redis.exceptions import RedisError
from rq.worker.base import BaseWorker

from queue_api.connection.connect import LONGEST_BLOCK_S, connect_async
from queue_api.connection.failures import REDIS_ERRORS
from queue_api.connection.tasks import end
from queue_api.store.keys import strays_key
from queue_api.store.scripts import Scripts
from queue_api.wire.errors import RedisAccessError
from workers.claim.doorbell import Doorbell
from workers.claim.heartbeat import Keeper
from workers.claim.intake import Intake
from workers.leases import Leases
from workers.maintenance import Maintenance
from workers.patience import ReplicaPatience, patiently, raise_if_fatal
from workers.rq_side.commands import listen_for_commands
from workers.rq_side.handlers import RQHandlers
from workers.rq_side.rare_ends import RareEnds, RQThread
from workers.rq_side.reclaim import alone_after
from workers.running.checkpoints import Checkpoints
from workers.running.engine_loop import Engine, EngineLoop
from workers.running.publisher import Publisher
from workers.running.runner import Runner
from workers.scripts import worker_scripts
from workers.settings import WorkerSettings

__all__ = ["Service"]

logger = logging.getLogger(__name__)

LONGEST_BEAT_S = 2.0
"""Leases are renewed, and cancelled jobs noticed, at least so often."""
GOODBYE_S = 10.0
"""How long a worker that ends waits for whatever doesn't answer."""
EXIT_DRAINED, EXIT_FAILED = 0, 1


class Service:
    """Runs one engine for one RQ worker; to be made on the event loop."""

    def __init__(
        self,
        worker: BaseWorker,
        settings: WorkerSettings,
        engine: Engine,
        handlers: RQHandlers,
        maintenance: Maintenance,
    ) -> None:
        self._worker = worker
        self._settings = settings
        self._maintenance = maintenance
        self._replica = ReplicaPatience(settings.redis_url)
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._exit_code = EXIT_DRAINED
        self._has_failed_engine = False
        self._has_lost_redis = False
        self._rq_thread = RQThread()
        self._connection = connect_async(
            settings.redis_url, 8 + 2 * len(worker.queues), settings.redis_timeout_s
        )
        self._scripts = Scripts(self._connection, worker_scripts())
        leases = Leases(
            self._connection,
            self._scripts,
            worker_name=worker.name,
            worker_key=worker.key,
            executions_key=worker.executions_key,
            queues=worker.queue_names(),
            lease_s=settings.lease_s,
            alone_after=alone_after(settings.max_deaths),
            worker_ttl_s=worker.worker_ttl + 60,
            result_ttl_s=worker.default_result_ttl,
        )
        self._publisher = Publisher(
            self._connection, self._scripts, leases, run_ttl_s=settings.run_ttl_s
        )
        self._ends = RareEnds(handlers, self._rq_thread, self._publisher, self._on_failure)
        self._engine_loop = EngineLoop(engine)
        model = f"{engine.model_name}@{engine.model_revision}"
        self._checkpoints = Checkpoints(
            self._connection, self._scripts, settings.checkpoint_tokens, model
        )
        self._runner = Runner(
            leases,
            self._publisher,
            self._engine_loop,
            worker_name=worker.name,
            checkpoints=self._checkpoints,
            ends=self._ends,
            capacity=settings.requests_held,
        )
        self._ends.attach(self._runner)
        self._keeper = Keeper(self._connection, leases, self._runner)
        self._intake = Intake(self._connection, leases, self._checkpoints, self._runner)

    async def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.request_drain)
        loop.set_exception_handler(self._on_loop_error)
        await patiently(self._scripts.load)  # a user who may not run scripts is to know it now
        block_s = min(LONGEST_BLOCK_S, self._settings.redis_timeout_s / 2)
        strays = [strays_key(queue) for queue in self._worker.queue_names()]
        doorbell = Doorbell(self._connection, [*self._worker.queue_keys(), *strays], block_s)
        self._engine_loop.start(
            self._runner.on_done,
            self._runner.on_progress,
            self._on_engine_failure,
            steps_between=self._checkpoints.steps_between,
        )
        listening = asyncio.Event()
        claiming = self._watch(self._claim_forever(doorbell, listening))
        services = [
            self._watch(self._publisher.run(self._ends.succeed, self._runner.ended)),
            self._watch(self._beat_forever()),
            self._watch(self._maintain_forever()),
            self._watch(self._listen_forever(listening)),
        ]
        await self._stop.wait()
        self._intake.stop()
        doorbell.ring()
        await asyncio.wait([claiming], timeout=GOODBYE_S)
        claiming.cancel()
        await self._drain()
        await end([claiming, *services])
        await doorbell.close()
        await self._within_goodbye(self._engine_loop.stop())
        self._rq_thread.close()
        await self._connection.aclose()
        return self._exit_code

    # --- the end -----------------------------------------------------------------------------

    def request_drain(self) -> None:
        """Stop claiming and finish what finishes in time; asked again, give it back at once."""
        if self._stop.is_set():
            logger.warning("asked to stop again: running work is given back now")
            self._hurry.set()
            return
        logger.info("draining: %d jobs are held", len(self._runner.active))
        self._stop.set()

    def _on_failure(self, error: BaseException) -> None:
        logger.critical("worker can't go on: %s", error, exc_info=error)
        self._has_lost_redis |= isinstance(error, RedisError | RedisAccessError)
        self._exit_code = EXIT_FAILED
        self._hurry.set()
        self._stop.set()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback that failed may have left a job behind that nobody would ever end."""
        loop.default_exception_handler(context)
        if str(context.get("message", "")).startswith("Exception in callback"):
            self._on_failure(context["exception"])

    def _on_engine_failure(self, error: BaseException) -> None:
        self._has_failed_engine = True
        self._on_failure(error)

    async def _drain(self) -> None:
        if self._has_lost_redis:
            logger.error("%d jobs end with their leases", len(self._runner.active))
            return  # what Redis refuses for good it won't take now
        idle = asyncio.create_task(self._runner.idle.wait())
        hurry = asyncio.create_task(self._hurry.wait())
        grace_s = self._settings.drain_grace_s
        await asyncio.wait([idle, hurry], timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if self._has_failed_engine:
            await self._within_goodbye(self._abandon())
        elif self._runner.active:
            await self._within_goodbye(self._runner.save_progress())
        # each goes to the front of its queue, so the last first keeps their order
        for job in reversed(list(self._runner.active.values())):
            self._runner.release(job)
        if not await self._within_goodbye(asyncio.gather(idle, self._publisher.flushed())):
            logger.error("Redis is away: %d jobs end with their leases", len(self._runner.active))
            self._exit_code = EXIT_FAILED

    async def _abandon(self) -> None:
        """Give work back as a worker does that dies: it may be the cause."""
        await self._publisher.flushed()
        await patiently(self._runner.abandon)
        await patiently(lambda: self._rq_thread.run(self._maintenance.reclaim))

    async def _within_goodbye(self, work: Awaitable[Any]) -> bool:
        """True if it was done in time."""
        try:
            await asyncio.wait_for(work, GOODBYE_S)
        except TimeoutError:
            return False
        return True

    # --- services ----------------------------------------------------------------------------

    def _watch(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a service; if it fails, the worker ends and gives its work back."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_service_end)
        return task

    def _on_service_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

    async def _claim_forever(self, doorbell: Doorbell, listening: asyncio.Event) -> None:
        await listening.wait()  # a job must be stoppable from its first moment
        await self._intake.claim_forever(doorbell)

    async def _beat_forever(self) -> None:
        is_registered = True
        while True:
            await asyncio.sleep(min(self._settings.lease_s / 4, LONGEST_BEAT_S))
            try:
                # asked again, it would know the worker by this beat alone
                is_registered = await self._keeper.beat() and is_registered
                if not is_registered:
                    await self._rq_thread.run(self._maintenance.register_again)
                    is_registered = True
                self._replica.forget()
            except REDIS_ERRORS as error:
                raise_if_fatal(error)
                self._replica.look(error)
                logger.warning("leases couldn't be renewed: %s", error)
                self._maintenance.postpone()

    async def _maintain_forever(self) -> None:
        while True:
            try:
                await self._rq_thread.run(self._maintenance.tick)
            except REDIS_ERRORS as error:
                raise_if_fatal(error)
                logger.warning("no maintenance: %s", error)
                self._maintenance.postpone()
            await asyncio.sleep(self._maintenance.interval_s)

    async def _listen_forever(self, listening: asyncio.Event) -> None:
        channel = self._worker.pubsub_channel_name
        await listen_for_commands(self._connection, channel, self._obey, listening)

    def _obey(self, command: str, arguments: Mapping[str, object]) -> None:
        if command == "shutdown":
            self.request_drain()
            return
        if command not in ("stop-job", "stop-execution"):
            logger.warning("command %r isn't one for this worker", command)
            return
        for execution_id, job in list(self._runner.active.items()):
            if command == "stop-execution":
                is_meant = execution_id == arguments.get("execution_id")
            else:
                is_meant = job.lease.job_id == arguments.get("job_id")
            if is_meant:
                self._ends.stop(job)
