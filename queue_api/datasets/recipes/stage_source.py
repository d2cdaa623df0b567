"""StageSource: the rows of an input with what earlier stages said to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from queue_api.datasets.columns import RowParser
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.formats.wrapped_source import WrappedSource
from queue_api.datasets.layout.template import RowTemplate
from queue_api.datasets.recipes.recipe import RecipeStage
from queue_api.datasets.recipes.stage_answers import Outcome, StageAnswers
from queue_api.wire.errors import DatasetError, InvalidRequestError, RequestError
from queue_api.wire.schemas import GenerationRequest

__all__ = ["Condition", "DoneStage", "RepairSource", "RowSoFar", "StageSource", "check_columns"]


class Condition:
    """A Jinja expression over the columns of a row.

    :raises ConfigurationError: it isn't one
    """

    def __init__(self, expression: str, what: str) -> None:
        source = expression.strip()
        if source.startswith("{{") and source.endswith("}}"):
            source = source[2:-2]
        self._template = RowTemplate(f"{{% if {source} %}}x{{% endif %}}", what)

    @property
    def names(self) -> frozenset[str]:
        """The columns that it names."""
        return self._template.names

    def holds(self, columns: Mapping[str, Any]) -> bool:
        """Whether it is true of a row.

        :raises InvalidRequestError: it can't be said
        """
        return bool(self._template.render(columns))


@dataclass(frozen=True)
class DoneStage:
    """A stage that has been asked."""

    answers: StageAnswers
    when: Condition | None
    keep: Condition | None
    mark: str
    """Tells its answers from others."""

    @property
    def stage(self) -> RecipeStage:
        """What it is."""
        return self.answers.stage


class RowSoFar:
    """What came of the stages up to one of them, for a row.

    :param read: the input's columns
    """

    def __init__(self, read: Mapping[str, Any]) -> None:
        self.columns: dict[str, Any] = {**read}
        self.added: dict[str, Any] = {}
        self.outcomes: list[Outcome | None] = []
        self.error = ""
        """Why no later stage is asked."""
        self.is_kept = True

    def is_asked(self, when: Condition | None) -> bool:
        """Whether a stage is asked after these."""
        if self.error or not self.is_kept:
            return False
        return self._holds(when)

    def take(self, done: DoneStage, row: int) -> None:
        """The next stage's part."""
        found = None
        if self.is_asked(done.when):
            found = done.answers.outcome(row, self.columns)
        self.outcomes.append(found)
        added = done.answers.columns_of(found, self.columns)
        self.added |= added
        self.columns |= added
        if found is not None and found.error:
            self.error = found.error
        elif found is not None:
            self.is_kept = self._holds(done.keep)

    @property
    def last(self) -> Outcome | None:
        """Of the last stage that was asked."""
        return next((found for found in reversed(self.outcomes) if found is not None), None)

    def _holds(self, condition: Condition | None) -> bool:
        try:
            return condition is None or condition.holds(self.columns)
        except InvalidRequestError as error:
            self.error = str(error)
            return False


class StageSource(WrappedSource):
    """Records with the columns that stages which are done have added."""

    def close(self) -> None:
        """The input is for other stages, too."""

    def __init__(self, whole: RowSource, done: Sequence[DoneStage]) -> None:
        super().__init__(whole)
        self._done = done

    def so_far(self) -> Iterator[tuple[Record, RowSoFar]]:
        """Every row with what came of the stages.

        :raises DatasetError: the input can't be read on, or has a column of a stage's name
        """
        added = {name for done in self._done for name in done.stage.columns}
        for row, record in enumerate(self._whole.records()):
            check_columns(record, added, self.place)
            sofar = RowSoFar(record.read)
            for done in self._done:
                sofar.take(done, row)
            yield record, sofar

    def records(self) -> Iterator[Record]:
        for record, sofar in self.so_far():
            shown = {**record.shown, **sofar.added}
            yield replace(record, shown=shown, read=sofar.columns)

    def identity(self) -> list[str]:
        return [*self._whole.identity(), *(done.mark for done in self._done)]


def check_columns(record: Record, added: Set[str], place: Callable[[int], str]) -> None:
    """See that a row has none of the columns that stages add.

    :raises DatasetError: it has
    """
    if both := record.read.keys() & added:
        raise DatasetError(
            f"{place(record.number)} has a column {min(both)!r}, which is a stage's: name that "
            "otherwise"
        )


class RepairSource(WrappedSource):
    """The requests of a stage, where its last text is invalid with that and what is wrong with it.

    :param source: the rows as the stage is asked with them
    :param answers: what it has said so far
    :param parser: of such rows
    """

    def __init__(
        self, source: StageSource, answers: StageAnswers, parser: Callable[[], RowParser]
    ) -> None:
        super().__init__(source)
        self._answers, self._parser = answers, parser
        stage = answers.stage
        self._message = RowTemplate(
            stage.repair_message, f"the repair_message of stage {stage.name!r}"
        )

    def records(self) -> Iterator[Record]:
        parser = self._parser()
        for row, record in enumerate(self._whole.records()):
            record.row = row
            asked = parser.parse(record).request
            found = self._answers.to_repair(row, record.read)
            if found is None or isinstance(asked, RequestError):
                yield Record(number=record.number, error=InvalidRequestError("nothing to repair"))
                continue
            try:
                reason = {"reason": found.verdict.reason}
                said = self._message.render({**record.read, **reason})
                read = _asked_again(asked, found.text, said)
                yield replace(record, shown={"id": asked.id}, read=read, raw=None)
            except InvalidRequestError as error:
                yield replace(record, error=error)

    def identity(self) -> list[str]:
        return [*self._whole.identity(), f"repair {self._answers.num_passes}"]


def _asked_again(request: GenerationRequest, text: str, said: str) -> dict[str, Any]:
    """The fields of the request that asks for another text."""
    fields = request.model_dump(mode="json", exclude_unset=True)
    fields |= fields.pop("sampling", None) or {}
    if request.messages is not None:
        fields["messages"] = [
            *fields["messages"],
            {"role": "assistant", "content": text},
            {"role": "user", "content": said},
        ]
    elif isinstance(request.prompt, str):
        fields["prompt"] = f"{request.prompt}{text}\n\n{said}\n\n"
    else:
        raise InvalidRequestError("a prompt of token ids can't be asked again with a reason")
    return fields
