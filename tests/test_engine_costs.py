"""What the planner believes of a model, beside transformers' own instance of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kits.engine_models import LAYERS, mixed_prompts, requests, tiny_model

from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.checkpoint import Checkpoint
from engine.models.slicing import load_config
from engine.planning.costs import DECODE, CostModel, plan_model
from engine.planning.partition import plan_partition
from engine.planning.sizes import ModelSizes
from queue_api.wire.errors import PartitionError

MODELS = ["llama", "qwen2", "gpt2", "gemma2"]
DEVICES = ("cuda:0", "cuda:1")


def sizes_of(name: str) -> ModelSizes:
    checkpoint = Checkpoint.find(str(tiny_model(name).folder))
    return ModelSizes.read(checkpoint, load_config(checkpoint))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_transformers_counts_them(name: str) -> None:
    sizes = sizes_of(name)
    model = tiny_model(name).reference
    whole = plan_partition(LAYERS, ["cpu"]).stages[0]
    assert sizes.stage_params(whole) == model.num_parameters()
    assert sizes.last.num_active_params == model.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("name", MODELS)
def test_a_stage_has_the_parameters_and_the_cache_that_are_predicted(name: str) -> None:
    sizes = sizes_of(name)
    engine = tiny_model(name).engine(devices=("cpu",) * 3, kv_cache_tokens=64)
    for stage in engine.stages:
        state = stage.model.state_dict(keep_vars=True).values()
        unique = {id(tensor): tensor.numel() for tensor in state}
        costs = CostModel.nominal(sizes, 4, ["cpu"])
        assert sum(unique.values()) * 4 == costs.weight_bytes(stage.spec)
        assert stage.slot_bytes == stage.spec.num_layers * 4 * sizes.slot_elements
    engine.close()


def planned(sizes: ModelSizes, partition: Any, free: tuple[int, int], **config: Any) -> list[int]:
    asked = EngineConfig("m", devices=DEVICES, partition=partition, **config)
    costs = CostModel.nominal(sizes, 4, DEVICES)
    plan = plan_model(asked, costs, 128, dict(zip(DEVICES, free, strict=True)))
    return [stage.num_layers for stage in plan.stages]


def test_less_memory_gets_fewer_layers_and_the_cache_counts() -> None:
    sizes = sizes_of("llama")
    costs = CostModel.nominal(sizes, 4, DEVICES).device_costs(
        "cuda:0", cache_bytes=1000 * 4 * sizes.slot_elements, free_bytes=0
    )
    ends = costs.ends_cost(is_first=True, is_last=False)[1]
    room = ends + 2 * costs.layer_bytes[0]
    assert planned(sizes, "memory", (room, 2 * room), kv_cache_tokens=1000)[0] <= 2
    assert planned(sizes, "mixed", (room, 10**9), kv_cache_tokens=1000) == [2, 4]
    assert planned(sizes, "mixed", (10**9, 10**9), kv_cache_tokens=1000) == [3, 3]


def test_without_a_wish_the_cache_shrinks_before_the_plan_fails() -> None:
    sizes = sizes_of("llama")
    assert planned(sizes, "memory", (10**6, 10**6))
    with pytest.raises(PartitionError, match="bytes more than it has free"):
        planned(sizes, "memory", (10**4, 10**4))


def test_a_large_vocabulary_takes_layers_from_the_last_stage() -> None:
    sizes = sizes_of("llama")
    costs = CostModel.nominal(sizes, 4, DEVICES)
    head = costs.last_s("cuda:0", DECODE)
    assert 0 < head < costs.layer_s("cuda:0", DECODE, 0)
    heavy = sizes.last.__class__(0, 10**10, 10**10)
    wide = ModelSizes(**{**vars(sizes), "last": heavy})
    assert planned(wide, "compute", (0, 0)) == [5, 1]


@pytest.mark.parametrize("partition", ["memory", "compute", "mixed"])
def test_text_is_the_same_with_any_strategy(partition: Any) -> None:
    model = tiny_model("llama")
    prompts = mixed_prompts(4)
    engine = model.engine(devices=("cpu",) * 3, partition=partition)
    assert sum(stage.spec.num_layers for stage in engine.stages) == LAYERS
    texts = engine.generate(requests(prompts))
    assert [text.token_ids for text in texts] == [model.greedy(prompt) for prompt in prompts]
    engine.close()


def test_no_weight_is_read_for_a_plan(tmp_path: Path) -> None:
    source = tiny_model("llama").folder
    for file in source.iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            data = data[: 8 + int.from_bytes(data[:8], "little")]
        (tmp_path / file.name).write_bytes(data)
    checkpoint = Checkpoint.find(str(source))
    moved = Checkpoint(tmp_path, "m", None, checkpoint.weight_map)
    assert ModelSizes.read(moved, load_config(moved)) == sizes_of("llama")


def test_an_impossible_wish_is_refused_before_loading() -> None:
    config = EngineConfig(
        str(tiny_model("llama").folder), partition="memory", kv_cache_tokens=10**12
    )
    with pytest.raises(PartitionError, match="lower kv_cache_tokens"):
        Engine.load(config)
