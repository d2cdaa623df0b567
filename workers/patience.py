"""Waiting for a Redis that is away; the model stays loaded meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from queue_api.connection.failures import (
    DEMOTED,
    REDIS_ERRORS,
    Failure,
    error_code,
    failure_of,
    friendly,
    is_passing,
)

__all__ = ["OUTAGE_S", "ReplicaPatience", "patiently", "raise_if_fatal"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUTAGE_S = 1.0
REPLICA_PATIENCE_S = 60.0
"""How long an address may lead to a replica: so long a failover and its news in DNS may take."""


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until Redis answers, however long it is away; `attempt` must bear being repeated."""
    while True:
        try:
            return await attempt()
        except REDIS_ERRORS as error:
            if not is_passing(error):
                raise
            logger.warning("Redis is away (%s); the model stays loaded", error)
        await asyncio.sleep(OUTAGE_S)


def raise_if_fatal(error: Exception) -> None:
    """Raise what no later try mends; who tries again anyway goes on after anything else."""
    if failure_of(error) is Failure.FATAL:
        raise error


class ReplicaPatience:
    """Bounds how long the server may call itself a replica, whose address won't mend by itself."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._since: float | None = None

    def look(self, error: Exception) -> None:
        """:raises RedisAccessError: so it has been for too long"""
        if error_code(error) not in DEMOTED:
            self._since = None
            return
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > REPLICA_PATIENCE_S:
            raise friendly(error, self._url) from None

    def forget(self) -> None:
        """It took a write."""
        self._since = None
