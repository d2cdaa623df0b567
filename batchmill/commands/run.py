"""`batchmill run`: a file of prompts to a file of answers, on this machine."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
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
from batchmill.commands.run_recipe import check_options, is_given, run_recipe_file
from batchmill.offline.dry_run import dry_run as show_prompts
from batchmill.offline.offline import OfflineRun, run_offline
from batchmill.offline.recipe import RecipeOptions
from batchmill.offline.report import sample_table, summary_table
from batchmill.offline.run_report import Price, RunReport
from batchmill.offline.worker_setup import cache_scope, model_of, worker_environment
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.error_limit import ErrorLimit
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.recipes.recipe_file import is_recipe
from queue_api.datasets.row_selection import RowSelection
from queue_api.datasets.run import DEFAULT_WINDOW
from queue_api.datasets.summary import RunSummary
from queue_api.wire.errors import ConfigurationError, RowsFailedError
from queue_api.wire.schemas import SamplingParams
from workers.running.echo_engine import ECHO_PREFIX
from workers.running.engines import engine_config, require_packages
from workers.settings import WorkerSettings

__all__ = ["run"]


class Redo(StrEnum):
    """Which rows of an output are made anew."""

    CHANGED = "changed"
    ERRORS = "errors"
    ALL = "all"


@run_sampling_options
@layout_options
@selection_options
@output_options
@worker_engine_options
def run(
    input: InputNames,  # noqa: A002 - the name shown in the help
    *,
    context: typer.Context,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="A file, continued if it is there; - is stdout. A recipe names its own.",
            show_default=False,
        ),
    ] = None,
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
    redo: Annotated[
        list[Redo],
        typer.Option(
            "--redo",
            default_factory=list,
            show_default=False,
            help="Make rows of OUTPUT anew: changed, as --redo-changed; errors, as "
            "--retry-errors; all that are asked for. May be repeated.",
        ),
    ],
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
    group_prefixes: Annotated[
        bool,
        typer.Option(
            "--group-prefixes",
            help="Ask for rows together, and of one worker, whose prompts begin alike; INPUT is "
            "read once more for that.",
        ),
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
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page about the run there when it ends, and FILE.json.",
            show_default=False,
        ),
    ] = None,
    price: Annotated[
        str | None,
        typer.Option(
            metavar="IN,OUT",
            help="What a million prompt tokens and a million generated ones cost, for --report.",
            show_default=False,
        ),
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """Answer a file of prompts on this machine: start workers, and Redis unless there is one.

    Each row is written once. Broken off, the same command goes on where it stopped. The
    workers serve a queue of the run's own unless --queue names one.
    """
    redo_changed, retry_errors = (
        redo_changed or Redo.CHANGED in redo,
        retry_errors or Redo.ERRORS in redo,
    )
    if any(map(is_recipe, input)):
        if Redo.ALL in redo:
            raise ConfigurationError(
                "--redo all isn't for recipes: name another output, or remove this one and its "
                "folder of stages"
            )
        check_options(context, input, dry_run=dry_run)
        options = RecipeOptions(
            redis_url=_given_redis_url(redis_url),
            engine_settings=frozenset(engine) - {"model"},
            workers=workers if is_given(context, "workers") else None,
            redo_changed=redo_changed,
            retry_errors=retry_errors,
            max_errors=ErrorLimit.of(max_errors),
            cache=cache,
        )
        run_recipe_file(input[0], output, options, show=show, fail_on_error=fail_on_error)
        return
    if Redo.ALL in redo and cache is not None:
        raise ConfigurationError("--redo all makes each row anew, --cache wouldn't: give one")
    if output is None:
        raise ConfigurationError("say where the answers go: -o FILE")
    if price is not None and report is None:
        raise ConfigurationError("--price is for a --report")
    # Read here as the workers will: what is wrong is said once and before anything starts.
    settings = WorkerSettings.load(**engine)
    engine_config(settings)
    if engine["generation_defaults"] is not None:  # workers that are there already may differ
        sampling = sampling.model_copy(update={"generation_defaults": settings.generation_defaults})
    console = Console(stderr=True)
    job = OfflineRun(
        inputs=input,
        output=output,
        redis_url=_given_redis_url(redis_url),
        defaults=sampling,
        num_workers=workers,
        worker_environment=worker_environment(engine, settings, workers),
        run=run,
        queue=queue,
        chunk_size=chunk_size,
        window=window,
        model=model_of(settings) if workers else "",
        format=format,
        fields=fields_of(fields, row_sampling=row_sampling),
        layout=layout,
        selection=replace(selection, seed=sampling.seed or 0),
        retry_errors=retry_errors,
        redo_changed=redo_changed,
        redo_all=Redo.ALL in redo,
        max_errors=ErrorLimit.of(max_errors),
        ordered=ordered,
        group_prefixes=group_prefixes,
        cache=cache,
        cache_scope=cache_scope(settings) if workers else "other workers",
        outputs=outputs,
        report=None if report is None else RunReport(report, Price.of(price)),
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


def _given_redis_url(flag: str | None) -> str | None:
    """The address that a flag or the environment names; None if neither does."""
    settings = QueueSettings.load(redis_url=flag)
    return settings.redis_url if settings.names_redis else None
