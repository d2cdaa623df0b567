"""`batchmill verify`: whether an output is still what its certificate says."""

from __future__ import annotations

from typing import Annotated

import typer

from batchmill.commands.options import tell
from queue_api.datasets.verify import verify_output

__all__ = ["verify"]

MOST_SAID = 100
INCOMPLETE = 3


def verify(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Of `batchmill run`.")],
) -> None:
    """Compare an output with the certificate that its run left beside it.

    What is missing, doubled, torn or changed is named, a line each; exit code 3 if anything is, 2
    without a certificate. Nothing is written.
    """
    verdict = verify_output(output)
    for problem in verdict.problems[:MOST_SAID]:
        typer.echo(problem)
    if (more := len(verdict.problems) - MOST_SAID) > 0:
        typer.echo(f"and {more:,} more")
    for note in verdict.notes:
        tell(note)
    if verdict.problems:
        tell(f"{output} isn't what its certificate says")
        raise typer.Exit(INCOMPLETE)
    tell(f"{output}: {verdict.rows:,} rows, each as certified")
