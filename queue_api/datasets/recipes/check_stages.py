"""Whether a recipe's stages fit its input, before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from queue_api.datasets.columns import RowParser, say_nothing
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_source import RowSource
from queue_api.datasets.recipes.recipe import Recipe, RecipeStage
from queue_api.datasets.recipes.stage_source import Condition, check_columns
from queue_api.wire.errors import ConfigurationError, RequestError

__all__ = ["check_stages", "stage_parser"]

ROWS = 200


def check_stages(
    recipe: Recipe,
    source: RowSource,
    conditions: Sequence[tuple[Condition | None, Condition | None]],
) -> None:
    """Try each stage on the first rows, with something in the place of what isn't said yet.

    :raises ConfigurationError: a stage fails on all of those that the first one can be asked with
    :raises DatasetError: the input has a column of a stage's name
    """
    records = list(islice(source.records(), ROWS))
    added = {name for stage in recipe.stages for name in stage.columns}
    for record in records:
        check_columns(record, added, source.place)
    for stage, (when, keep) in zip(recipe.stages, conditions, strict=True):
        where = f"stage {stage.name!r}"
        _try(records, f"'when' of {where}", partial(_hold, when))
        try:
            parser = stage_parser(recipe, stage, source)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from None
        good = _try(records, where, partial(_ask, parser))
        if stage is recipe.stages[0]:
            records = good
        example = _example(stage)
        records = [replace(record, read={**record.read, **example}) for record in records]
        _try(records, f"'keep' of {where}", partial(_hold, keep))


def stage_parser(recipe: Recipe, stage: RecipeStage, source: RowSource) -> RowParser:
    """Of rows as a stage is asked with them.

    :raises ConfigurationError: its templates can't be used
    """
    return RowParser(
        recipe.sampling_of(stage), warn=say_nothing, layout=stage.layout, place=source.place
    )


def _try(records: Sequence[Record], what: str, use: Callable[[Record], object]) -> list[Record]:
    """Those that it can be done with."""
    good: list[Record] = []
    wrong = ""
    for record in records:
        try:
            use(record)
            good.append(record)
        except RequestError as error:
            wrong = wrong or str(error)
    if wrong and not good:
        raise ConfigurationError(f"{what} fails on the first {len(records)} rows: {wrong}")
    return good


def _hold(condition: Condition | None, record: Record) -> None:
    if condition is not None:
        condition.holds(record.read)


def _ask(parser: RowParser, record: Record) -> None:
    request = parser.parse(record).request
    if isinstance(request, RequestError):
        raise request


def _example(stage: RecipeStage) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    for name in stage.columns:
        if name.endswith("_texts"):
            values[name] = ["1"] * stage.sampling.n
        elif name.endswith("_valid"):
            values[name] = True
        elif name.endswith(("_attempts", "_picked")):
            values[name] = 1
        else:
            values[name] = "1"
    return values
