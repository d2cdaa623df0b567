"""`batchmill results`: a run's results as JSON lines."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated

import typer

from batchmill.commands.options import RedisUrl, RunArgument, open_client, run_async
from batchmill.commands.status import total_of
from queue_api.client.run import Run
from queue_api.datasets.columns import dump_row, output_row
from queue_api.datasets.formats.jsonl import RowWriter
from queue_api.store.runs import RunStatus
from queue_api.wire.errors import DatasetError, RunIncompleteError

__all__ = ["results"]


def results(
    run: RunArgument,
    output: Annotated[
        str, typer.Option("-o", "--output", help="A file, continued if it is there; - is stdout.")
    ] = "-",
    follow: Annotated[
        bool, typer.Option(help="Wait until the run is complete, or take what is there.")
    ] = True,
    redis_url: RedisUrl = None,
) -> None:
    """Write a run's results as JSON lines, in the order in which they completed.

    The rows have the input's columns but the prompts.
    """

    async def work() -> tuple[int, RunStatus]:
        async with open_client(redis_url) as client:
            handle = client.run(run)
            await handle.status()
            writer = RowWriter(output)
            try:
                await _write_results(handle, writer, follow=follow)
            finally:
                writer.close()
            return writer.rows, await handle.status()

    written, status = run_async(work())
    if not status.complete:
        raise RunIncompleteError(
            f"run {run!r} isn't complete: {status.done} of {total_of(status)} requests are done"
        )
    if written < status.done:
        raise RunIncompleteError(
            f"{status.done - written} results of run {run!r} are no longer in Redis: "
            "they were written to the output of the `batchmill run` that it belongs to"
        )


async def _write_results(run: Run, writer: RowWriter, *, follow: bool) -> None:
    async with aclosing(run.batches(follow=follow, whole=False)) as batches:
        async for batch in batches:
            lines = []
            for result in batch:
                row = output_row(result.metadata, result)
                shown = str(row["id"])
                if writer.has_other(result.index, shown):
                    raise DatasetError(
                        f"the output belongs to another run: its row {result.index} isn't "
                        f"{shown!r}; choose another file"
                    )
                if result.index not in writer:
                    lines.append((result.index, shown, dump_row(row)))
            writer.append(lines)
