"""Find a model, cut it into stages and load them: what an engine is made of."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.config import EngineConfig
from engine.control_group import default_threads
from engine.models.checkpoint import Checkpoint
from engine.models.generation_config import ModelGeneration
from engine.models.model_files import diagnose_tokenizer
from engine.models.slicing import load_config, resolve_dtype
from engine.models.tokenizer import Tokenizer
from engine.plan import PartitionPlan
from engine.planning.costs import CostModel, plan_model
from engine.planning.memory import fitting_slots
from engine.planning.partition import plan_partition
from engine.planning.sizes import ModelSizes
from engine.sampling.model_defaults import ModelDefaults
from engine.stages.loading import load_stage
from engine.stages.pipeline import InlinePipeline, Pipeline, ThreadedPipeline
from engine.stages.stage import Stage
from engine.weights.format import weight_format
from queue_api.wire.errors import ConfigurationError, UnsupportedModelError

__all__ = [
    "LoadedModel",
    "check_devices",
    "length_limit",
    "load_model",
    "load_tokenizer",
    "make_pipeline",
    "num_cache_slots",
    "shares_prefixes",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its devices, without a cache."""

    name: str
    revision: str | None
    """Names the weights: a generation begun with one revision isn't resumed with another."""
    tokenizer: Tokenizer
    defaults: ModelDefaults
    """What its generation config asks for where a request doesn't."""
    stages: Sequence[Stage]
    max_model_len: int


def load_model(config: EngineConfig) -> LoadedModel:
    """Find the model, cut it into stages and load them.

    :raises ModelNotFoundError: no such folder or Hub id, or a file of it is missing
    :raises UnsupportedModelError: the model can't run here without a risk of wrong text
    :raises PartitionError: the partition doesn't fit the model
    :raises ConfigurationError: a device or a length that isn't there
    """
    started = time.perf_counter()
    trust = config.trust_remote_code
    checkpoint = Checkpoint.find(config.model, config.revision, trust_remote_code=trust)
    model_config = load_config(checkpoint, trust_remote_code=trust)
    check_devices(config.devices)
    dtype = resolve_dtype(config.dtype, model_config, config.devices)
    limit = length_limit(config, model_config.get_text_config())
    plan = _plan(checkpoint, model_config, dtype, config, limit)
    generation = ModelGeneration.load(checkpoint)
    tokenizer = _load_tokenizer(checkpoint, model_config, generation, trust_remote_code=trust)
    defaults = ModelDefaults(
        generation,
        eos_token_ids=tokenizer.eos_token_ids,
        vocab_size=tokenizer.vocab_size,
        mode=config.generation_defaults,
        device=config.devices[-1],
    )
    stages = _load_stages(checkpoint, model_config, plan, dtype, config, max_model_len=limit)
    revision = _revision(checkpoint, model_config, dtype, config)
    logger.info(
        "%s (%s) loaded in %.1f s: layers %s; %s; %s",
        *(checkpoint.name, revision, time.perf_counter() - started),
        *(plan, dtype, "/".join(stage.mode for stage in stages)),
    )
    return LoadedModel(checkpoint.name, revision, tokenizer, defaults, stages, limit)


def load_tokenizer(config: EngineConfig) -> tuple[Tokenizer, int]:
    """The tokenizer alone, without weights, and how many tokens a sequence may have.

    :raises ConfigurationError: as `load_model`
    """
    trust = config.trust_remote_code
    checkpoint = Checkpoint.find(config.model, config.revision, trust_remote_code=trust)
    model_config = load_config(checkpoint, trust_remote_code=trust)
    limit = length_limit(config, model_config.get_text_config())
    generation = ModelGeneration.load(checkpoint)
    return _load_tokenizer(checkpoint, model_config, generation, trust_remote_code=trust), limit


def _load_tokenizer(
    checkpoint: Checkpoint,
    model_config: Any,
    generation: ModelGeneration,
    *,
    trust_remote_code: bool,
) -> Tokenizer:
    try:
        return Tokenizer.load(
            checkpoint, model_config, generation, trust_remote_code=trust_remote_code
        )
    except MemoryError:
        raise
    except Exception as error:  # tokenizers and their Python classes fail in many ways
        reason = diagnose_tokenizer(checkpoint.folder, error)
        raise UnsupportedModelError(reason) from error


