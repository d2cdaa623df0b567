"""`batchmill results`: a run's results as JSON lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import aclosing
from typing import Annotated, Any

import typer

from batchmill.commands.options import RedisUrl, RunArgument, open_client, run_async
from batchmill.commands.status import total_of
from queue_api.client.run import Run
from queue_api.datasets.columns import has_number_as_id, output_row
from queue_api.datasets.fingerprint import result_fingerprint
from queue_api.datasets.formats.output_opening import open_sink
from queue_api.datasets.formats.row_sink import MadeRow, RowSink
from queue_api.store.runs import RunStatus
from queue_api.wire.errors import DatasetError, RowsFailedError, RunIncompleteError
from queue_api.wire.schemas import GenerationResult

__all__ = ["results"]

_NUMBER = re.compile("0|-?[1-9][0-9]*")


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
                sink.finish()
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


def _with_number(result: GenerationResult) -> Mapping[str, Any]:
    """The columns of a result of a run whose ids are numbers.

    One that no worker made, because it was cancelled or its job was lost, has none, and only the
    text that its id was asked under: it would make the column one of two types.
    """
    is_number = not result.metadata and _NUMBER.fullmatch(result.id)
    return {"id": int(result.id)} if is_number else result.metadata


async def _write_results(run: Run, mark: str, sink: RowSink, *, follow: bool) -> None:
    for index in range(sink.end):
        if sink.has_other(index, result_fingerprint(run.id, mark, index)):
            raise DatasetError(
                f"the output belongs to another run than {run.id!r}: its row {index} wasn't made "
                "there; choose another file"
            )
    are_numbers = False
    async with aclosing(run.batches(follow=follow, whole=False)) as batches:
        async for batch in batches:
            rows = []
            are_numbers = are_numbers or any(has_number_as_id(r.metadata) for r in batch)
            for result in batch:
                made_of = result_fingerprint(run.id, mark, result.index)
                if result.index not in sink:
                    columns = _with_number(result) if are_numbers else result.metadata
                    row = output_row(columns, result, made_of)
                    rows.append(MadeRow(result.index, made_of, row))
            sink.append(rows)
