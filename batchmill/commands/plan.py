"""`batchmill plan`: which layers would run where."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from batchmill.commands.engine_options import EngineFlags, plan_engine_options
from workers.running.engines import engine_config, require_packages
from workers.settings import WorkerSettings

__all__ = ["plan"]


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
    from batchmill.commands.plan_report import make_plan, plan_table

    report = make_plan(engine_config(settings), measure=measure)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(plan_table(report))
