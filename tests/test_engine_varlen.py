"""What the engine hands to `varlen_attn` gives `transformers.generate`'s text; what fails is left.

The kernel itself is for CUDA alone: a plain one stands in for it here (`varlen_reference`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from kits.engine_models import CONFIGS, make_model, mixed_prompts, requests, tiny_model
from kits.varlen_reference import install, reference_varlen_attn

from engine.attention.backend import AttentionTask
from engine.attention.check import AttentionMismatchError, Heads, check_attention
from engine.attention.choice import backends_for
from engine.attention.kv_pool import KVPool, KVShape
from engine.attention.masks import MaskRule
from engine.attention.sdpa import SdpaBackend
from engine.attention.varlen import NEEDED, VarlenBackend, find_kernel
from engine.batch import CacheCopy, ForwardBatch
from engine.engine import Engine

CPU = torch.device("cpu")
PROMPTS = mixed_prompts()


def token_ids(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests(prompts))]


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_text_matches_generate(name: str, num_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of prompts among decodes; windows; soft-capping, which goes to SDPA."""
    install(monkeypatch)
    model = tiny_model(name)
    engine = model.engine(devices=("cpu",) * num_stages, max_num_seqs=16, max_batch_tokens=24)
    assert {stage.attention.name for stage in engine.stages} == {"varlen_attn"}
    for keys in engine.stages[-1].pool.keys:
        assert keys.transpose(0, 1).is_contiguous()  # [S, Hkv, D]
    assert token_ids(engine, PROMPTS) == [model.greedy(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("config", [{"pipeline": "threads"}, {"use_cache": False}], ids=str)
def test_threads_and_no_cache_match_generate(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    model = tiny_model("mistral")
    engine = model.engine(devices=("cpu", "cpu"), max_batch_tokens=512, **config)
    try:
        assert token_ids(engine, PROMPTS) == [model.greedy(prompt) for prompt in PROMPTS]
    finally:
        engine.close()


def test_chunked_masks_match_generate(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4's layers see a chunk each; the kernel doesn't know that."""
    install(monkeypatch)
    config = transformers.Llama4TextConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_chunk_size=8,
        num_local_experts=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=2,
    )
    model = make_model(config, tmp_path)
    engine = model.engine()
    assert engine.stages[0].attention.name == "varlen_attn"
    prompts = PROMPTS[:4]
    assert token_ids(engine, prompts) == [model.greedy(prompt) for prompt in prompts]


def test_copied_prefixes_match_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    model = tiny_model("mistral")
    beginning = max(PROMPTS, key=len)
    prompts = [beginning + prompt for prompt in PROMPTS[:6]]
    engine = model.engine(devices=("cpu", "cpu"))
    assert token_ids(engine, prompts) == [model.greedy(prompt) for prompt in prompts]
    assert engine.metrics.cached_prompt_tokens > 0


def test_a_token_major_pool_holds_the_same_as_a_head_major_one() -> None:
    shapes = [KVShape(2, 4, 6)] * 2
    pools = [
        KVPool(shapes, 10, device=CPU, dtype=torch.float32, token_major=t) for t in (False, True)
    ]
    torch.manual_seed(0)
    key, value = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    for pool in pools:
        for tensor in (*pool.keys, *pool.values):
            tensor.zero_()
        pool.write(1, torch.tensor([7, 2, 4]), key, value)
        pool.copy([CacheCopy(2, 0, 1), CacheCopy(6, 8, 2)])
    for one, other in zip(
        (*pools[0].keys, *pools[0].values), (*pools[1].keys, *pools[1].values), strict=True
    ):
        assert one.equal(other)
        assert other.transpose(0, 1).is_contiguous()


# ------------------------------------------------------------------------------ falling back


class Broken(VarlenBackend):
    """Gives what `change` makes of the right output."""

    name = "broken"

    def __init__(self, change: Callable[[torch.Tensor, AttentionTask], torch.Tensor]) -> None:
        super().__init__(reference_varlen_attn)
        self._change = change

    def attend(self, query, keys, values, task) -> torch.Tensor:
        return self._change(super().attend(query, keys, values, task), task)


def _raise(*_: object) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def _wrong_for_long_texts(out: torch.Tensor, task: AttentionTask) -> torch.Tensor:
    """Right for all that the sixteen tokens of the probe show."""
    return out * (1.1 if max(s.past for s in task.batch.segments) > 256 else 1.0)


FAULTS = {
    "raises": (_raise, "RuntimeError: FlashAttention only supports Ampere"),
    "wrong": (lambda out, _: out.flip(0), "attention is off by"),
    "nan": (lambda out, _: out * torch.nan, "attention is off by nan"),
    "long": (_wrong_for_long_texts, "attention is off by"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_backend_that_fails_is_left_for_sdpa_with_a_warning(
    fault: str,
    num_stages: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change, reason = FAULTS[fault]
    install(monkeypatch, Broken(change))
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING, "engine.stages.loading"):
        engine = model.engine(devices=("cpu",) * num_stages)
    assert len(caplog.messages) == num_stages  # one per stage
    assert all("broken" in message and reason in message for message in caplog.messages)
    for stage in engine.stages:
        assert (stage.mode, stage.attention.name) == ("packed", "SDPA per sequence")
        assert stage.pool.keys[0].is_contiguous()
    assert token_ids(engine, PROMPTS[:4]) == [model.greedy(prompt) for prompt in PROMPTS[:4]]


def test_a_fault_in_the_model_s_output_alone_is_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The check of attention passes, the probe of the stage doesn't."""
    install(monkeypatch, Broken(lambda out, _: out * 1.1))
    monkeypatch.setattr("engine.stages.loading.check_attention", lambda *_: None)
    with caplog.at_level(logging.WARNING, "engine.stages.loading"):
        engine = tiny_model("llama").engine()
    assert "broken: output is off by" in caplog.text
    assert engine.stages[0].attention.name == "SDPA per sequence"


@pytest.mark.parametrize("rule", [MaskRule(), MaskRule(window=4000), MaskRule(chunk=64)], ids=str)
def test_the_check_accepts_what_is_right_in_float32_and_bfloat16(rule: MaskRule) -> None:
    heads = Heads(8, KVShape(2, 64, 64), rule)
    for dtype in (torch.float32, torch.bfloat16):
        check_attention(VarlenBackend(reference_varlen_attn), [heads], CPU, dtype)


@pytest.mark.parametrize("off", [-1, 1])
def test_the_check_finds_a_window_that_is_off_by_one(off: int) -> None:
    def kernel(*args, window_size: tuple[int, int], num_splits: int, **kwargs) -> torch.Tensor:
        left, right = window_size
        window_size = (left + off if left > 0 else left, right)
        return reference_varlen_attn(*args, window_size=window_size, **kwargs)

    heads = Heads(4, KVShape(2, 64, 64), MaskRule(window=4000))
    with pytest.raises(AttentionMismatchError, match="off by"):
        check_attention(VarlenBackend(kernel), [heads], CPU, torch.float32)


# --------------------------------------------------------------------------------- the choice


def test_the_choice_by_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(device: str, dtype: torch.dtype) -> list[str]:
        return [backend.name for backend in backends_for(torch.device(device), dtype)]

    monkeypatch.setattr("engine.attention.choice.native_attention", object)
    monkeypatch.setattr("engine.attention.choice.find_kernel", lambda: reference_varlen_attn)
    sdpa = "SDPA per sequence"
    assert names("cpu", torch.float32) == ["native attention", sdpa]
    assert names("cpu", torch.bfloat16) == [sdpa]
    assert names("cuda", torch.bfloat16) == names("cuda:1", torch.float16) == ["varlen_attn", sdpa]
    assert names("cuda", torch.float32) == [sdpa]
    monkeypatch.setattr("engine.attention.choice.find_kernel", lambda: None)
    monkeypatch.setattr("engine.attention.choice.native_attention", lambda: None)
    assert names("cuda", torch.bfloat16) == names("cpu", torch.float32) == [sdpa]


def test_the_kernel_is_used_only_with_the_arguments_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    own = set(inspect.signature(varlen.varlen_attn).parameters)
    assert (find_kernel() is not None) == (own >= NEEDED)
    # with the arguments of torch 2.11
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda query, key, value, *, scale=None, window_size=(-1, -1): query
    )
    assert find_kernel() is None
    monkeypatch.delattr(varlen, "varlen_attn")
    assert find_kernel() is None


def test_the_stand_in_reads_pages_and_ranges_alike() -> None:
    """The reference's two ways to name keys, and SDPA, give the same numbers."""
    torch.manual_seed(0)
    key, value = torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    query = torch.randn(5, 4, 8)
    starts, counts = torch.tensor([0, 3, 5]), torch.tensor([7, 4])
    ints = {"dtype": torch.int32}
    common = {"window_size": (-1, 0), "enable_gqa": True, "seqused_k": counts.to(**ints)}
    ranges = reference_varlen_attn(
        query, key, value, starts.to(**ints), torch.tensor([4, 0, 0], **ints), 3, 7, **common
    )
    pages = [t.unflatten(0, (3, 4)) for t in (key, value)]
    table = torch.tensor([[1, 2], [0, 0]], **ints)
    paged = reference_varlen_attn(
        query, *pages, starts.to(**ints), None, 3, 7, block_table=table, **common
    )
    assert ranges.equal(paged)
    expected = F.scaled_dot_product_attention(
        query[3:].transpose(0, 1),
        key[:4].transpose(0, 1).repeat_interleave(2, 0),
        value[:4].transpose(0, 1).repeat_interleave(2, 0),
        attn_mask=torch.ones(2, 4).tril(2).bool(),
    )
    torch.testing.assert_close(ranges[3:], expected.transpose(0, 1))


def test_what_depends_on_sequences_can_t_be_captured() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    batch = ForwardBatch([], nothing, nothing, nothing, nothing)
    tensor = torch.zeros(2, 1, 8)
    with pytest.raises(Exception, match="CUDA graph can't replay"):
        SdpaBackend().attend(tensor, tensor, tensor, AttentionTask(batch, MaskRule(), 1.0))
