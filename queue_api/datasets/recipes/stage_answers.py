"""StageAnswers: what a stage said to each row, read where it is kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from queue_api.datasets.recipes.recipe import RecipeStage
from queue_api.datasets.recipes.validators import Validator, Verdict
from queue_api.datasets.written_answers import WrittenAnswers

__all__ = ["Outcome", "StageAnswers"]

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Outcome:
    """What came of a stage for one row."""

    line: Mapping[str, Any]
    """The row of the stage's file that counts."""
    text: str
    texts: Sequence[str] = ()
    """Of all samples."""
    verdict: Verdict = field(default_factory=Verdict)
    attempts: int = 1
    error: str = ""
    """Why there is no text."""

    @property
    def needs_repair(self) -> bool:
        """Whether another text may be valid, where this one isn't."""
        return not self.error and not self.verdict.is_valid and self.verdict.can_repair


class StageAnswers:
    """A stage's passes: the first, and one for each time that it was asked again for what was
    invalid."""

    def __init__(self, stage: RecipeStage) -> None:
        self.stage = stage
        self._validator = Validator(stage.checks, stage.name)
        self._passes: list[WrittenAnswers] = []

    def add(self, path: Path) -> None:
        """Take in another pass that is done."""
        self._passes.append(WrittenAnswers(path))

    @property
    def num_passes(self) -> int:
        """How many there are."""
        return len(self._passes)

    def close(self) -> None:
        """Let go of the files."""
        for each in self._passes:
            each.close()

    def outcome(self, row: int, columns: Mapping[str, Any]) -> Outcome | None:
        """What came of it for a row; None if it wasn't asked.

        :param columns: the row's, those of earlier stages, too
        """
        found: Outcome | None = None
        for attempt, written in enumerate(self._passes, 1):
            if found is not None and not found.needs_repair:
                break
            line = written.get(row)
            if line is None:
                break
            now = self._read(line, columns, attempt)
            if found is not None and now.error:
                break  # the text that there is, invalid as it is, says more
            found = now
        return found

    def to_repair(self, row: int, columns: Mapping[str, Any]) -> Outcome | None:
        """What the last pass said to a row, if another may say better."""
        found = self.outcome(row, columns)
        if found is None or not found.needs_repair or found.attempts < self.num_passes:
            return None
        return found

    def columns_of(self, found: Outcome | None, before: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that the stage adds to a row.

        :param before: those of the stages before, of which it may pick another text
        """
        stage, name = self.stage, self.stage.name
        columns: dict[str, Any] = dict.fromkeys(stage.columns)
        if found is None or found.error:
            return columns
        columns[name] = found.text
        if f"{name}_texts" in columns:
            columns[f"{name}_texts"] = [*found.texts]
        if stage.checks is not None:
            columns[f"{name}_valid"] = found.verdict.is_valid
            columns[f"{name}_invalid"] = found.verdict.reason
            columns[f"{name}_attempts"] = found.attempts
        if stage.picks is not None:
            columns |= _picked(stage.picks, found.text, before)
        return columns

    def _read(self, line: Mapping[str, Any], columns: Mapping[str, Any], attempt: int) -> Outcome:
        if line["finish_reason"] in ("error", "cancelled"):
            told = line.get("error") or line["finish_reason"]
            return Outcome(line, "", attempts=attempt, error=f"stage {self.stage.name!r}: {told}")
        texts = [each["text"] for each in line.get("outputs") or ()] or [line["text"]]
        if self.stage.checks is None:
            verdicts = [Verdict()] * len(texts)
        else:
            verdicts = [self._validator.judge(text, columns) for text in texts]
        best = _best(texts, [verdict.is_valid for verdict in verdicts], self.stage.best)
        return Outcome(line, texts[best], texts, verdicts[best], attempt)


def _best(texts: Sequence[str], is_valid: Sequence[bool], how: str) -> int:
    chosen = [i for i, valid in enumerate(is_valid) if valid] or [*range(len(texts))]
    if how == "longest":
        return max(chosen, key=lambda i: (len(texts[i]), -i))
    if how == "shortest":
        return min(chosen, key=lambda i: (len(texts[i]), i))
    if how == "vote":
        votes = Counter(texts[i].strip() for i in chosen)
        return max(chosen, key=lambda i: (votes[texts[i].strip()], -i))
    return chosen[0]


def _picked(name: str, said: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Another text for an earlier stage, if what was said names one."""
    texts = before.get(f"{name}_texts") or ()
    with suppress(AttributeError, ValueError):
        number = int(_NUMBER.search(said).group())  # type: ignore[union-attr]
        if 1 <= number <= len(texts):
            return {name: texts[number - 1], f"{name}_picked": number}
    return {f"{name}_picked": None}
