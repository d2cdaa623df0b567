"""Ending asyncio tasks that talk to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

__all__ = ["end"]

CANCEL_AGAIN_S = 0.1


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended; what they raise is theirs.

    Once isn't enough: redis-py sends with asyncio.wait_for, and that of Python 3.11 loses a
    cancellation that comes just as a command has been sent.
    """
    given = list(tasks)
    pending = {task for task in given if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*given, return_exceptions=True)
