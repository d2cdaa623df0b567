"""`batchmill run RECIPE`: the stages of a recipe on this machine, each with workers of its own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from batchmill.offline.offline import OfflineRun, answer, check
from batchmill.offline.worker_setup import cache_scope, model_of, worker_environment
from queue_api.datasets.error_limit import ErrorLimit
from queue_api.datasets.recipes.recipe import Recipe, RecipeStage
from queue_api.datasets.recipes.recipe_output import RecipeSummary
from queue_api.datasets.recipes.recipe_run import RecipeRun, run_recipe
from queue_api.datasets.run import Dataset
from queue_api.datasets.summary import RunSummary
from queue_api.wire.errors import ConfigurationError
from workers.running.engines import engine_config
from workers.settings import WorkerSettings

__all__ = ["RecipeOptions", "run_offline_recipe"]


@dataclass(frozen=True)
class RecipeOptions:
    """What is said beside a recipe."""

    redis_url: str | None
    """None: start a private one for each stage."""
    engine_settings: frozenset[str]
    """What a recipe's `engine` may name."""
    workers: int | None = None
    """Instead of the recipe's."""
    redo_changed: bool = False
    retry_errors: bool = False
    max_errors: ErrorLimit | None = None
    cache: str | None = None


async def run_offline_recipe(
    recipe: Recipe, options: RecipeOptions, console: Console, warn: Callable[[str], None]
) -> RecipeSummary:
    """Do all of it.

    :raises ConfigurationError: the recipe can't be done like that
    :raises BatchmillError: as run_offline
    """
    jobs = {stage.name: _job_of(recipe, options, stage) for stage in recipe.stages}
    for each in jobs.values():
        check(each)

    async def ask(stage: RecipeStage, name: str, dataset: Dataset) -> RunSummary:
        console.print(f"stage {name}", markup=False, highlight=False)
        return await answer(jobs[stage.name], dataset, console)

    run = RecipeRun(
        recipe,
        ask,
        [jobs[stage.name].model for stage in recipe.stages],
        redo_changed=options.redo_changed,
        retry_errors=options.retry_errors,
        warn=warn,
    )
    return await run_recipe(run)


def _job_of(recipe: Recipe, options: RecipeOptions, stage: RecipeStage) -> OfflineRun:
    """How a stage's rows are answered."""
    queue = stage.queue or (None if stage.model or stage.engine else recipe.queue)
    own = stage.workers if stage.workers is not None else recipe.workers
    workers = (
        0 if queue is not None else next(n for n in (options.workers, own, 1) if n is not None)
    )
    flags: dict[str, Any] = {"model": stage.model or recipe.model}
    for name, value in (recipe.engine | stage.engine).items():
        if name not in options.engine_settings:
            close = difflib.get_close_matches(name, options.engine_settings, 1)
            names = ", ".join(sorted(options.engine_settings))
            raise ConfigurationError(
                f"stage {stage.name!r}: 'engine' has no setting {name!r}; "
                + (f"write {close[0]!r}" if close else f"there are {names}")
            )
        flags[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    try:
        settings = WorkerSettings.load(**flags)
        engine_config(settings)
    except ConfigurationError as error:
        raise ConfigurationError(f"stage {stage.name!r}: {error}") from None
    defaults = recipe.sampling_of(stage)
    if flags.get("generation_defaults") is not None:
        defaults = defaults.model_copy(update={"generation_defaults": flags["generation_defaults"]})
    return OfflineRun(
        inputs=(),
        output="",
        redis_url=options.redis_url,
        defaults=defaults,
        num_workers=workers,
        worker_environment=worker_environment(flags, settings, workers),
        queue=queue,
        model=_with_files(model_of(settings), settings.model) if workers else "",
        max_errors=options.max_errors,
        cache=options.cache,
        cache_scope=cache_scope(settings) if workers else "other workers",
    )


def _with_files(model: str, name: str) -> str:
    """What a model is called, and where that is a folder, the states of its files."""
    folder = Path(name)
    if not folder.is_dir():
        return model
    infos = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    return model + json.dumps([(name, info.st_size, info.st_mtime_ns) for name, info in infos])
