"""Waits for work without polling, whoever enqueues it.

`BLMOVE queue queue LEFT LEFT` puts the first job back where it was: it changes nothing, but
blocks while the list is empty. So a job pushed by any RQ producer wakes the worker at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import redis.asyncio as aredis

from queue_api.connection.failures import REDIS_ERRORS
from queue_api.connection.tasks import end

__all__ = ["Doorbell"]

logger = logging.getLogger(__name__)

RETRY_S = 1.0


class Doorbell:
    """Listens at the queues, one connection each, while somebody waits."""

    def __init__(self, connection: aredis.Redis, queue_keys: Sequence[str], block_s: float) -> None:
        """:param block_s: the longest wait in one command; less than the connection's timeout"""
        self._connection = connection
        self._block_s = block_s
        self._rung = asyncio.Event()
        self._armed = [asyncio.Event() for _ in queue_keys]
        self._tasks = [
            asyncio.create_task(self._listen(key, armed))
            for key, armed in zip(queue_keys, self._armed, strict=True)
        ]
        for task in self._tasks:
            task.add_done_callback(lambda _: self.ring())

    async def wait(self) -> None:
        """Return when a queue holds a job, or `ring` was called since the last wait.

        :raises Exception: what ended a listener; it isn't heard any more
        """
        for armed in self._armed:
            armed.set()
        await self._rung.wait()
        self._rung.clear()
        for task in self._tasks:
            if task.done():
                task.result()

    def ring(self) -> None:
        """Let whoever waits, or waits next, go on."""
        self._rung.set()

    async def close(self) -> None:
        await end(self._tasks)

    async def _listen(self, key: str, armed: asyncio.Event) -> None:
        block_s: Any = self._block_s  # redis-py's hints know whole seconds alone
        while True:
            await armed.wait()
            try:
                head = await self._connection.blmove(key, key, block_s, "LEFT", "LEFT")
            except REDIS_ERRORS as error:
                logger.debug("can't listen at %s: %s", key, error)
                await asyncio.sleep(RETRY_S)
                head = key  # look yourself
            if head is not None:
                armed.clear()
                self._rung.set()
