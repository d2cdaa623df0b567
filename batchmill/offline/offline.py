"""`batchmill run`: a file of prompts to a file of answers on this machine, in one command.

It starts what is missing (Redis, workers), feeds and collects through the queue like anyone
else, and stops what it started. All that must survive a crash is the output file: the same
command again goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import redis
from rich.console import Console
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from batchmill.offline.local_workers import LocalCluster
from batchmill.offline.report import progress_display
from batchmill.offline.run_report import RunReport
from queue_api.client.client import Client
from queue_api.connection.embedded import EmbeddedRedis
from queue_api.connection.settings import QueueSettings
from queue_api.datasets.error_limit import ErrorLimit
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.formats.row_sink import CERTIFICATE
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.layout.reader import BATCH_LINES
from queue_api.datasets.row_selection import RowSelection
from queue_api.datasets.run import DEFAULT_WINDOW, Dataset, open_dataset
from queue_api.datasets.run_statistics import RunStatistics
from queue_api.datasets.summary import Progress, RunSummary
from queue_api.store.jobs import GenerateQueue
from queue_api.store.run_store import RunStore
from queue_api.wire.errors import BatchmillError, ConfigurationError, RunIncompleteError
from queue_api.wire.plain_text import visible
from queue_api.wire.schemas import SamplingParams
from workers.running.engines import require_packages

__all__ = ["OfflineRun", "ServerEndedError", "answer", "check", "run_offline"]

LOOK_EVERY_S = 0.1
LANES_OF_OTHERS = 8
"""Of workers whose number isn't known: more lanes than workers cost little."""


class ServerEndedError(RunIncompleteError):
    """The private Redis of a run ended before the run did."""


@dataclass(frozen=True)
class OfflineRun:
    """What one `batchmill run` is to do."""

    inputs: Sequence[str]
    output: str
    redis_url: str | None
    """None: start a private one."""
    defaults: SamplingParams
    num_workers: int = 1
    """0: leave the work to workers that serve `queue` already."""
    worker_environment: dict[str, str] = field(default_factory=dict)
    """BATCHMILL_* for the workers: model, stages, …"""
    run: str | None = None
    queue: str | None = None
    """None: one of this run's own, so that no worker with another model serves it."""
    chunk_size: int | None = None
    window: int = DEFAULT_WINDOW
    """Requests that may be in Redis at a time."""
    model: str = ""
    """Names the model and how it is loaded, so that runs with others are others."""
    format: str | None = None
    """Of the input; None: its content tells."""
    fields: frozenset[str] | None = None
    """The columns that are read as their requests' fields; None: all with the name of one."""
    layout: Layout = field(default_factory=Layout)
    """Where in a row its prompt is."""
    selection: RowSelection | None = None
    """Which rows are asked for; None: all."""
    retry_errors: bool = False
    redo_changed: bool = False
    redo_all: bool = False
    max_errors: ErrorLimit | None = None
    ordered: bool = False
    group_prefixes: bool = False
    cache: str | None = None
    """A folder of results of earlier runs."""
    cache_scope: str = ""
    """The workers' settings that texts depend on."""
    outputs: OutputOptions = field(default_factory=OutputOptions)
    report: RunReport | None = None
    """A page about the run; None: none."""


async def run_offline(job: OfflineRun, console: Console) -> RunSummary:
    """Do the whole job; progress and the workers' words go to `console`.

    :raises BatchmillError: the input, the model, Redis or all workers can't be used
    """
    check(job)
    async with _files(job, console) as dataset:
        if dataset.data.how_read:
            told = dataset.data.how_read + _hint(job, dataset.data.how_read)
            console.print(told, markup=False, highlight=False, soft_wrap=True)
        if job.report is None:
            return await answer(job, dataset, console)
        with job.report.written_at_end(dataset, _shown(job), _warner(console)) as statistics:
            return await answer(job, dataset, console, statistics)


def _written(job: OfflineRun) -> Iterator[str]:
    """The files that the run writes."""
    if job.output != "-":
        yield job.output
        yield job.output + CERTIFICATE
    if errors := job.outputs.errors_of(job.output):
        yield errors


