"""How jobs end that the scripts don't end: in RQ's own handlers, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from workers.leases import Lease
from workers.patience import patiently
from workers.rq_side.handlers import RQHandlers
from workers.running.active import ActiveJob, Because
from workers.running.publisher import Publisher
from workers.running.runner import Runner

__all__ = ["RQThread", "RareEnds"]


class RQThread:
    """The one thread in which all of RQ's synchronous code runs."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "rq")

    async def run(self, handle: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, handle)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class RareEnds:
    """Ends jobs through RQ, each after the results it has so far are written.

    :param on_failure: called with what a handler raised and nobody expected
    """

    def __init__(
        self,
        handlers: RQHandlers,
        thread: RQThread,
        publisher: Publisher,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._handlers = handlers
        self._thread = thread
        self._publisher = publisher
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, runner: Runner) -> None:
        """Name the runner whose jobs end here; it needs this object to be made."""
        self._runner = runner

    def fail(self, job: ActiveJob, reason: str, *, may_retry: bool) -> None:
        """End a job as failed, or enqueue it again if it may and has retries left."""
        lease = job.lease
        self._later(lease, lambda: self._handlers.fail(lease, reason, may_retry=may_retry))

    def stop(self, job: ActiveJob) -> None:
        """End a job as RQ's stop commands do, with `cancelled` results for what is left."""
        if self._runner.stop(job):
            self._later(job.lease, lambda: self._handlers.stop(job.lease))

    def split(
        self, job: ActiveJob, run: str, requests: dict[int, tuple[object, str]], because: Because
    ) -> None:
        """Give requests of a chunk jobs of their own, then end the chunk."""
        self._later(
            job.lease,
            lambda: self._handlers.split(job.lease, run=run, requests=requests, because=because),
            then=lambda: self._runner.finish(job),
        )

    def succeed(self, lease: Lease, return_value: bytes) -> None:
        """End a job that finish.lua left alone."""
        self._later(lease, lambda: self._handlers.succeed(lease, return_value))

    def _later(
        self, lease: Lease, handle: Callable[[], None], then: Callable[[], None] | None = None
    ) -> None:
        async def end() -> None:
            await patiently(lambda: self._thread.run(handle))
            if then is not None:
                then()
            else:
                self._runner.ended(lease)

        def start() -> None:
            task = asyncio.create_task(end())
            self._tasks.add(task)
            task.add_done_callback(self._done)

        self._publisher.then(start)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)
