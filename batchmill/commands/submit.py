"""`batchmill submit`: a file of prompts onto the queue."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

import typer

from batchmill.commands.options import (
    ChunkSize,
    QueueName,
    RedisUrl,
    RunId,
    open_client,
    run_async,
    sampling_options,
    tell,
)
from queue_api.client.submission import RequestLike
from queue_api.datasets.columns import REQUEST_COLUMNS, RowParser, read_jsonl
from queue_api.datasets.run import dataset_run_id
from queue_api.wire.errors import RequestError
from queue_api.wire.schemas import GenerationResult, SamplingParams

__all__ = ["submit"]


@sampling_options
def submit(
    input: Annotated[  # noqa: A002 - the name shown in the help
        str, typer.Argument(metavar="INPUT.jsonl", help="A row to a request; - is stdin.")
    ],
    *,
    sampling: SamplingParams,
    run: RunId = None,
    queue: QueueName = None,
    chunk_size: ChunkSize = None,
    redis_url: RedisUrl = None,
) -> None:
    """Put a file of prompts on the queue and print the run's name.

    Doing it again with the same file makes nothing twice.
    """

    async def work() -> str:
        async with open_client(redis_url, queue) as client:
            parser = RowParser(sampling, keep_columns=True, warn=tell)
            name = run or dataset_run_id(input, "-", sampling)
            async with aclosing(_requests(input, parser)) as requests:
                submitted = await client.submit(requests, name, chunk_size=chunk_size)
            status = await submitted.status()
            tell(f"{status.total} requests on queue {status.queue!r}, {status.done} of them done")
            return name

    typer.echo(run_async(work()))


async def _requests(source: str, parser: RowParser) -> AsyncGenerator[RequestLike, None]:
    async with aclosing(read_jsonl(source, parser)) as rows:
        async for row in rows:
            if isinstance(row.request, RequestError):
                kept = {k: v for k, v in row.columns.items() if k not in REQUEST_COLUMNS}
                yield GenerationResult.failed(row.id, row.request, metadata=kept)
            else:
                yield row.request
