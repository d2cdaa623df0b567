"""What a run's own workers are started with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from engine.control_group import cpus_allowed
from workers.settings import WorkerSettings

__all__ = ["cache_scope", "model_of", "worker_environment"]


def worker_environment(
    flags: Mapping[str, Any], settings: WorkerSettings, num_workers: int
) -> dict[str, str]:
    """BATCHMILL_* for each of so many workers on this machine.

    :param flags: settings that were given; None: not
    :param settings: the same, with those of the environment
    """
    given = {
        **flags,
        "model": settings.model,
        "num_threads": settings.num_threads or _threads_each(num_workers),
    }
    environment = {"BATCHMILL_LOG_LEVEL": os.environ.get("BATCHMILL_LOG_LEVEL", "warning")}
    return environment | {
        f"BATCHMILL_{name.upper()}": str(value)
        for name, value in given.items()
        if value is not None
    }


def model_of(settings: WorkerSettings) -> str:
    """What the workers load, as far as the settings tell."""
    parts = [settings.model, settings.revision, settings.dtype, settings.quantization]
    if settings.generation_defaults != "model":
        parts.append(settings.generation_defaults)
    return "\n".join(str(part or "") for part in parts)


def cache_scope(settings: WorkerSettings) -> str:
    """The settings that a text depends on and neither the request nor the model's revision has."""
    return f"{settings.generation_defaults} {settings.max_model_len}"


def _threads_each(num_workers: int) -> int | None:
    """The CPUs that there are for us, shared out among the workers: more threads fight."""
    return max(1, cpus_allowed() // num_workers) if num_workers else None
