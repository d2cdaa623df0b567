"""A stage reads its own weights alone; what can't be loaded is refused with the reason."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from kits.engine_models import CONFIGS, LAYERS, make_model, requests, tiny_model
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.models import checkpoint as checkpoint_module
from engine.models.checkpoint import Checkpoint
from engine.models.slicing import load_config, load_slice
from engine.planning.partition import plan_partition
from engine.weights.layout import LaidOutLinear, can_lay_out, lay_out_linears
from queue_api.wire.errors import (
    ConfigurationError,
    ModelNotFoundError,
    PartitionError,
    UnsupportedModelError,
)


def slices(folder: Path, num_stages: int, bounds: tuple[int, ...] | None = None) -> list:
    """(spec, loaded model) of each stage, before anything is made of the weights."""
    checkpoint = Checkpoint.find(str(folder))
    config = load_config(checkpoint)
    strategy = "custom" if bounds else "uniform"
    plan = plan_partition(LAYERS, ["cpu"] * num_stages, strategy, bounds)
    return [(s, load_slice(checkpoint, config, s, torch.float32)) for s in plan.stages]


@pytest.fixture
def copy_of_llama(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama").folder, folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_stages_hold_each_weight_once(name: str) -> None:
    model = tiny_model(name)
    tied = model.reference.config.tie_word_embeddings
    counts = [sum(p.numel() for p in part.parameters()) for _, part in slices(model.folder, 3)]
    extra = model.reference.get_input_embeddings().weight.numel() if tied else 0
    if name == "gpt2":  # learned positions are part of every stage's forward
        extra += 2 * model.reference.transformer.wpe.weight.numel()
    assert sum(counts) == sum(p.numel() for p in model.reference.parameters()) + extra


def test_a_stage_has_no_layer_of_another() -> None:
    model = tiny_model("llama")
    for spec, part in slices(model.folder, 3, (1, 4)):
        names = {name for name, _ in part.named_parameters()}
        assert ("model.embed_tokens.weight" in names) == spec.is_first
        assert ("lm_head.weight" in names) == spec.is_last
        assert ("model.norm.weight" in names) == spec.is_last
        layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
        assert layers == {str(i) for i in range(spec.num_layers)}
        for i in range(spec.num_layers):
            own = part.model.layers[i].state_dict()
            expected = model.reference.model.layers[spec.first_layer + i].state_dict()
            assert own.keys() == expected.keys()
            assert all(torch.equal(own[name], expected[name]) for name in own)


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

    checkpoint = Checkpoint.find(str(tmp_path))
    config = load_config(checkpoint)
    plan = plan_partition(LAYERS, ["cpu"] * 3)
    part = load_slice(checkpoint, config, plan.stages[1], torch.float32)
    loaded = part.get_parameter("model.layers.1.mlp.up_proj.weight")
    expected = model.reference.get_parameter("model.layers.3.mlp.up_proj.weight")
    assert torch.equal(loaded, expected)
    with pytest.raises(ModelNotFoundError, match="can't read it"):
        load_slice(checkpoint, config, plan.stages[0], torch.float32)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[str]:
    """A Hub with one sharded model, `org/llama`; the names of weight files fetched from it."""
    source, snapshot = tmp_path / "hub", tmp_path / "c0ffee"
    make_model(CONFIGS["llama"](), source, max_shard_size="8KB")
    fetched: list[str] = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if repo != "org/llama":
            # Without its constructor, which wants the response of one HTTP library or another.
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(source, snapshot, ignore=ignored, dirs_exist_ok=True)
        return str(snapshot)

    def hf_hub_download(repo: str, file: str, *, revision: str | None) -> str:
        assert (repo, revision) == ("org/llama", "c0ffee")
        if not (source / file).exists():
            raise EntryNotFoundError(file)
        fetched.append(file)
        return shutil.copy(source / file, snapshot / file)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot_download)
    monkeypatch.setattr(checkpoint_module, "hf_hub_download", hf_hub_download)
    return fetched


def test_a_stage_fetches_only_its_own_files_from_the_hub(hub: list[str]) -> None:
    checkpoint = Checkpoint.find("org/llama", "main")
    assert (checkpoint.name, checkpoint.revision) == ("org/llama", "c0ffee")
    assert hub == []
    plan = plan_partition(LAYERS, ["cpu"] * 3)
    load_slice(checkpoint, load_config(checkpoint), plan.stages[1], torch.float32)
    own = ("model.layers.2.", "model.layers.3.")
    needed = {file for name, file in checkpoint.weight_map.items() if name.startswith(own)}
    assert set(hub) == needed < set(checkpoint.weight_map.values())


def test_a_hub_id_that_is_not_there_is_named(hub: list[str]) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a folder nor a Hub id: org/nothing"):
        Checkpoint.find("org/nothing")


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
    from engine.stages.loading import ModeChoice

    def off(*args: object, **kwargs: object) -> torch.Tensor:
        return real(*args, **kwargs) * 1.01

    real = ModeChoice._probe
    monkeypatch.setattr(ModeChoice, "_probe", off)
    with pytest.raises(UnsupportedModelError, match=r"packed: output is off by .*single: output"):
        tiny_model("llama").engine()


@pytest.mark.skipif(
    not can_lay_out(torch.device("cpu"), torch.float32), reason="no layout for this torch and CPU"
)
@pytest.mark.parametrize("layout", ["panels", "mkl", "onednn"])
@pytest.mark.parametrize("bias", [True, False])
def test_laid_out_linears_compute_what_they_replace(bias: bool, layout: str, monkeypatch) -> None:
    if layout != "panels":
        monkeypatch.setattr("engine.weights.layout.panel_product", lambda: None)
    if layout == "onednn":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias), torch.nn.Linear(40, 8))
    laid_out = copy.deepcopy(model)
    lay_out_linears(laid_out)
    assert all(isinstance(module, LaidOutLinear) for module in laid_out)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for num_rows in (0, 1, 13, 511, 512, 513, 1300):  # the layout is made for one number
            rows = torch.randn(1, num_rows, 24, generator=generator)
            torch.testing.assert_close(laid_out(rows), model(rows))


def test_a_model_that_reads_laid_out_weights_runs_with_plain_ones(monkeypatch) -> None:
    """Its own forward goes around the module that was laid out; the check at load sees that."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.linear(x, self.gate_proj.weight)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    expected = tiny_model("llama").greedy([9, 8, 7])
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    engine = tiny_model("llama").engine()
    modules = list(engine.stages[0].model.modules())
    assert not any(isinstance(module, LaidOutLinear) for module in modules)
    assert engine.generate(requests([[9, 8, 7]]))[0].token_ids == expected


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


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_the_revision_tells_of_all_files_that_decide_about_texts(tmp_path: Path, name: str) -> None:
    original = tiny_model("llama").folder
    folder = shutil.copytree(original, tmp_path / "copy")
    before = Checkpoint.find(str(folder)).revision
    assert before == Checkpoint.find(str(original)).revision
    (folder / name).write_text("{}")
    assert Checkpoint.find(str(folder)).revision != before


def test_the_revision_tells_of_a_chosen_dtype() -> None:
    model = tiny_model("llama")
    plain, same, other = (
        Engine.load(EngineConfig(str(model.folder), dtype=dtype)).model_revision
        for dtype in ("auto", "float32", "bfloat16")
    )
    assert plain == same == Checkpoint.find(str(model.folder)).revision
    assert other == f"{plain}+bfloat16"
