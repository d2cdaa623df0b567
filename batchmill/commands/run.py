"""`batchmill run`: a file of prompts to a file of answers, on this machine."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from batchmill.commands.engine_options import EngineFlags, worker_engine_options
from batchmill.commands.layout_options import layout_options, selection_options
from batchmill.commands.options import (
    ChunkSize,
    Fields,
    InputFormat,
    InputNames,
    QueueName,
    RedisUrl,
    RowSampling,
    RunId,
    Stopped,
    fields_of,
    run_async,
    run_sampling_options,
    tell,
)
from batchmill.commands.output_options import output_options
from batchmill.offline.dry_run import dry_run as show_prompts
from batchmill.offline.offline import OfflineRun, run_offline
from batchmill.offline.report import sample_table, summary_table
from engine.control_group import cpus_allowed
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.error_limit import ErrorLimit
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.row_selection import RowSelection
from queue_api.datasets.run import DEFAULT_WINDOW
from queue_api.datasets.summary import RunSummary
from queue_api.wire.errors import RowsFailedError
from queue_api.wire.schemas import SamplingParams
from workers.running.echo_engine import ECHO_PREFIX
from workers.running.engines import engine_config, require_packages
from workers.settings import WorkerSettings

__all__ = ["run"]


@run_sampling_options
@layout_options
@selection_options
@output_options
@worker_engine_options
def run(
    input: InputNames,  # noqa: A002 - the name shown in the help
    *,
    output: Annotated[
        str, typer.Option("-o", "--output", help="A file, continued if it is there; - is stdout.")
    ],
    sampling: SamplingParams,
    layout: Layout,
    selection: RowSelection,
    engine: EngineFlags,
    outputs: OutputOptions,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes to start; 0 uses those that serve --queue.")
    ] = 1,
    run: RunId = None,
    queue: QueueName = None,
    chunk_size: ChunkSize = None,
    window: Annotated[
        int, typer.Option(min=1, help="Requests that may be in Redis at a time.")
    ] = DEFAULT_WINDOW,
    show: Annotated[int, typer.Option(min=0, help="Rows to show at the end.")] = 0,
    format: InputFormat = None,  # noqa: A002
    fields: Fields = None,
    row_sampling: RowSampling = True,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask again for rows of OUTPUT with an error.")
    ] = False,
    redo_changed: Annotated[
        bool,
        typer.Option(
            "--redo-changed",
            help="Make rows of OUTPUT anew that another input, other options or another model "
            "made.",
        ),
    ] = False,
    max_errors: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%",
            help="Stop, with exit code 4, when more rows have errors, or a greater share of the "
            "last 1000.",
            show_default=False,
        ),
    ] = None,
    fail_on_error: Annotated[
        bool, typer.Option("--fail-on-error", help="End with exit code 4 if a row has an error.")
    ] = False,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Write the rows in the order of the input.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the first prompts as the model gets them and how many tokens there are in "
            "all; start and write nothing.",
        ),
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep results there, and take from there what the same model was asked before.",
            show_default=False,
        ),
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """Answer a file of prompts on this machine: start workers, and Redis unless there is one.

    Each row is written once. Broken off, the same command goes on where it stopped. The
    workers serve a queue of the run's own unless --queue names one.
    """
    # Read here as the workers will: what is wrong is said once and before anything starts.
    settings = WorkerSettings.load(**engine)
    engine_config(settings)
    if engine["generation_defaults"] is not None:  # workers that are there already may differ
        sampling = sampling.model_copy(update={"generation_defaults": settings.generation_defaults})
    flags = engine | {
        "model": settings.model,
        "num_threads": settings.num_threads or _threads_each(workers),
    }
    environment = {"BATCHMILL_LOG_LEVEL": os.environ.get("BATCHMILL_LOG_LEVEL", "warning")}
    environment |= {
        f"BATCHMILL_{name.upper()}": str(value)
        for name, value in flags.items()
        if value is not None
    }
    console = Console(stderr=True)
    job = OfflineRun(
        inputs=input,
        output=output,
        redis_url=_given_redis_url(redis_url),
        defaults=sampling,
        num_workers=workers,
        worker_environment=environment,
        run=run,
        queue=queue,
        chunk_size=chunk_size,
        window=window,
        model=_model_of(settings) if workers else "",
        format=format,
        fields=fields_of(fields, row_sampling=row_sampling),
        layout=layout,
        selection=replace(selection, seed=sampling.seed or 0),
        retry_errors=retry_errors,
        redo_changed=redo_changed,
        max_errors=ErrorLimit.of(max_errors),
        ordered=ordered,
        cache=cache,
        cache_scope=_cache_scope(settings) if workers else "other workers",
        outputs=outputs,
    )
    if dry_run:
        _show_dry_run(job, settings)
        return
    try:
        summary = run_async(run_offline(job, console))
    except Stopped:
        if output != "-":
            console.print("broken off; the same command goes on where this one stopped")
        raise
    if show and output != "-":
        console.print(sample_table(output, outputs, show))
    console.print(summary_table(summary))
    if summary.errors_before:
        tell(
            f"{summary.errors_before:,} rows that were written before have errors and stand; "
            "--retry-errors asks for them again"
        )
    _judge(summary, job.max_errors, fail_on_error=fail_on_error)


def _show_dry_run(job: OfflineRun, settings: WorkerSettings) -> None:
    tokenizer = limit = None
    if job.num_workers and not settings.model.startswith(ECHO_PREFIX):
        require_packages(settings.model)
        from engine.loading import load_tokenizer

        tokenizer, limit = load_tokenizer(engine_config(settings))
    for line in run_async(show_prompts(job, tokenizer, limit, tell)):
        typer.echo(line)
    tell("nothing was started or written: that was a dry run")


def _judge(summary: RunSummary, limit: ErrorLimit | None, *, fail_on_error: bool) -> None:
    """:raises RowsFailedError: all rows have errors, or more than the options put up with"""
    if summary.all_failed:
        raise RowsFailedError(
            f"all {summary.rows + summary.resumed:,} rows have errors; the first: "
            f"{summary.first_error or 'see the output'}"
        )
    limit = ErrorLimit(rows=0) if fail_on_error else limit
    if limit is not None and (told := summary.too_many_errors(limit)):
        raise RowsFailedError(told)


def _model_of(settings: WorkerSettings) -> str:
    """What the workers load, as far as the settings tell."""
    parts = [settings.model, settings.revision, settings.dtype, settings.quantization]
    if settings.generation_defaults != "model":
        parts.append(settings.generation_defaults)
    return "\n".join(str(part or "") for part in parts)


def _cache_scope(settings: WorkerSettings) -> str:
    """The settings that a text depends on and neither the request nor the model's revision has."""
    return f"{settings.generation_defaults} {settings.max_model_len}"


def _given_redis_url(flag: str | None) -> str | None:
    """The address that a flag or the environment names; None if neither does."""
    settings = QueueSettings.load(redis_url=flag)
    return settings.redis_url if settings.names_redis else None


def _threads_each(num_workers: int) -> int | None:
    """The CPUs that there are for us, shared out among the workers: more threads fight."""
    return max(1, cpus_allowed() // num_workers) if num_workers else None
