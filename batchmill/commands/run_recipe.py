"""`batchmill run RECIPE`: a recipe's file instead of an input."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from batchmill.commands.options import Stopped, run_async, tell
from batchmill.offline.recipe import RecipeOptions, run_offline_recipe
from batchmill.offline.report import sample_table
from queue_api.datasets.error_limit import ErrorLimit
from queue_api.datasets.recipes.recipe_file import read_recipe
from queue_api.datasets.recipes.recipe_output import RecipeSummary
from queue_api.wire.errors import ConfigurationError, RowsFailedError

__all__ = ["check_options", "is_given", "run_recipe_file"]

ALLOWED = frozenset(
    {
        "input",
        "output",
        "workers",
        "show",
        "redis_url",
        "redo",
        "redo_changed",
        "retry_errors",
        "max_errors",
        "fail_on_error",
        "cache",
    }
)
"""The options that make sense beside a recipe; what the others say stands in it."""


def check_options(context: typer.Context, inputs: Sequence[str], *, dry_run: bool) -> None:
    """:raises ConfigurationError: an option is given that belongs into the recipe"""
    if len(inputs) > 1:
        raise ConfigurationError("a recipe is run alone: its 'in' names the inputs")
    if dry_run:
        raise ConfigurationError(
            "--dry-run is of one question; of a recipe try the first rows: 'rows: {limit: 5}'"
        )
    if is_given(context, "report") or is_given(context, "price"):
        raise ConfigurationError("--report is of one question; a recipe has none yet")
    for parameter in context.command.params:
        if parameter.name not in ALLOWED and is_given(context, parameter.name or ""):
            raise ConfigurationError(
                f"{parameter.opts[-1]} belongs into the recipe; beside one there are "
                + ", ".join(sorted(f"--{name.replace('_', '-')}" for name in ALLOWED - {"input"}))
            )


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the command line has that option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def run_recipe_file(
    name: str, output: str | None, options: RecipeOptions, *, show: int, fail_on_error: bool
) -> None:
    """Do what a recipe's file says, and tell what came of it.

    :raises RowsFailedError: all rows have errors, or more than the options put up with
    """
    recipe = read_recipe(name)
    if output is not None:
        recipe = recipe.model_copy(update={"output": output})
    console = Console(stderr=True)
    try:
        summary = run_async(run_offline_recipe(recipe, options, console, tell))
    except Stopped:
        console.print("broken off; the same command goes on where this one stopped")
        raise
    if show:
        console.print(sample_table(recipe.output, recipe.outputs, show))
    console.print(_table(summary, recipe.output))
    _judge(summary, ErrorLimit(rows=0) if fail_on_error else options.max_errors)


def _table(summary: RecipeSummary, output: str) -> Table:
    table = Table(title=f"recipe to {escape(output)}", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    if summary.is_unchanged:
        table.add_row("nothing has changed", "")
    for name, part in summary.parts.items():
        asked = f"{part.rows:,} rows, {part.completion_tokens:,} tokens in {part.elapsed_s:.1f} s"
        table.add_row(f"asked: {escape(name)}", asked)
    table.add_row("rows", f"{summary.rows:,}")
    if summary.left_out:
        table.add_row("left out", f"{summary.left_out:,}")
    table.add_row("errors", f"{summary.errors:,}")
    for name, count in summary.invalid.items():
        table.add_row(f"invalid: {escape(name)}", f"{count:,}")
    return table


def _judge(summary: RecipeSummary, limit: ErrorLimit | None) -> None:
    if 0 < summary.rows == summary.errors:
        raise RowsFailedError(
            f"all {summary.rows:,} rows have errors; the first: {summary.first_error}"
        )
    if limit is not None and (told := limit.exceeded(summary.errors, summary.rows)):
        raise RowsFailedError(told)
