"""Several turns of a row, each asked after the answer to the last: a pass over the input for each.

Each pass but the last writes its answers into a file beside the output, and is a run of its own, so
that any of them goes on after a crash as every run does. Rows with fewer turns than others begin
later: all end in the last pass, whose rows are the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from queue_api.datasets.written_answers import WrittenAnswers
from queue_api.wire.errors import DatasetError, InvalidRequestError

__all__ = ["Answers", "TurnPass", "place_of_answers"]

Messages = list[Any]


def place_of_answers(output: Path | str, number: int, total: int) -> Path:
    """Where the answers of a pass before the last stand; which turn of a row they are to depends on
    how many passes there are.

    :raises DatasetError: beside that output there can be no file
    """
    path = Path(output)
    if str(output) == "-" or "://" in str(output) or (path.exists() and not path.is_file()):
        raise DatasetError(
            f"several turns need an output file, beside which the answers to the first can stand; "
            f"{output} is none"
        )
    return path.with_name(f".{path.name}.turn{number}of{total}")


class Answers(WrittenAnswers):
    """The texts of a pass that is done, found by row; 8 bytes each are held."""

    def text(self, row: int) -> str:
        """A row's answer.

        :raises InvalidRequestError: it has an error instead
        """
        if (found := self.get(row)) is None:
            raise InvalidRequestError("an earlier turn has no answer")
        if found["finish_reason"] in ("error", "cancelled"):
            raise InvalidRequestError(
                f"an earlier turn has no answer: {found['error'] or found['finish_reason']}"
            )
        return str(found["text"])


@dataclass(frozen=True)
class TurnPass:
    """What one pass asks: of each row the messages up to the turn whose turn it is."""

    number: int
    """From 1."""
    total: int
    answers: Sequence[Answers] = field(default=())
    """Of the passes before."""

    def takes(self, turns: int) -> bool:
        """True if a row with so many turns has begun."""
        return turns > self.total - self.number

    def so_far(self, row: int, turns: int) -> list[str]:
        """The row's answers of the passes before.

        :raises InvalidRequestError: one is missing
        """
        if not self.takes(turns) or turns > self.total:
            raise InvalidRequestError(
                "an earlier turn has no answer"
            )  # never another's in its place
        return [answers.text(row) for answers in self.answers[self.total - turns :]]

    def messages(self, first: Messages, later: Sequence[str], answers: Sequence[str]) -> Messages:
        """What the row asks now.

        :param first: its messages up to its first turn
        """
        messages = [*first]
        for answer, turn in zip(answers, later, strict=False):
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": turn})
        return messages
