"""A stage reads its own weights alone; what can't be loaded is refused with the reason."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from engine_models import CONFIGS, LAYERS, make_model, tiny_model
from safetensors.torch import load_file, save_file

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.errors import (
    ConfigurationError,
    ModelNotFoundError,
    PartitionError,
    UnsupportedModelError,
)


def parameter_names(stage) -> set[str]:
    return {name for name, _ in stage.model.named_parameters()}


@pytest.fixture
def copy_of_llama(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama").folder, folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_stages_hold_each_weight_once(name: str) -> None:
    model = tiny_model(name)
    engine = model.engine(devices=("cpu",) * 3)
    tied = model.reference.config.tie_word_embeddings
    counts = [sum(p.numel() for p in stage.model.parameters()) for stage in engine.stages]
    extra = model.reference.get_input_embeddings().weight.numel() if tied else 0
    if name == "gpt2":  # learned positions are part of every stage's forward
        extra += 2 * model.reference.transformer.wpe.weight.numel()
    assert sum(counts) == sum(p.numel() for p in model.reference.parameters()) + extra


def test_a_stage_has_no_layer_of_another() -> None:
    engine = tiny_model("llama").engine(
        devices=("cpu",) * 3, partition="custom", layer_bounds=(1, 4)
    )
    reference = dict(tiny_model("llama").reference.named_parameters())
    for stage in engine.stages:
        names = parameter_names(stage)
        assert ("model.embed_tokens.weight" in names) == stage.spec.is_first
        assert ("lm_head.weight" in names) == stage.spec.is_last
        assert ("model.norm.weight" in names) == stage.spec.is_last
        layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
        assert layers == {str(i) for i in range(stage.spec.num_layers)}
        for i in range(stage.spec.num_layers):
            name = "self_attn.q_proj.weight"
            own = stage.model.get_parameter(f"model.layers.{i}.{name}")
            layer = stage.spec.first_layer + i
            assert torch.equal(own, reference[f"model.layers.{layer}.{name}"])


def test_a_stage_loads_without_the_files_of_the_others(tmp_path) -> None:
    """Every shard that holds none of the stage's tensors is deleted; the stage still loads."""
    model = make_model(CONFIGS["llama"](), tmp_path, max_shard_size="8KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    own = {f"model.layers.{i}." for i in (2, 3)}
    needed = {file for name, file in weight_map.items() if name.startswith(tuple(own))}
    others = set(weight_map.values()) - needed
    assert len(others) > 4
    for file in others:
        (tmp_path / file).unlink()

    from engine.partition import plan_partition
    from engine.slicing import load_config
    from engine.stage import Stage

    checkpoint = Checkpoint.find(str(tmp_path))
    config = load_config(checkpoint)
    plan = plan_partition(LAYERS, ["cpu"] * 3)
    stage = Stage.load(checkpoint, config, plan.stages[1], torch.float32)
    loaded = stage.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    expected = model.reference.get_parameter("model.layers.3.mlp.up_proj.weight")
    assert torch.equal(loaded, expected)
    with pytest.raises(ModelNotFoundError, match="can't read it"):
        Stage.load(checkpoint, config, plan.stages[0], torch.float32)


def test_a_weight_that_is_missing_is_not_made_up(copy_of_llama) -> None:
    file = copy_of_llama / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.4.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match="up_proj"):
        Engine.load(EngineConfig(str(copy_of_llama)))


def test_revision_follows_the_weights(copy_of_llama) -> None:
    before = Checkpoint.find(str(copy_of_llama)).revision
    assert before == Checkpoint.find(str(tiny_model("llama").folder)).revision
    file = copy_of_llama / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.4.mlp.up_proj.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert Checkpoint.find(str(copy_of_llama)).revision != before


def test_missing_folder_is_named() -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model folder \./nowhere"):
        Engine.load(EngineConfig("./nowhere"))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer*", "has no tokenizer"),
    ],
)
def test_each_missing_file_has_its_own_message(copy_of_llama, removed: str, message: str) -> None:
    for path in copy_of_llama.glob(removed):
        path.unlink()
    with pytest.raises(ModelNotFoundError, match=message):
        Engine.load(EngineConfig(str(copy_of_llama)))


def test_damaged_weights_are_named(copy_of_llama) -> None:
    (copy_of_llama / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelNotFoundError, match="can't be read"):
        Engine.load(EngineConfig(str(copy_of_llama)))


def test_unknown_architecture_is_refused(copy_of_llama) -> None:
    path = copy_of_llama / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "llama-of-the-future"}))
    with pytest.raises(UnsupportedModelError, match="llama-of-the-future"):
        Engine.load(EngineConfig(str(copy_of_llama)))


def test_a_model_that_would_be_wrong_is_refused(monkeypatch) -> None:
    """Neither way of running may differ from the model's own forward."""
    from engine import stage

    def off(*args: object, **kwargs: object) -> torch.Tensor:
        return real(*args, **kwargs) * 1.01

    real = stage.Stage._probe
    monkeypatch.setattr(stage.Stage, "_probe", off)
    with pytest.raises(UnsupportedModelError, match=r"packed: output is off by .*single: output"):
        tiny_model("llama").engine()


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(PartitionError):
        tiny_model("llama").engine(devices=("cpu",) * (LAYERS + 1))


@pytest.mark.parametrize("device", ["cuda:93", "abacus"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match=device):
        tiny_model("llama").engine(devices=(device,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int3"},
        {"devices": ()},
        {"partition": "random"},
        {"partition": "custom"},
        {"layer_bounds": (1,)},
        {"max_num_seqs": 0},
        {"max_batch_tokens": 8},
        {"pipeline": "oil"},
        {"kv_cache_tokens": 0},
        {"max_model_len": 4096},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigurationError):
        tiny_model("llama").engine(**wrong)
