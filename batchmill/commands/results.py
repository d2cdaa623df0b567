"""`batchmill results`: a run's results as JSON lines."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated

import typer

from batchmill.commands.options import RedisUrl, RunArgument, open_client, run_async
from batchmill.commands.status import total_of
from queue_api.client.run import Run
from queue_api.datasets.columns import output_row
from queue_api.datasets.fingerprint import result_fingerprint
from queue_api.datasets.formats.opening import open_sink
from queue_api.datasets.formats.row_sink import MadeRow, RowSink
from queue_api.store.runs import RunStatus
from queue_api.wire.errors import DatasetError, RowsFailedError, RunIncompleteError

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
            mark = (await handle.status()).fingerprint
            sink = open_sink(output)
            is_done = False
            try:
                await _write_results(handle, mark, sink, follow=follow)
                is_done = True
            finally:
                sink.close(keep_empty=is_done)
            return sink.rows, await handle.status()

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
    if 0 < status.done == status.finish_reasons.get("error"):
        raise RowsFailedError(f"all {status.done} requests of run {run!r} ended with an error")


async def _write_results(run: Run, mark: str, sink: RowSink, *, follow: bool) -> None:
    for index in range(sink.end):
        if sink.has_other(index, result_fingerprint(run.id, mark, index)):
            raise DatasetError(
                f"the output belongs to another run than {run.id!r}: its row {index} wasn't made "
                "there; choose another file"
            )
    async with aclosing(run.batches(follow=follow, whole=False)) as batches:
        async for batch in batches:
            rows = []
            for result in batch:
                made_of = result_fingerprint(run.id, mark, result.index)
                if result.index not in sink:
                    row = output_row(result.metadata, result, made_of)
                    rows.append(MadeRow(result.index, made_of, row))
            sink.append(rows)
