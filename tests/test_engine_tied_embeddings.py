"""One weight for embedding and head, wherever the config says so: as transformers, in any cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from kits.engine_models import (
    EOS,
    SMALL,
    TinyModel,
    load_reference,
    make_model,
    mixed_prompts,
    requests,
)
from safetensors.torch import load_file, save_file

PROMPTS = mixed_prompts(6, 30)
NEW_TOKENS = 8
_SIZES = {**SMALL, "num_hidden_layers": 4}


def check_text(model: TinyModel) -> None:
    expected = [model.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    for num_stages in (1, 2, 4):
        engine = model.engine(devices=("cpu",) * num_stages)
        completions = engine.generate(requests(PROMPTS, max_tokens=NEW_TOKENS))
        assert [completion.token_ids for completion in completions] == expected


def gemma3(whole: bool, text: bool) -> Any:
    return transformers.Gemma3Config(
        text_config={
            **_SIZES,
            "sliding_window": 9,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": text,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        tie_word_embeddings=whole,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
        eos_token_id=EOS,
    )


def got_ocr2() -> Any:
    """The whole is tied by default, the text model within it is not."""
    return transformers.GotOcr2Config(
        text_config={"model_type": "qwen2", **_SIZES, "tie_word_embeddings": False},
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "mlp_dim": 16,
        },
        image_token_index=5,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_the_flag_of_the_whole_decides_in_a_composite(
    whole: bool, text: bool, tmp_path: Path
) -> None:
    model = make_model(gemma3(whole, text), tmp_path)
    reference = model.reference
    head, embedding = reference.get_output_embeddings(), reference.get_input_embeddings()
    assert (head.weight is embedding.weight) == whole
    check_text(model)


def test_a_composite_whose_text_config_says_nothing_of_it(tmp_path: Path) -> None:
    model = make_model(got_ocr2(), tmp_path)
    check_text(model)


def test_the_one_weight_may_be_stored_as_the_heads(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**_SIZES, "tie_word_embeddings": True})
    make_model(config, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    check_text(TinyModel(tmp_path, load_reference(tmp_path)))


def test_two_different_weights_are_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    make_model(transformers.LlamaConfig(**_SIZES), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    check_text(TinyModel(tmp_path, load_reference(tmp_path)))
