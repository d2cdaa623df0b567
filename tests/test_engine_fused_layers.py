"""The compiled parts of layers, against the models' own on the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from kits.native_kit import on_threads
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.kernels.fused_functions import FusedLayers, fused_layers
from engine.weights.fused_layers import FusedRMSNorm, fuse_layers
from engine.weights.layout import lay_out_linears

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def fused() -> FusedLayers:
    compiled = fused_layers()
    if compiled is None:
        pytest.skip("no C compiler here")
    return compiled


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest):
    yield from on_threads(request.param)


@pytest.mark.parametrize("shape", [(1, 7, 64), (2, 3, 5, 10), (1, 1)])
def test_norms_are_pytorch_s(fused: FusedLayers, shape: tuple[int, ...]):
    x, weight = torch.randn(shape) * 5, torch.randn(shape[-1])
    expected = F.rms_norm(x, shape[-1:], weight, 1e-5)
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5), expected)
    gaps = torch.stack([x, x], -1)[..., 0]
    torch.testing.assert_close(fused.rms_norm(gaps, weight, 1e-5), expected)


@pytest.mark.parametrize("size", [1, 15, 4097])
def test_gates_are_pytorch_s_also_far_from_zero(fused: FusedLayers, size: int):
    gate, up = torch.randn(1, size) * 30, torch.randn(1, size)
    gate[0, 0] = -200.0
    expected = F.silu(gate) * up
    torch.testing.assert_close(fused.silu_gate(gate, up), expected)


def test_a_gate_of_no_number_is_none(fused: FusedLayers):
    gate = torch.tensor([[torch.nan, 1.0]])
    assert fused.silu_gate(gate, torch.ones(1, 2)).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("size", [2, 8, 64])
def test_rotations_are_transformers(fused: FusedLayers, size: int):
    q = torch.randn(1, 5, 3, size).transpose(1, 2)  # strided, as models hand it over
    cosine, sine = torch.randn(1, 5, size), torch.randn(1, 5, size)
    expected, _ = apply_rotary_pos_emb(q, q, cosine, sine)
    rotated = fused.rotate(q, cosine, sine)
    torch.testing.assert_close(rotated, expected)
    assert rotated.stride() == q.stride()


@pytest.mark.parametrize("heads_first", [True, False])
def test_a_part_of_each_head_is_rotated_within_its_own_memory(
    fused: FusedLayers, heads_first: bool
):
    q = torch.randn(1, 3, 50, 32) if heads_first else torch.randn(1, 50, 3, 32).transpose(1, 2)
    part = q[..., :8]
    cosine, sine = torch.randn(1, 50, 8), torch.randn(1, 50, 8)
    expected, _ = apply_rotary_pos_emb(part, part, cosine, sine)
    rotated = fused.rotate(part, cosine, sine)
    torch.testing.assert_close(rotated, expected)
    last = (3 - 1) * rotated.stride(1) + (50 - 1) * rotated.stride(2) + 8
    assert last * 4 <= rotated.untyped_storage().nbytes()


def test_slots_are_written_and_no_others(fused: FusedLayers):
    pool = torch.zeros(2, 9, 5)
    rows, slots = torch.randn(3, 2, 5).transpose(0, 1), torch.tensor([4, 0, 8])
    expected = pool.index_copy(1, slots, rows)
    fused.write_slots(rows, slots, pool)
    assert pool.equal(expected)


@pytest.mark.parametrize(
    ("config", "num_norms"),
    [
        (LlamaConfig(**SMALL), 5),
        (Qwen3Config(**SMALL), 9),  # norms of queries and keys, too
        (Gemma2Config(**SMALL), 9),  # times one more than the weight
        (CohereConfig(**SMALL), 0),  # layer norms, and rotation of neighbours instead of halves
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_with_fused_layers_give_their_own_logits(config, num_norms: int):
    if fused_layers() is None:
        pytest.skip("no C compiler here")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs = copy.deepcopy(model)
    lay_out_linears(model)
    fuse_layers(model)
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == num_norms
    tokens = torch.arange(20)[None] % 64
    with torch.inference_mode():
        torch.testing.assert_close(
            model(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_only_what_is_equal_is_replaced():
    class RMSNormOfMyOwn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4))
            self.eps = 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, (4,), self.weight, self.eps).abs()

    model = torch.nn.Sequential(RMSNormOfMyOwn())
    fuse_layers(model)
    assert type(model[0]) is RMSNormOfMyOwn
