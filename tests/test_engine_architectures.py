"""Architectures unlike Llama: token-identical to `generate` however cut, or refused by name.

A handful of those that benchmarks/support_table.py sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from kits.engine_models import EOS, SMALL, VOCAB, TinyModel, make_model, mixed_prompts, requests

from queue_api.wire.errors import UnsupportedModelError

PROMPTS = mixed_prompts(6, 36)
NEW_TOKENS = 10
_COMMON = {**SMALL, "num_hidden_layers": 4}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "alibi": (
        "single",
        lambda: transformers.BloomConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            n_layer=4,
            n_head=4,
            initializer_range=0.6,
            eos_token_id=EOS,
        ),
    ),
    "latent attention": (
        "packed",
        lambda: transformers.DeepseekV3Config(**{**_COMMON, "num_key_value_heads": 4}, **_LATENT),
    ),
    "experts": (
        "packed",
        lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=4, sliding_window=9),
    ),
    # Its second stage has no layer whose cache could tell a length.
    "attention and linear attention": (
        "single",
        lambda: transformers.Qwen3_5TextConfig(
            **_COMMON,
            **_LINEAR,
            layer_types=[*["full_attention"] * 2, *["linear_attention"] * 2],
        ),
    ),
    "attention and Mamba": (
        "single",
        lambda: transformers.GraniteMoeHybridConfig(
            **_COMMON, **_MAMBA, layer_types=["linear_attention", "full_attention"] * 2
        ),
    ),
    "sinks": (
        "packed",
        lambda: transformers.GptOssConfig(
            **_COMMON, sliding_window=9, num_local_experts=4, num_experts_per_tok=2
        ),
    ),
    "chunked attention": (
        "packed",
        lambda: transformers.Llama4TextConfig(
            **_COMMON,
            attention_chunk_size=12,
            intermediate_size_mlp=48,
            num_local_experts=4,
            interleave_moe_layer_step=2,
        ),
    ),
    # The norm of its embeddings is defined behind its layers; it counts positions by itself.
    "decoder of an encoder-decoder": (
        "single",
        lambda: transformers.MBartConfig(
            vocab_size=VOCAB,
            d_model=32,
            decoder_layers=4,
            encoder_layers=4,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            max_position_embeddings=128,
            init_std=0.3,
            is_decoder=True,
            forced_eos_token_id=None,
            eos_token_id=EOS,
            decoder_start_token_id=1,
        ),
    ),
}


def check_text(model: TinyModel, num_stages: int) -> set[str]:
    """Compare with `generate`; the modes of the stages."""
    engine = model.engine(
        devices=("cpu",) * num_stages, max_num_seqs=6, max_batch_tokens=16, max_model_len=64
    )
    modes = {stage.mode for stage in engine.stages}
    completions = engine.generate(requests(PROMPTS, max_tokens=NEW_TOKENS))
    expected = [model.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert [completion.token_ids for completion in completions] == expected
    assert len({token for text in expected for token in text}) > 3, "text that tells nothing"
    return modes


@pytest.mark.parametrize("name", MODELS)
def test_architecture_matches_generate_in_uneven_stages_preempted_and_resumed(
    name: str, tmp_path: Path
) -> None:
    """Prompts several times as long as what is computed at once, and slots for two or three."""
    model = make_model(MODELS[name][1](), tmp_path)
    engine = model.engine(
        devices=("cpu",) * 2,
        partition="custom",
        layer_bounds=(1,),
        max_num_seqs=6,
        max_batch_tokens=11,
        max_model_len=64,
        kv_cache_tokens=120,
    )
    expected = [model.greedy(prompt, 24) for prompt in PROMPTS]
    completions = engine.generate(requests(PROMPTS, max_tokens=24))
    assert [completion.token_ids for completion in completions] == expected
    assert engine.metrics.preemptions > 0
    for i, (request, text) in enumerate(
        zip(requests(PROMPTS, max_tokens=24), expected, strict=True)
    ):
        engine.add(request.id, request, generated=text[: (i * 4) % len(text)])
    done = {}
    while engine.has_unfinished():
        done |= {completion.key: completion.token_ids for completion in engine.step()}
    assert [done[str(i)] for i in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("name", MODELS)
def test_architecture_matches_generate_in_any_number_of_stages(name: str, tmp_path: Path) -> None:
    mode, config = MODELS[name]
    model = make_model(config(), tmp_path)
    modes = [check_text(model, num_stages) for num_stages in (1, 2, 4)]
    assert modes[0] == {mode}
    assert modes[1] | modes[2] <= {mode, "packed"}


def test_a_cut_through_a_second_stream_of_states_is_refused(tmp_path: Path) -> None:
    """Inkling 2 collects the outputs of earlier blocks for later layers to attend to."""
    config = transformers.Inkling2TextConfig(
        **{**_COMMON, "num_hidden_layers": 6},
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=9,
        rel_extent=16,
        d_rel=4,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        unpadded_vocab_size=VOCAB,
    )
    model = make_model(config, tmp_path)
    for num_stages in (2, 3, 6):
        with pytest.raises(UnsupportedModelError, match="pass on block_states"):
            model.engine(devices=("cpu",) * num_stages, max_model_len=64)
    check_text(model, 1)


def test_a_model_whose_cache_forgets_what_its_masks_show_is_refused(tmp_path: Path) -> None:
    """Moshi's masks have no window, its cache has: text then depends on how it was read."""
    sizes = {name: _COMMON[name] for name in _COMMON if name != "intermediate_size"}
    config = transformers.MoshiConfig(**sizes, ffn_dim=48, sliding_window=40)
    model = make_model(config, tmp_path)
    with pytest.raises(UnsupportedModelError, match="cache keeps 40 tokens"):
        model.engine(max_model_len=64)