def _shown(job: OfflineRun) -> dict[str, Any]:
    """How the run was started, for a report: without addresses, which may have passwords."""
    prefix = "BATCHMILL_"
    workers = {
        name.removeprefix(prefix).lower().replace("_", " "): value
        for name, value in sorted(job.worker_environment.items())
        if name != f"{prefix}LOG_LEVEL"
    }
    given = {
        "sampling": job.defaults.model_dump(mode="json", exclude_unset=True) or "as the model's",
        "workers": job.num_workers or f"those that serve {job.queue}",
        "window": job.window,
        **{name: getattr(job, name) for name in ("chunk_size", "format", "cache")},
        **{
            name: getattr(job, name)
            for name in ("ordered", "retry_errors", "redo_changed", "redo_all")
        },
        "max_errors": _unlike(job.max_errors or ErrorLimit(), ErrorLimit()),
        "layout": _unlike(job.layout, Layout()),
        "selection": _unlike(job.selection or RowSelection(), RowSelection()),
        "outputs": _unlike(job.outputs, OutputOptions()),
    }
    given = {name.replace("_", " "): value for name, value in given.items() if value}
    return {"model": workers.pop("model", "the workers'"), **given, **workers}


def _unlike(given: Any, default: Any) -> dict[str, Any]:
    """What of an option's values isn't as it is without the option."""
    values = asdict(given).items()
    return {name: value for name, value in values if value and value != getattr(default, name)}


def _warner(console: Console) -> Callable[[str], None]:
    return lambda line: _show(console, f"WARNING {line}")


def _hint(job: OfflineRun, how_read: str) -> str:
    """Which output goes with an input that has one of its own; it isn't chosen unasked, since what
    a command writes is to depend on the command alone."""
    if job.outputs.format is not None or not how_read.startswith(BATCH_LINES):
        return ""
    return "; --output-format openai writes OpenAI's output and error files"


def _files(job: OfflineRun, console: Console) -> AbstractAsyncContextManager[Dataset]:
    """The files, looked at: what is wrong with one is told before anything is started."""
    return open_dataset(
        job.inputs,
        job.output,
        defaults=job.defaults,
        run=job.run,
        model=job.model,
        format=job.format,
        fields=job.fields,
        layout=job.layout,
        selection=job.selection,
        retry_errors=job.retry_errors,
        redo_changed=job.redo_changed,
        redo_all=job.redo_all,
        ordered=job.ordered,
        group_prefixes=(job.num_workers or LANES_OF_OTHERS) if job.group_prefixes else 0,
        outputs=job.outputs,
        warn=_warner(console),
    )


async def answer(
    job: OfflineRun, dataset: Dataset, console: Console, statistics: RunStatistics | None = None
) -> RunSummary:
    """Start what the job needs beside its files, have the rows answered, and stop it."""
    with _redis(job.redis_url) as (redis_url, server), progress_display(console) as display:
        queue = job.queue or f"run-{dataset.run_id}"
        environment = {
            **job.worker_environment,
            "BATCHMILL_REDIS_URL": redis_url,
            "BATCHMILL_QUEUES": queue,
        }
        settings = QueueSettings.load(redis_url=redis_url, queue=queue)
        cluster = LocalCluster(
            job.num_workers, environment, on_line=lambda line: _show(console, line)
        )
        async with Client(settings=settings) as client:
            await client.store.connect()
            async with cluster:
                generation = asyncio.create_task(
                    _generate(
                        job, client, dataset, cluster, show=display.update, statistics=statistics
                    )
                )
                summary = await _unless_cluster_ends(generation, cluster, server)
            if job.queue is None:
                await asyncio.to_thread(_forget_queue, client.store.rq_connection, queue)
            return summary


