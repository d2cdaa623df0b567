"""Ending tasks: one that loses a cancellation, as redis-py may on Python 3.11, doesn't live on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from queue_api.connection.tasks import end

PATIENCE_S = 20.0


async def losing(times: int, began: asyncio.Event) -> None:
    """Goes on for ever, whatever it loses."""
    for _ in range(times):
        try:
            began.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
    began.set()
    await asyncio.Event().wait()


async def is_ended(*tasks: asyncio.Task[Any]) -> bool:
    """Whether `end` ends and the tasks have, too; they have in any case afterwards."""
    ending = asyncio.create_task(end(tasks))
    await asyncio.wait([ending], timeout=PATIENCE_S)
    found = ending.done() and all(task.done() for task in tasks)
    while not all(task.done() for task in tasks):
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
    await ending
    return found


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_cancellation_that_is_lost_leaves_no_task_running(times: int) -> None:
    async def main() -> None:
        began = asyncio.Event()
        task = asyncio.create_task(losing(times, began))
        await began.wait()
        assert await is_ended(task)
        assert task.cancelled()

    asyncio.run(main())


def test_all_end_whichever_of_them_fails_or_never_began() -> None:
    async def failing() -> None:
        raise ValueError("its own")

    async def main() -> None:
        began = asyncio.Event()
        over = asyncio.create_task(failing())
        await asyncio.wait([over])
        stubborn = asyncio.create_task(losing(1, began))
        await began.wait()
        new = asyncio.create_task(losing(0, asyncio.Event()))
        assert await is_ended(over, stubborn, new)
        assert isinstance(over.exception(), ValueError)
        assert stubborn.cancelled()
        assert new.cancelled()
        await end([])

    asyncio.run(main())
