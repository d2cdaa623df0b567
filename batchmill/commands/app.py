"""The command `batchmill`: a file beside this one to each of its commands."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from batchmill.commands.cancel import cancel
from batchmill.commands.options import run_app
from batchmill.commands.plan import plan
from batchmill.commands.results import results
from batchmill.commands.run import run
from batchmill.commands.status import status
from batchmill.commands.submit import submit
from batchmill.commands.verify import verify
from batchmill.commands.worker import worker

__all__ = ["app", "main"]

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


for command in (run, verify, worker, submit, status, results, cancel, plan):
    app.command()(command)


def main() -> None:
    """Run the command; ends the process with its exit code."""
    run_app(app)
