"""The producers' commands: submit, results, status, cancel. They need no torch."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from queue_api.client import Client, Run
from queue_api.command_line import (
    ChunkSize,
    QueueName,
    RedisUrl,
    RunId,
    exit_code_of,
    run_app,
    run_async,
    sampling_options,
)
from queue_api.datasets import dataset_run_id
from queue_api.errors import DatasetError, RequestError, RunIncompleteError
from queue_api.row_writer import RowWriter
from queue_api.rows import REQUEST_COLUMNS, RowParser, dump_row, output_row, read_jsonl
from queue_api.runs import RunStatus
from queue_api.schemas import GenerationResult, SamplingParams
from queue_api.settings import QueueSettings
from queue_api.submission import RequestLike

__all__ = ["app", "exit_code_of", "run_app", "run_async"]

app = typer.Typer(
    name="batchmill",
    help="Batch text generation: prompts on a Redis queue, a partitioned engine in every worker.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchmill {version('batchmill')}")
        raise typer.Exit


@app.callback()
def batchmill(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Say the version and exit."
        ),
    ] = False,
) -> None: ...


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]


def _tell(message: str) -> None:
    typer.echo(f"batchmill: {message}", err=True)


def _client(redis_url: str | None, queue: str | None = None) -> Client:
    return Client(settings=QueueSettings.load(redis_url=redis_url, queue=queue))


@app.command()
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
        async with _client(redis_url, queue) as client:
            parser = RowParser(sampling, keep_columns=True, warn=_tell)
            name = run or dataset_run_id(input, "-", sampling)
            async with aclosing(_requests(input, parser)) as requests:
                submitted = await client.submit(requests, name, chunk_size=chunk_size)
            status = await submitted.status()
            _tell(f"{status.total} requests on queue {status.queue!r}, {status.done} of them done")
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


@app.command()
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
        async with _client(redis_url) as client:
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
            f"run {run!r} isn't complete: {status.done} of {_total(status)} requests are done"
        )
    if written < status.done:
        raise RunIncompleteError(
            f"{status.done - written} results of run {run!r} are no longer in Redis: "
            "they were written to the output of the `batchmill run` that it belongs to"
        )


async def _write_results(run: Run, writer: RowWriter, *, follow: bool) -> None:
    async with aclosing(run.batches(follow=follow)) as batches:
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


@app.command()
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    redis_url: RedisUrl = None,
) -> None:
    """Show how far a run is."""

    async def work() -> RunStatus:
        async with _client(redis_url) as client:
            return await client.status(run)

    found = run_async(work())
    if as_json:
        typer.echo(json.dumps({**asdict(found), "complete": found.complete}))
    else:
        Console().print(_status_table(found))


@app.command()
def cancel(
    run: RunArgument,
    request: Annotated[
        str | None, typer.Option(help="The id of one request; without it, the whole run.")
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """End what has no result yet, queued or running, with a `cancelled` result."""

    async def work() -> int:
        async with _client(redis_url) as client:
            return await client.cancel(run, request)

    _tell(f"cancelled {run_async(work())} requests of run {run!r}")


def _total(status: RunStatus) -> str:
    return "?" if status.total is None else str(status.total)


def _status_table(status: RunStatus) -> Table:
    table = Table(title=f"run {escape(status.id)}", show_header=False, title_justify="left")
    state = "complete" if status.complete else "cancelled" if status.cancelled else "in progress"
    table.add_row("state", state)
    table.add_row("done", f"{status.done} of {_total(status)}")
    for reason, count in sorted(status.finish_reasons.items()):
        table.add_row(f"  {escape(reason)}", str(count))
    for job_state, count in sorted(status.jobs.items()):
        table.add_row(f"jobs {escape(job_state)}", str(count))
    table.add_row("prompt tokens", str(status.prompt_tokens))
    table.add_row("generated tokens", str(status.completion_tokens))
    table.add_row("queue", escape(status.queue))
    created = datetime.fromtimestamp(status.created_at, UTC)
    table.add_row("submitted", created.strftime("%Y-%m-%d %H:%M:%S UTC"))
    return table
