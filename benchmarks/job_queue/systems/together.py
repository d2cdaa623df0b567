"""Many coroutines, some of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def together(work: Iterable[Callable[[], Awaitable[T]]], at_once: int) -> list[T]:
    """Their results, in order."""
    numbered = enumerate(work)
    found: dict[int, T] = {}

    async def go_on() -> None:
        for index, make in numbered:
            found[index] = await make()

    await asyncio.gather(*(go_on() for _ in range(at_once)))
    return [found[index] for index in range(len(found))]
