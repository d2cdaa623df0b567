"""Weights quantized to int8: the text is what transformers generates with weights so quantized."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers
from kits.engine_models import (
    CONFIGS,
    LAYERS,
    SMALL,
    TinyModel,
    make_model,
    mixed_prompts,
    requests,
    tiny_model,
)
from torch import nn

from engine.config import EngineConfig
from engine.models.checkpoint import Checkpoint
from engine.planning.costs import CostModel
from engine.planning.partition import plan_partition
from engine.planning.sizes import ModelSizes
from engine.weights.format import weight_format
from engine.weights.int8 import Int8Weight, QuantizedLinear, quantize_linears
from engine.weights.layout import LaidOutLinear
from queue_api.wire.errors import ConfigurationError, UnsupportedModelError

QUANTIZED = [name for name in CONFIGS if name != "gpt2"]
PROMPTS = mixed_prompts()
_COMMON = {**SMALL, "num_hidden_layers": 4}
OTHERS = {
    "olmo": lambda: transformers.OlmoConfig(**_COMMON),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2
    ),
    "bloom": lambda: transformers.BloomConfig(
        **{**_COMMON, "n_layer": 4, "n_head": 4, "tie_word_embeddings": True}
    ),
}


def quantized_by_pytorch(weight: torch.Tensor) -> torch.Tensor:
    scales = weight.abs().amax(dim=1) / 127
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)


def linears(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [m for m in model.modules() if type(m) is nn.Linear and m is not head]


def quantized(plain: TinyModel) -> TinyModel:
    """The model with the weights of its layers quantized, in transformers."""
    reference = copy.deepcopy(plain.reference)
    for module in linears(reference):
        module.weight.data = quantized_by_pytorch(module.weight.data)
    return TinyModel(plain.folder, reference)


def test_a_weight_is_quantized_as_pytorch_does() -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    found = Int8Weight.nearest(weight)
    assert found.values.dtype == torch.int8
    present = torch.arange(40) != 3  # PyTorch wants scales above zero
    assert torch.equal(found.numbers()[present], quantized_by_pytorch(weight[present]))
    assert torch.equal(found.numbers()[3], weight[3])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "not-compiled"])
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("name", QUANTIZED)
def test_text_is_that_of_the_quantized_model(
    name: str, num_stages: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("engine.weights.layout.panel_product", lambda: None)
    model = quantized(tiny_model(name))
    engine = model.engine(
        quantization="int8", devices=("cpu",) * num_stages, max_num_seqs=16, max_batch_tokens=24
    )
    assert {stage.mode for stage in engine.stages} == {"packed"}
    found = [completion.token_ids for completion in engine.generate(requests(PROMPTS))]
    assert found == [model.greedy(prompt) for prompt in PROMPTS]
    assert found != [tiny_model(name).greedy(prompt) for prompt in PROMPTS]
    engine.close()


def test_a_model_that_reads_its_weights_reads_the_quantized_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It can't have its weights laid out, but the text is the same."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.linear(x, self.gate_proj.weight)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))  # type: ignore[no-any-return]

    model = quantized(tiny_model("llama"))
    expected = model.greedy([9, 8, 7])
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    engine = model.engine(quantization="int8")
    assert not any(isinstance(m, LaidOutLinear) for m in engine.stages[0].model.modules())
    assert engine.generate(requests([[9, 8, 7]]))[0].token_ids == expected


def test_the_log_and_the_results_say_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine = tiny_model("llama").engine(quantization="int8")
    assert "of the layers' weights quantized to int8" in caplog.text
    assert engine.model_revision == f"{tiny_model('llama').engine().model_revision}+int8"


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("name", list(OTHERS))
def test_unlike_llama_too(name: str, num_stages: int, tmp_path: Path) -> None:
    """Norms without a parameter; experts; ALiBi, which runs sequence by sequence."""
    model = quantized(make_model(OTHERS[name](), tmp_path))
    engine = model.engine(
        quantization="int8", devices=("cpu",) * num_stages, max_num_seqs=16, max_model_len=128
    )
    assert {stage.mode for stage in engine.stages} == {"single" if name == "bloom" else "packed"}
    found = [completion.token_ids for completion in engine.generate(requests(PROMPTS))]
    assert found == [model.greedy(prompt) for prompt in PROMPTS]
    engine.close()


def test_a_module_of_two_names_is_quantized_under_both() -> None:
    shared = nn.Linear(8, 4)
    layer = nn.ModuleDict({"a": shared, "b": shared})
    assert quantize_linears(layer) == 32
    assert layer["a"] is layer["b"]
    assert isinstance(layer["a"], QuantizedLinear)


def test_layers_without_linear_modules_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel can't be quantized to int8"):
        tiny_model("gpt2").engine(quantization="int8")


@pytest.mark.parametrize(
    "wrong", [{"devices": ("cpu", "cuda:0")}, {"dtype": "bfloat16"}, {"quantization": "int4"}]
)
def test_what_it_is_not_for_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"quantization '?int\d'? is "):
        EngineConfig(**{"model": "m", "quantization": "int8", **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_plan_counts_the_bytes(name: str) -> None:
    model = tiny_model(name)
    sizes = ModelSizes.read(Checkpoint.find(str(model.folder)), model.reference.config)
    (whole,) = plan_partition(LAYERS, ["cpu"]).stages
    plain = CostModel.nominal(sizes, 4, ["cpu"])
    small = CostModel.nominal(
        sizes, 4, ["cpu"], weight_format("int8").small_params(model.reference.config)
    )
    saved = 3 * sum(module.weight.numel() for module in linears(model.reference))
    assert plain.weight_bytes(whole) - small.weight_bytes(whole) == saved


def test_experts_are_counted_as_they_are(tmp_path: Path) -> None:
    model = make_model(OTHERS["granitemoe"](), tmp_path)
    quantized = weight_format("int8").small_params(model.reference.config)
    assert sum(quantized) == sum(module.weight.numel() for module in linears(model.reference))
