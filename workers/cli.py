"""The command `batchmill`: the producers' commands of queue_api.cli, `worker`, `run`, `plan`."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from queue_api.cli import app
from queue_api.command_line import (
    ChunkSize,
    QueueName,
    RedisUrl,
    RunId,
    Stopped,
    run_app,
    run_async,
    sampling_options,
)
from queue_api.datasets import DEFAULT_WINDOW
from queue_api.schemas import SamplingParams
from queue_api.settings import QueueSettings
from workers.engine_options import EngineFlags, plan_engine_options, worker_engine_options
from workers.engines import engine_config, require_packages
from workers.offline import OfflineRun, run_offline
from workers.report import sample_table, summary_table
from workers.settings import WorkerSettings
from workers.worker import run_worker

__all__ = ["main"]


@app.command()
@worker_engine_options
def worker(
    *,
    engine: EngineFlags,
    queues: Annotated[
        str | None,
        typer.Option(
            help="RQ queues to serve, the first before the next. "
            "Default: $BATCHMILL_QUEUES or batchmill.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Its name in RQ (host and pid).", show_default=False)
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """Serve queues until told to stop.

    SIGTERM drains: running requests get some time to finish, the rest go back to the queue. What
    isn't given here is read from BATCHMILL_* (docs/worker.md lists all of them).
    """
    settings = WorkerSettings.load(
        redis_url=redis_url,
        queues=queues,
        name=name,
        **engine,
    )
    require_packages(settings.model)
    logging.getLogger().setLevel(settings.log_level.upper())
    # RQ sets a level of its own and tells of each round of its housekeeping.
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
    # Of a prompt that is too long transformers says what isn't so here: it gets an error result.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    raise typer.Exit(run_worker(settings))


@app.command()
@sampling_options
@worker_engine_options
def run(
    input: Annotated[  # noqa: A002 - the name shown in the help
        str, typer.Argument(metavar="INPUT.jsonl", help="A row to a request; - is stdin.")
    ],
    *,
    output: Annotated[
        str, typer.Option("-o", "--output", help="A file, continued if it is there; - is stdout.")
    ],
    sampling: SamplingParams,
    engine: EngineFlags,
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
    redis_url: RedisUrl = None,
) -> None:
    """Answer a file of prompts on this machine: start workers, and Redis unless there is one.

    Each row is written once. Broken off, the same command goes on where it stopped. The
    workers serve a queue of the run's own unless --queue names one.
    """
    # Read here as the workers will: what is wrong is said once and before anything starts.
    settings = WorkerSettings.load(**engine)
    engine_config(settings)
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
        input=input,
        output=output,
        redis_url=_given_redis_url(redis_url),
        defaults=sampling,
        num_workers=workers,
        worker_environment=environment,
        run=run,
        queue=queue,
        chunk_size=chunk_size,
        window=window,
    )
    try:
        summary = run_async(run_offline(job, console))
    except Stopped:
        if output != "-":
            console.print("broken off; the same command goes on where this one stopped")
        raise
    if show and output != "-":
        console.print(sample_table(Path(output), show))
    console.print(summary_table(summary))


@app.command()
@plan_engine_options
def plan(
    model: Annotated[str, typer.Argument(help="A local folder, a Hub id, or `demo`.")],
    *,
    devices: Annotated[
        str, typer.Option(help="A device per stage, in order, such as cpu,cpu or cuda:0,cpu.")
    ] = "cpu",
    strategy: Annotated[
        str, typer.Option(help="uniform, memory, compute, mixed or custom.")
    ] = "uniform",
    engine: EngineFlags,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the devices, then load and run the stages.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Show which layers would run where, and what that takes; loads no weights.

    With --measure the stages are loaded and run, and what they took stands beside the prediction.
    """
    settings = WorkerSettings.load(model=model, stages=devices, partition=strategy, **engine)
    require_packages(settings.model)
    from workers.plan import make_plan, plan_table

    report = make_plan(engine_config(settings), measure=measure)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(plan_table(report))


def _given_redis_url(flag: str | None) -> str | None:
    """The address that a flag or the environment names; None if neither does."""
    settings = QueueSettings.load(redis_url=flag)
    return settings.redis_url if "redis_url" in settings.model_fields_set else None


def _threads_each(num_workers: int) -> int | None:
    """This machine's cores shared out among its workers: more threads than cores fight."""
    if not num_workers:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // num_workers)


ORDER = ["run", "worker", "submit", "status", "results", "cancel", "plan"]
app.registered_commands.sort(
    key=lambda command: ORDER.index(command.callback.__name__ if command.callback else "")
)


def main() -> None:
    """Run the command; ends the process with its exit code."""
    run_app(app)
