"""Ending asyncio tasks that talk to Redis, or that write files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

__all__ = ["end", "in_thread"]

_T = TypeVar("_T")

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


async def in_thread(call: Callable[[], _T]) -> _T:
    """What a call gives that may block. Cancelled, this ends when the call has: a thread can't be
    stopped, and whoever goes on must not find it at work still."""
    work = asyncio.ensure_future(asyncio.to_thread(call))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        work.exception()  # looked at, so that nobody is told that it wasn't
        raise cancelled
    return work.result()
