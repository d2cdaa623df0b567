"""Which engine a worker runs. Torch is imported here and not before."""

from __future__ import annotations

import importlib.util

from engine.config import EngineConfig
from engine.demo_model import DEMO_MODEL_PATH
from queue_api.wire.errors import MissingExtraError
from workers.running.echo_engine import ECHO_PREFIX, EchoEngine
from workers.running.engine_loop import Engine
from workers.settings import DEMO_MODEL, WorkerSettings

__all__ = ["engine_config", "load_engine", "require_packages"]


def require_packages(model: str) -> None:
    """Look whether what runs this model is installed, without importing it.

    :raises MissingExtraError: torch or transformers isn't
    """
    if model.startswith(ECHO_PREFIX):
        return
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"{package} isn't installed; workers need it: pip install 'batchmill[worker]'"
            )


def engine_config(settings: WorkerSettings) -> EngineConfig:
    """What the settings say about the engine."""
    return EngineConfig(
        model=str(DEMO_MODEL_PATH) if settings.model == DEMO_MODEL else settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        quantization=settings.quantization,
        devices=tuple(settings.stages),
        partition=settings.partition,
        layer_bounds=None if settings.layer_bounds is None else tuple(settings.layer_bounds),
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        max_model_len=settings.max_model_len,
        prefix_caching=settings.prefix_caching,
        num_threads=settings.num_threads,
        generation_defaults=settings.generation_defaults,
        trust_remote_code=settings.trust_remote_code,
    )


def load_engine(settings: WorkerSettings) -> Engine:
    """Load the model of the settings.

    :raises MissingExtraError: torch or transformers isn't installed
    :raises ConfigurationError: no model named, or it can't be loaded
    """
    if settings.model.startswith(ECHO_PREFIX):
        return EchoEngine.from_name(settings.model)
    require_packages(settings.model)
    from engine.engine import Engine as TorchEngine

    engine: Engine = TorchEngine.load(engine_config(settings))
    return engine