async def _generate(
    job: OfflineRun,
    client: Client,
    dataset: Dataset,
    cluster: LocalCluster,
    *,
    show: Callable[[Progress], None],
    statistics: RunStatistics | None,
) -> RunSummary:
    texts = 0

    def on_progress(progress: Progress) -> None:
        nonlocal texts
        show(progress)
        # an error may be the quarantine's: that a row is found to make workers crash isn't work
        before, texts = texts, progress.done - progress.errors
        if texts > before:
            cluster.refill()

    if job.num_workers:
        # Nothing is on the queue until a worker has loaded its model: one that refuses its
        # settings leaves no trace. Nor does loading count as queue time.
        await _until_served(client.store, client.settings.queue)
        cluster.refill()
    return await dataset.run(
        client,
        chunk_size=job.chunk_size,
        window=job.window,
        max_errors=job.max_errors,
        cache=job.cache,
        cache_scope=job.cache_scope,
        on_progress=on_progress,
        statistics=statistics,
    )


async def _until_served(store: RunStore, queue: str) -> None:
    """Wait until a worker has registered for the queue."""
    key = WORKERS_BY_QUEUE_KEY % queue
    while not await store.call(lambda: store.redis.scard(key)):  # noqa: ASYNC110
        await asyncio.sleep(LOOK_EVERY_S)  # RQ tells of a worker's birth nowhere but there


def _forget_queue(connection: redis.Redis, name: str) -> None:
    """Take a finished run's own queue out of RQ's lists, unless jobs of it failed."""
    queue = GenerateQueue(name, connection=connection, serializer="json")
    if not queue.failed_job_registry.get_job_count(cleanup=False):
        connection.delete(queue.finished_job_registry.key, WORKERS_BY_QUEUE_KEY % name)
        queue.delete(delete_jobs=False)


def _show(console: Console, line: str) -> None:
    """A line of a worker's, but for its last words: those become the run's own error."""
    if not line.startswith("batchmill: "):
        console.print(visible(line), markup=False, highlight=False, soft_wrap=True)


async def _unless_cluster_ends(
    generation: asyncio.Task[RunSummary], cluster: LocalCluster, server: EmbeddedRedis | None
) -> RunSummary:
    """The generation's outcome; the error of what it needs, should that end for good before."""
    if not cluster.num_workers:
        return await generation
    watches = [asyncio.create_task(cluster.watch())]
    if server is not None:
        watches.append(asyncio.create_task(_watch(server, cluster)))
    try:
        await asyncio.wait({generation, *watches}, return_when=asyncio.FIRST_COMPLETED)
        if not generation.done():
            for watch in watches:
                if watch.done():
                    watch.result()
        return await generation
    finally:
        for task in (*watches, generation):
            task.cancel()
        await asyncio.gather(*watches, generation, return_exceptions=True)


async def _watch(server: EmbeddedRedis, cluster: LocalCluster) -> None:
    """Wait for the private server's end, which nobody but this process would notice.

    It isn't started again: what ended it would most likely end it again, and the output file has
    all that a new run needs.

    :raises ServerEndedError: it ended
    """
    while (words := server.last_words) is None:  # noqa: ASYNC110 - its end is told nowhere
        await asyncio.sleep(LOOK_EVERY_S)
    cluster.kill()
    raise _ended(words)


def _ended(words: str) -> ServerEndedError:
    return ServerEndedError(
        f"the private Redis of this run ended ({words}); the same command goes on where this "
        "one stopped"
    )


@contextmanager
def _redis(url: str | None) -> Iterator[tuple[str, EmbeddedRedis | None]]:
    """The address, and the server if it is a private one."""
    if url is not None:
        yield url, None
        return
    with EmbeddedRedis() as server:
        try:
            yield server.url, server
        except BatchmillError:
            # whatever comes of its end first, that is what is to be told
            if (words := server.last_words) is not None:
                raise _ended(words) from None
            raise


def check(job: OfflineRun) -> None:
    """Find at once what would otherwise show up only after workers and Redis have started.

    The files are looked at when they are opened.

    :raises ConfigurationError: something is missing
    """
    if job.report is not None:
        job.report.check(_written(job))
    if not job.num_workers:
        if job.redis_url is None or job.queue is None:
            raise ConfigurationError(
                "--workers 0 leaves the work to others: name their --redis-url and --queue"
            )
        return
    require_packages(job.worker_environment["BATCHMILL_MODEL"])
