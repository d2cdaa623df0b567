"""Waiting for a Redis that is away; the model stays loaded meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from queue_api.connection.failures import REDIS_ERRORS, is_passing

__all__ = ["OUTAGE_S", "patiently"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUTAGE_S = 1.0


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
