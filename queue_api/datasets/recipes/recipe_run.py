"""A recipe's stages one after the other, each a dataset run, and the output that comes of them.

A stage's answers stand in a file beside the output, `OUT.stages/NAME.jsonl`, and what a row is
asked depends on the input and the answers before. So a stage goes on after a crash as every run
does, and what changed makes those rows anew that are asked something else. Between lives nothing
else is remembered but which stages were done with what, so that they needn't be read again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from array import array
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from queue_api.datasets.dataset_input import DatasetInput
from queue_api.datasets.formats.opening import open_source
from queue_api.datasets.formats.row_sink import RowSink
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.recipes.check_stages import check_stages, stage_parser
from queue_api.datasets.recipes.recipe import Recipe, RecipeStage
from queue_api.datasets.recipes.recipe_output import RecipeOutput, RecipeSummary, open_output
from queue_api.datasets.recipes.stage_answers import StageAnswers
from queue_api.datasets.recipes.stage_source import (
    Condition,
    DoneStage,
    RepairSource,
    StageSource,
)
from queue_api.datasets.recipes.stages_done import StagesDone
from queue_api.datasets.row_numbers import chosen_rows
from queue_api.datasets.run import Dataset, open_dataset_of
from queue_api.datasets.summary import RunSummary
from queue_api.wire.errors import DatasetError

__all__ = ["Ask", "RecipeRun", "run_recipe"]

logger = logging.getLogger(__name__)

OUTPUT = "OUTPUT"
"""Its name among what is done; no stage can have it."""
Ask = Callable[[RecipeStage, str, Dataset], Awaitable[RunSummary]]
"""Has the rows of a pass answered: its stage, what to call the pass, and what it asks."""


@dataclass(frozen=True)
class RecipeRun:
    """What one life of a recipe is to do."""

    recipe: Recipe
    ask: Ask
    models: Sequence[str] = ()
    """For each stage, what tells its model from others, as far as that is known."""
    redo_changed: bool = False
    retry_errors: bool = False
    warn: Callable[[str], None] = logger.warning
    parts: dict[str, RunSummary] = field(default_factory=dict)
    """What the passes that were asked came to."""


async def run_recipe(run: RecipeRun) -> RecipeSummary:
    """Ask all stages, and write the output.

    :raises ConfigurationError: the recipe doesn't fit the input
    :raises DatasetError: a file can't be used, or an output belongs to another recipe or input
    """
    recipe = run.recipe
    source = open_source(recipe.inputs, format=recipe.format, output=recipe.output)
    with ExitStack() as stack:
        stack.callback(source.close)
        if not source.is_repeatable:
            raise DatasetError(
                f"{source.name} can be read only once, and a recipe reads it for every stage: "
                "write it into a file first"
            )
        conditions = [_conditions(stage) for stage in recipe.stages]
        said = [stack.enter_context(closing(StageAnswers(stage))) for stage in recipe.stages]
        await asyncio.to_thread(check_stages, recipe, source, conditions)
        sink = stack.enter_context(open_output(recipe, source, run.warn))
        chosen = DatasetInput(source, selection=recipe.rows.selection)
        is_chosen = await asyncio.to_thread(chosen_rows, chosen)
        folder = _folder(recipe.output)
        state = StagesDone(folder)
        done: list[DoneStage] = []
        for number, (stage, answers) in enumerate(zip(recipe.stages, said, strict=True)):
            model = run.models[number] if run.models else ""
            mark = _mark(source, recipe, done, stage.model_dump_json(), model)
            asking = _Stage(run, source, is_chosen, done, answers, conditions[number], folder)
            if run.retry_errors or not state.has(stage.name, mark):
                await asking.ask(model)
                state.note(stage.name, mark, asking.files)
            else:
                for file in asking.files:
                    answers.add(file)
            done.append(DoneStage(answers, *conditions[number], state.mark(stage.name)))
        output = RecipeOutput(recipe, StageSource(source, done), is_chosen)
        mark = _mark(source, recipe, done, recipe.model_dump_json(), "")
        return await asyncio.to_thread(_write, output, sink, state, mark, run.parts)


def _write(
    output: RecipeOutput,
    sink: RowSink,
    state: StagesDone,
    mark: str,
    parts: dict[str, RunSummary],
) -> RecipeSummary:
    """Bring the output up to what the stages said.

    :param mark: of what it depends on
    """
    if state.has(OUTPUT, mark):
        return RecipeSummary(**state.said(OUTPUT))
    summary = RecipeSummary(parts=parts)
    output.write(sink, summary)
    said = {name: value for name, value in asdict(summary).items() if name != "parts"}
    files = [Path(sink.name), sink.certificate]
    state.note(OUTPUT, mark, files, **said | {"is_unchanged": True})
    return summary


def _folder(output: str) -> Path:
    """Where the stages' files stand.

    :raises DatasetError: there can be no such folder
    """
    folder = Path(f"{output.rstrip('/')}.stages")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DatasetError(f"can't make {folder}: {error.strerror or error}") from None
    return folder


def _mark(
    source: RowSource, recipe: Recipe, done: Sequence[DoneStage], what: str, model: str
) -> str:
    """What tells answers of a stage from others: all that they depend on."""
    marks = [
        *source.identity(),
        recipe.rows.model_dump_json(),
        recipe.sampling.model_dump_json(exclude_unset=True),
        *(each.mark for each in done),
        what,
        model,
    ]
    return hashlib.blake2b("\0".join(marks).encode(errors="replace"), digest_size=16).hexdigest()


@dataclass
class _Stage:
    """One stage, asked after those that are done."""

    run: RecipeRun
    source: RowSource
    is_chosen: Callable[[int], bool]
    done: Sequence[DoneStage]
    answers: StageAnswers
    conditions: tuple[Condition | None, Condition | None]
    folder: Path

    @property
    def files(self) -> list[Path]:
        """Those of its passes that are there."""
        found = (self._file(attempt) for attempt in range(self.answers.stage.repair + 1))
        return [file for file in found if file.exists()]

    async def ask(self, model: str) -> None:
        """All passes."""
        stage, source = self.answers.stage, StageSource(self.source, self.done)
        numbers = await asyncio.to_thread(self._asked, source)
        await self._pass(0, source, numbers, model)
        for attempt in range(1, stage.repair + 1):
            numbers = await asyncio.to_thread(self._invalid, source)
            if not numbers:
                for later in range(attempt, stage.repair + 1):
                    self._file(later).unlink(missing_ok=True)
                return
            parser = partial(stage_parser, self.run.recipe, stage, source)
            again = RepairSource(source, self.answers, parser)
            await self._pass(attempt, again, numbers, model)

    async def _pass(
        self, attempt: int, source: RowSource, numbers: Sequence[int], model: str
    ) -> None:
        run, stage, file = self.run, self.answers.stage, self._file(attempt)
        name = f"{stage.name}, repair {attempt}" if attempt else stage.name
        opened = open_dataset_of(
            DatasetInput(source).of_rows(numbers),
            file,
            defaults=run.recipe.sampling_of(stage),
            layout=None if attempt else stage.layout,
            model=model,
            retry_errors=run.retry_errors,
            # what earlier stages said now, or what is wrong with a text, changes as it may
            redo_changed=run.redo_changed or attempt > 0,
            is_part=True,
            warn=run.warn,
        )
        async with opened as dataset:
            # with every row there, too: the workers' model is compared when they have loaded it
            if numbers:
                run.parts[name] = await run.ask(stage, name, dataset)
        self.answers.add(file)

    def _file(self, attempt: int) -> Path:
        name = self.answers.stage.name
        return self.folder / (f"{name}.repair{attempt}.jsonl" if attempt else f"{name}.jsonl")

    def _asked(self, source: StageSource) -> Sequence[int]:
        """The rows that the stage is asked with."""
        asked, when = array("Q"), self.conditions[0]
        for row, (_, sofar) in enumerate(source.so_far()):
            if self.is_chosen(row) and sofar.is_asked(when):
                asked.append(row)
        return asked

    def _invalid(self, source: StageSource) -> Sequence[int]:
        """The rows whose last text is invalid."""
        return array(
            "Q",
            (
                row
                for row, record in enumerate(source.records())
                if self.answers.to_repair(row, record.read) is not None
            ),
        )


def _conditions(stage: RecipeStage) -> tuple[Condition | None, Condition | None]:
    """:raises ConfigurationError: one of them isn't an expression"""
    when, keep = (
        text and Condition(text, f"'{what}' of stage {stage.name!r}")
        for what, text in (("when", stage.when), ("keep", stage.keep))
    )
    return when or None, keep or None
