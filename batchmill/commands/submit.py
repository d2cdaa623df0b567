"""`batchmill submit`: a file of prompts onto the queue."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import typer

from batchmill.commands.layout_options import layout_options
from batchmill.commands.options import (
    ChunkSize,
    Fields,
    InputFormat,
    InputNames,
    QueueName,
    RedisUrl,
    RowSampling,
    RunId,
    fields_of,
    open_client,
    run_async,
    sampling_options,
    tell,
)
from queue_api.client.submission import RequestLike
from queue_api.datasets.columns import RowParser
from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.run import run_id_of
from queue_api.wire.errors import ConfigurationError, RequestError
from queue_api.wire.schemas import GenerationResult, SamplingParams

__all__ = ["submit"]


@sampling_options
@layout_options
def submit(
    input: InputNames,  # noqa: A002 - the name shown in the help
    *,
    sampling: SamplingParams,
    layout: Layout,
    run: RunId = None,
    queue: QueueName = None,
    chunk_size: ChunkSize = None,
    format: InputFormat = None,  # noqa: A002
    fields: Fields = None,
    row_sampling: RowSampling = True,
    redis_url: RedisUrl = None,
) -> None:
    """Put a file of prompts on the queue and print the run's name.

    Doing it again with the same file makes nothing twice.
    """
    names = fields_of(fields, row_sampling=row_sampling)
    if layout.turns_column is not None:
        raise ConfigurationError(
            "submit asks each row once: several turns, each after the answer to the last, need "
            "batchmill run --turns-column"
        )

    async def work() -> str:
        data = DatasetInput(input, format=format)
        try:
            await data.look(sampling, names, layout)
            if data.how_read:
                tell(data.how_read)
            parser = RowParser(
                sampling,
                keep_columns=True,
                warn=tell,
                fields=names,
                layout=layout,
                place=data.source.place,
            )
            name = run or run_id_of(data.source, "-", sampling, layout)
            async with open_client(redis_url, queue) as client:
                async with aclosing(_requests(data, parser)) as requests:
                    submitted = await client.submit(requests, name, chunk_size=chunk_size)
                status = await submitted.status()
        finally:
            await data.close()
        tell(f"{status.total} requests on queue {status.queue!r}, {status.done} of them done")
        return name

    typer.echo(run_async(work()))


async def _requests(data: DatasetInput, parser: RowParser) -> AsyncGenerator[RequestLike, None]:
    async with aclosing(data.rows(parser)) as rows:
        async for row in rows:
            if isinstance(row.request, RequestError):
                kept = parser.kept(row.columns, row.id)
                yield GenerationResult.failed(row.id, row.request, metadata=kept)
            else:
                yield row.request
