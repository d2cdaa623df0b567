"""`batchmill worker`: serve queues until told to stop."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from batchmill.commands.engine_options import EngineFlags, worker_engine_options
from batchmill.commands.options import RedisUrl
from workers.running.engines import require_packages
from workers.settings import WorkerSettings
from workers.worker import run_worker

__all__ = ["worker"]


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
