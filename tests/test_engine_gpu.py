"""On a real GPU: the text is `transformers.generate`'s, and what is fast equals what is plain.

Written where no GPU was at hand, so its first run may have to correct the tests themselves.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from kits.engine_models import TinyModel, make_model, mixed_prompts, requests, tiny_model

from engine.attention.check import Heads, check_attention
from engine.attention.kv_pool import KVShape
from engine.attention.masks import MaskRule
from engine.attention.sdpa import SdpaBackend
from engine.attention.varlen import VarlenBackend, find_kernel
from engine.batch import ForwardBatch
from engine.engine import Engine
from engine.planning.memory import available_bytes
from engine.requests.sequence import Sequence
from engine.scheduling.round import Round
from engine.stages.decode_graphs import CapturedGraph
from queue_api.wire.schemas import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda:0")
PROMPTS = mixed_prompts()


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model whose numbers half precision holds, with heads of a usual size."""
    config = transformers.MistralConfig(
        vocab_size=259,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=30,
        max_position_embeddings=512,
        eos_token_id=2,
    )
    folder: Path = tmp_path_factory.mktemp("smooth")
    return make_model(config, folder)


def token_ids(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests(prompts))]


def decodes(num_texts: int, past: int) -> ForwardBatch:
    work = []
    for i in range(num_texts):
        tokens = [(7 * i + j) % 250 + 3 for j in range(past + 1)]
        sequence = Sequence.create(
            str(i), i, tokens, [], SamplingParams(max_tokens=1), seed=0, added_at=0.0, num_stages=1
        )
        sequence.num_cached, sequence.first_slot = past, i * (past + 1)
        work.append((sequence, 1))
    return Round.pack(work).batch


def row_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1)).max())


@pytest.mark.parametrize(
    "devices",
    [("cuda:0",), ("cuda:0", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0")],
    ids="/".join,
)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2"])
def test_float32_text_matches_generate(name: str, devices: tuple[str, ...]) -> None:
    model = tiny_model(name)
    engine = model.engine(
        devices=devices, dtype="float32", max_num_seqs=16, max_batch_tokens=24, kv_cache_tokens=2048
    )
    try:
        assert {stage.mode for stage in engine.stages} == {"packed"}
        assert token_ids(engine, PROMPTS) == [model.greedy(prompt) for prompt in PROMPTS]
    finally:
        engine.close()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", [MaskRule(), MaskRule(window=4000)], ids=str)
@torch.inference_mode()
def test_varlen_equals_sdpa(rule: MaskRule, dtype: torch.dtype, size: int) -> None:
    kernel = find_kernel()
    if kernel is None:
        pytest.skip("this torch has no varlen_attn for a cache")
    check_attention(VarlenBackend(kernel), [Heads(8, KVShape(2, size, size), rule)], GPU, dtype)


def test_half_precision_runs_on_varlen_and_is_close_to_sdpa(smooth: TinyModel) -> None:
    if find_kernel() is None:
        pytest.skip("this torch has no varlen_attn for a cache")
    engine = smooth.engine(devices=("cuda:0",), dtype="bfloat16", kv_cache_tokens=2048)
    (stage,) = engine.stages
    assert stage.attention.name == "varlen_attn"
    batch = decodes(5, 0)
    found = stage._run_eagerly(batch)
    stage.attention = SdpaBackend()
    batch.layouts.clear()
    assert row_error(found, stage._run_eagerly(batch)) < 5e-2


def test_replayed_decodes_equal_eager_ones(smooth: TinyModel) -> None:
    if find_kernel() is None:
        pytest.skip("this torch has no varlen_attn for a cache")
    engine = smooth.engine(devices=("cuda:0",), dtype="bfloat16", kv_cache_tokens=2048)
    (stage,) = engine.stages
    for tensor in (*stage.pool.keys, *stage.pool.values):
        tensor.normal_()
    for num_texts, past in ((3, 0), (3, 40), (7, 100), (4, 200)):
        for _ in range(2):  # captured, then replayed
            batch = decodes(num_texts, past)
            found = stage.run(batch, batch.token_ids[None]).clone()
        with torch.inference_mode():
            expected = stage._run_eagerly(batch)
        assert row_error(found, expected) < 5e-2
    assert stage._graphs.sizes == [4, 8]


def test_a_captured_graph_sees_what_its_tensors_hold_later() -> None:
    numbers = torch.zeros(4, device=GPU)
    graph = CapturedGraph(lambda: numbers * 2 + 1, GPU)
    assert graph().tolist() == [1, 1, 1, 1]
    numbers.copy_(torch.arange(4.0))
    assert graph().tolist() == [1, 3, 5, 7]


def test_the_cache_is_sized_by_what_the_weights_leave() -> None:
    before = available_bytes(GPU)
    held = torch.empty(1 << 28, dtype=torch.uint8, device=GPU)
    assert before - available_bytes(GPU) >= held.numel()
    del held
    # kept by torch, and free all the same
    assert abs(before - available_bytes(GPU)) < 1 << 26
