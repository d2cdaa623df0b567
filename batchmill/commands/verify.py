"""`batchmill verify`: whether an output is still what its certificate says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from batchmill.commands.engine_options import EngineFlags, worker_engine_options
from batchmill.commands.layout_options import sample_of
from batchmill.commands.options import InputFormat, tell
from batchmill.offline.remaking import Remade, counts, remake
from queue_api.datasets.remake import read_asked
from queue_api.datasets.row_selection import RowSelection
from queue_api.datasets.verify import Verdict, verify_output
from queue_api.wire.errors import ConfigurationError, DatasetError
from workers.running.engines import engine_config
from workers.settings import WorkerSettings

__all__ = ["verify"]

MOST_SAID = 100
INCOMPLETE = 3


@worker_engine_options
def verify(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Of `batchmill run`.")],
    *,
    engine: EngineFlags,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%",
            help="Make N rows again, or about P% of them, drawn at random, and compare the texts.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes which rows those are.")] = 0,
    input: Annotated[  # noqa: A002 - the name of the option
        list[str] | None,
        typer.Option(
            help="What the rows were made of, where the output doesn't have all of it; may be "
            "repeated.",
            show_default=False,
        ),
    ] = None,
    format: InputFormat = None,  # noqa: A002
) -> None:
    """Compare an output with the certificate that its run left beside it.

    What is missing, doubled, torn or changed is named, a line each; exit code 3 if anything is, 2
    without a certificate. Nothing is written. With --sample, rows are made again with the model
    and partition that the options name, and each is equal, a near-tie or different.
    """
    if sample is None and (input or format or any(value is not None for value in engine.values())):
        raise ConfigurationError("options of the input and the engine are for --sample N or P%")
    selection = None if sample is None else replace(sample_of(sample), seed=seed)
    verdict = verify_output(output)
    _say(verdict)
    if verdict.problems:
        tell(f"{output} isn't what its certificate says")
    else:
        tell(f"{output}: {verdict.rows:,} rows, each as certified")
    is_same = selection is None or _make_again(output, selection, engine, input or (), format)
    if verdict.problems or not is_same:
        raise typer.Exit(INCOMPLETE)


def _say(verdict: Verdict) -> None:
    for problem in verdict.problems[:MOST_SAID]:
        typer.echo(problem)
    if (more := len(verdict.problems) - MOST_SAID) > 0:
        typer.echo(f"and {more:,} more")
    for note in verdict.notes:
        tell(note)


def _make_again(
    output: str,
    selection: RowSelection,
    engine: EngineFlags,
    inputs: Sequence[str],
    format: str | None,  # noqa: A002
) -> bool:
    """True unless a row of the sample is different.

    :raises DatasetError: none of them can be made again
    """
    settings = WorkerSettings.load(**engine)
    engine_config(settings)
    asked = read_asked(output, selection, inputs, format)
    why_not = [each.why_not for each in asked]
    if asked and all(why_not):
        raise DatasetError(f"none of {len(asked):,} rows can be made again: {why_not[0]}")
    remade: list[Remade] = []
    for each in remake(asked, settings, tell):
        remade.append(each)
        if each.verdict != "equal":
            typer.echo(str(each))
    tell(counts(remade))
    return all(each.verdict != "different" for each in remade)
