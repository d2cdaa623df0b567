"""`batchmill cancel`: end what has no result yet."""

from __future__ import annotations

from typing import Annotated

import typer

from batchmill.commands.options import RedisUrl, RunArgument, open_client, run_async, tell

__all__ = ["cancel"]


def cancel(
    run: RunArgument,
    request: Annotated[
        str | None, typer.Option(help="The id of one request; without it, the whole run.")
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """End what has no result yet, queued or running, with a `cancelled` result."""

    async def work() -> int:
        async with open_client(redis_url) as client:
            return await client.cancel(run, request)

    tell(f"cancelled {run_async(work())} requests of run {run!r}")
