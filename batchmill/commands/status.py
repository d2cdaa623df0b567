"""`batchmill status`: how far a run is."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from batchmill.commands.options import RedisUrl, RunArgument, open_client, run_async
from queue_api.store.runs import RunStatus
from queue_api.wire.plain_text import on_one_line

__all__ = ["status", "total_of"]


def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    redis_url: RedisUrl = None,
) -> None:
    """Show how far a run is."""

    async def work() -> RunStatus:
        async with open_client(redis_url) as client:
            return await client.status(run)

    found = run_async(work())
    if as_json:
        typer.echo(json.dumps({**asdict(found), "complete": found.complete}))
    else:
        Console().print(_status_table(found))


def total_of(status: RunStatus) -> str:
    """How many requests a run has, as far as it is known."""
    return "?" if status.total is None else str(status.total)


def _status_table(status: RunStatus) -> Table:
    table = Table(title=f"run {escape(status.id)}", show_header=False, title_justify="left")
    state = "complete" if status.complete else "cancelled" if status.cancelled else "in progress"
    table.add_row("state", state)
    table.add_row("done", f"{status.done} of {total_of(status)}")
    for reason, count in sorted(status.finish_reasons.items()):
        table.add_row(f"  {_plain(reason)}", str(count))
    for job_state, count in sorted(status.jobs.items()):
        table.add_row(f"jobs {_plain(job_state)}", str(count))
    table.add_row("prompt tokens", str(status.prompt_tokens))
    table.add_row("generated tokens", str(status.completion_tokens))
    table.add_row("queue", _plain(status.queue))
    created = datetime.fromtimestamp(status.created_at, UTC)
    table.add_row("submitted", created.strftime("%Y-%m-%d %H:%M:%S UTC"))
    return table


def _plain(text: str) -> str:
    """What stands in Redis may be a stranger's."""
    return escape(on_one_line(text))