def _revision(
    checkpoint: Checkpoint, model_config: Any, dtype: torch.dtype, config: EngineConfig
) -> str | None:
    """Which model it is that the texts depend on: the files, and what was chosen about them."""
    published = checkpoint.revision
    if dtype != resolve_dtype("auto", model_config, config.devices):
        published = f"{published}+{str(dtype).removeprefix('torch.')}"
    if config.generation_defaults != "model":
        published = f"{published}+defaults-{config.generation_defaults}"
    return weight_format(config.quantization).revision(published)


def _plan(
    checkpoint: Checkpoint,
    model_config: Any,
    dtype: torch.dtype,
    config: EngineConfig,
    max_model_len: int,
) -> PartitionPlan:
    if config.partition in {"uniform", "custom"}:  # no costs are needed
        num_layers = model_config.get_text_config().num_hidden_layers
        return plan_partition(num_layers, config.devices, config.partition, config.layer_bounds)
    sizes = ModelSizes.read(checkpoint, model_config)
    small = weight_format(config.quantization).small_params(
        model_config, trust_remote_code=config.trust_remote_code
    )
    costs = CostModel.nominal(sizes, dtype.itemsize, config.devices, small)
    return plan_model(config, costs, max_model_len)


def _load_stages(
    checkpoint: Checkpoint,
    model_config: object,
    plan: PartitionPlan,
    dtype: torch.dtype,
    config: EngineConfig,
    *,
    max_model_len: int,
) -> list[Stage]:
    return [
        load_stage(
            checkpoint,
            model_config,
            spec,
            dtype,
            use_cache=config.use_cache,
            longest=max_model_len,
            weights=weight_format(config.quantization),
            trust_remote_code=config.trust_remote_code,
        )
        for spec in plan.stages
    ]


def make_pipeline(config: EngineConfig, stages: Sequence[Stage]) -> Pipeline:
    """Inline if all stages share a device, else a thread each, unless the config says how."""
    inline = len({stage.device for stage in stages}) == 1
    if config.pipeline != "auto":
        inline = config.pipeline == "inline"
    num_threads = config.num_threads or default_threads()
    return (InlinePipeline if inline else ThreadedPipeline)(stages, num_threads)


def shares_prefixes(config: EngineConfig, stages: Sequence[Stage]) -> bool:
    """Caches outside the pools, as single stages have them, aren't shared."""
    packed = all(stage.mode == "packed" for stage in stages)
    return config.prefix_caching and config.use_cache and packed


def num_cache_slots(config: EngineConfig, stages: Sequence[Stage], max_model_len: int) -> int:
    """Slots of the cache: as asked for, else what fits, up to what can be used."""
    if config.kv_cache_tokens is not None:
        return config.kv_cache_tokens
    useful = config.max_num_seqs * max_model_len
    if not config.use_cache:
        return useful
    fitting = fitting_slots((stage.device, stage.slot_bytes) for stage in stages)
    if fitting is None:
        return useful
    if fitting < 1:
        raise ConfigurationError("no memory left for the KV cache beside the weights")
    return min(useful, fitting)


def length_limit(config: EngineConfig, text_config: object) -> int:
    """Tokens that a sequence may have: the model's limit, or a lower one that was asked for."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(limit := getattr(text_config, name, None), int):
            break
    else:
        limit = config.max_model_len
    if limit is None:
        raise UnsupportedModelError("the model names no maximum length; set max_model_len")
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigurationError(
            f"max_model_len {config.max_model_len} is above the model's limit of {limit}"
        )
    return min(limit, config.max_model_len or limit)


def check_devices(devices: Sequence[str]) -> None:
    """See that they are there.

    :raises ConfigurationError: naming the first that isn't
    """
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigurationError(f"no such device: {name!r}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigurationError(
                f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
            )
