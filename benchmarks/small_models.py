"""A small random model of each causal-LM architecture in transformers: the quirks stand here.

The sizes are small, and so are windows, chunks, original lengths and the numbers of keys that
sparse attention picks: a wrong mask or position shows within sixty tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.demo_model import DEMO_MODEL_PATH
from engine.models.long_rope import rope_entries

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 1064  # that of the demo model's tokenizer, which the small models borrow
NUM_LAYERS = 6
MAX_LENGTH = 128
ORIGINAL_LENGTH = 32
"""Of the texts that a model with scaled positions was trained on, before."""
ROPE_KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope")
GAIN = 1.7
"""Standard deviation of a matrix times the root of its inputs; makes peaked logits, so that few
tokens are near ties."""
# With norms behind the layers and a tied head, random models of that gain forget their input.
POST_NORM = {
    "bart", "bert", "bert-generation", "big_bird", "blenderbot-small", "camembert",
    "data2vec-text", "electra", "ernie", "git", "marian", "megatron-bert", "openai-gpt", "plbart",
    "rembert", "roberta", "roc_bert", "roformer", "trocr", "xlm", "xlm-roberta", "xmod",
    "prophetnet", "mvp", "ctrl",
}  # fmt: skip

# Each is set where an architecture's default config has a value under that name.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    # widths
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "embedding_dim": 32,
    "word_embed_proj_dim": 32,
    "emb_dim": 32,
    "input_embedding_size": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "d_inner": 48,
    "dff": 48,
    "dim_ff": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    # layers
    "num_hidden_layers": NUM_LAYERS,
    "num_layers": NUM_LAYERS,
    "n_layer": NUM_LAYERS,
    "n_layers": NUM_LAYERS,
    "decoder_layers": NUM_LAYERS,
    "num_decoder_layers": NUM_LAYERS,
    "encoder_layers": NUM_LAYERS,
    "num_encoder_layers": NUM_LAYERS,
    # heads
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_head": 8,
    "dim_head": 8,
    "kv_channels": 8,
    "query_pre_attn_scalar": 8,
    "attention_head_dim": 16,
    "attention_hidden_size": 32,
    "rotary_dim": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "global_head_dim": 8,
    # positions and masks
    "max_position_embeddings": MAX_LENGTH,
    "n_positions": MAX_LENGTH,
    "n_ctx": MAX_LENGTH,
    "max_seq_len": MAX_LENGTH,
    "context_length": MAX_LENGTH,
    "model_max_length": MAX_LENGTH,
    "max_target_positions": MAX_LENGTH,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
    "floor_scale": 16,
    "sliding_window": 9,
    "sliding_window_size": 9,
    "window_size": 9,
    "attention_window_size": 9,
    "local_attention": 18,
    "keep_window_size": 9,
    "attention_chunk_size": 12,
    "rel_extent": 16,
    "d_rel": 4,
    # latent attention, sparse attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 16,  # few heads give many scores of exactly zero, and ties are anyone's
    "index_block_size": 4,
    "index_topk_blocks": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "zero_expert_num": 2,
    "router_hidden_size": 16,
    # recurrent layers
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "n_mamba_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
    "state_size": 16,
    "ssm_state_size": 16,
    "time_step_rank": 4,
    "chunk_size": 8,
    "n_groups": 1,
    "block_size": 8,
    "lru_width": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    # the rest
    "vocab_size_per_layer_input": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "adapter_rank": 8,
    "gated_norm_rank": 8,
    "audio_channels": 1,
    "image_size": 16,
    "patch_size": 4,
}

_DECODER = {"is_decoder": True}
_LAYOUT = ["linear_attention", "hybrid"] * 3
_ALTERNATING = ["sliding_attention", "full_attention"] * 3
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_BY_TYPE = {"sliding_attention": _ROPE, "full_attention": {**_ROPE, "rope_theta": 1e5}}
_DOTS3 = {
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_GEMMA4 = {"num_kv_shared_layers": 2, "layer_types": _ALTERNATING, "per_layer_config": {}}

# What an architecture needs besides, or has under another meaning.
QUIRKS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie",
            "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
            "xlm-roberta", "xlm-roberta-xl", "xmod", "big_bird", "reformer", "prophetnet", "bart",
            "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp",
            "pegasus", "plbart", "trocr", "whisper", "git",
        ],
        _DECODER,
    ),
    "moshi": {"sliding_window": 128},  # as in the real one: all that a text can have
    "mamba2": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "llama4": {"text_config": {"num_experts_per_tok": 1}},
    "llama4_text": {"num_experts_per_tok": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 3},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layers_block_type": _LAYOUT, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": _LAYOUT, "attention_hidden_size": 64, "num_query_groups": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _ALTERNATING},
    "gemma4_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {**_DECODER, "attention_type": "original_full"},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2},
    "xlstm": {"num_blocks": NUM_LAYERS},
    "bamba": {"attn_layer_indices": [1, 4]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
    },
    "cohere_compass_text": {"layer_types": _ALTERNATING, "rope_parameters": _ROPE_BY_TYPE},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _DOTS3,
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "prophetnet": {**_DECODER, "num_hidden_layers": None},
    "xlnet": {"max_position_embeddings": None},
    "xmod": {**_DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "xlm": {"causal": True},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "reformer": {**_DECODER, "axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 3},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": None},
    "dots3_note": {"text_config": _DOTS3},
}  # fmt: skip


# What an architecture needs so that its positions are rotated in a way that isn't its own.
ROPE_QUIRKS: dict[str, dict[str, Any]] = {
    # Scaled ones have the size `head_dim`, which isn't set, as in the published ones.
    "mixtral": {"head_dim": 8},
    "minimax": {"head_dim": 8},
    # Their positions aren't rotated by default.
    "granitemoehybrid": {"position_embedding_type": "rope"},
    "zamba2": {"use_mem_rope": True},
}


def small_config(model_type: str, rope: str = "") -> PreTrainedConfig:
    """The small config of an architecture, with its own rotary positions or those of a kind.

    :raises Exception: whatever its config class raises
    """
    quirks = QUIRKS.get(model_type, {}) | (ROPE_QUIRKS.get(model_type, {}) if rope else {})
    config = _shrunk(CONFIG_MAPPING[model_type], quirks)
    text = config.get_text_config()
    for entry in rope_entries(text):
        if "original_max_position_embeddings" in entry:
            entry["original_max_position_embeddings"] = ORIGINAL_LENGTH
    if rope:
        # longrope's factors are as many as the frequencies, which another kind must tell
        _scale_positions(config, "linear" if rope == "longrope" else rope, {})
        _scale_positions(config, rope, _rotary_sizes(config))
        text.original_max_position_embeddings = ORIGINAL_LENGTH
    return config


def _scale_positions(config: Any, kind: str, sizes: Mapping[str, int]) -> None:
    """Give every rotary entry this kind; `sizes` are those of `_rotary_sizes`."""
    parameters = config.get_text_config().rope_parameters
    by_type = {name: entry for name, entry in parameters.items() if isinstance(entry, dict)}
    for layer_type, entry in {"": parameters, **by_type}.items():
        if "rope_theta" in entry:
            kept = {name: entry[name] for name in entry if name in _KEPT}
            if entry.get("rope_type") == "proportional":  # such models rotate whole heads otherwise
                kept.pop("partial_rotary_factor", None)
            if "partial_rotary_factor" in kept:  # of two numbers, dynamic ones divide by zero
                kept["partial_rotary_factor"] = max(0.5, kept["partial_rotary_factor"])
            entry.clear()
            entry.update(kept | _rope_parameters(kind, sizes.get(layer_type, 0)))


_KEPT = {"rope_theta", "partial_rotary_factor"}


def has_rope(model_type: str) -> bool:
    """Whether the architecture's config says how its positions are rotated."""
    try:
        text = small_config(model_type).get_text_config()
    except Exception:  # what can't be built is told elsewhere
        return False
    return any("rope_theta" in entry for entry in rope_entries(text))


def _rotary_sizes(config: Any) -> dict[str, int]:
    """Frequencies of each layer type's rotary positions, or of all under the empty name.

    A frequency rotates two numbers. Those of a tower for images or sounds don't count.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found: dict[str, set[int]] = {}
    for name, buffer in model.named_buffers():
        owner, is_inv_freq, _ = name.rpartition(".")[2].rpartition("inv_freq")
        if is_inv_freq and "original" not in owner and "_tower." not in name:
            found.setdefault(owner.rstrip("_"), set()).add(len(buffer))
    sizes = [size for group in found.values() for size in group]
    if not sizes or len(sizes) != len(found):
        raise ValueError(f"rotary positions of {found} frequencies")
    return {name: group.pop() for name, group in found.items()}


def _rope_parameters(kind: str, size: int) -> dict[str, Any]:
    scaled = {"rope_type": kind, "factor": MAX_LENGTH / ORIGINAL_LENGTH}
    original = {"original_max_position_embeddings": ORIGINAL_LENGTH}
    if kind == "llama3":
        return {**scaled, **original, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        short = [1 + 0.2 * i / size for i in range(size)]
        factors = {"short_factor": short, "long_factor": [4 * f for f in short]}
        mscales = {"short_mscale": 1.1, "long_mscale": 1.2}  # PhiMoE's; others pass them over
        return {**scaled, **original, **factors, **mscales}
    return {**scaled, **original} if kind == "yarn" else scaled


def _shrunk(cls: Any, extra: dict[str, Any]) -> Any:
    """An instance of a config class and, if it has parts, of theirs."""
    default = cls()
    values = {name: size for name, size in SIZES.items() if _is_set(default, name)}
    if "kv_lora_rank" in values:  # Latent attention has a key for each query head.
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    aliases = getattr(cls, "attribute_map", {})
    values = {aliases.get(name, name): value for name, value in values.items()}
    parts = getattr(cls, "sub_configs", {})
    for name, part in parts.items():
        held = getattr(default, name, None)
        own = held.__class__ if isinstance(held, PreTrainedConfig) else part
        if isinstance(own, type) and own is not PreTrainedConfig and "Auto" not in own.__name__:
            # Towers of another depth than the text model, as they are.
            tower = {} if name == "text_config" else {"num_hidden_layers": 2}
            tower = tower if _is_set(own(), "num_hidden_layers") else {}
            values[name] = _shrunk(own, {**tower, **extra.get(name, {})}).to_dict()
    values |= {name: value for name, value in extra.items() if name not in parts}
    values = {name: value for name, value in values.items() if value is not None}
    return cls(**values)


def _is_set(config: Any, name: str) -> bool:
    """True if the config has a value under `name` that can be given to its class."""
    attribute = getattr(type(config), name, None)
    if isinstance(attribute, property) and attribute.fset is None:
        return False
    try:
        return getattr(config, name, None) is not None
    except Exception:  # values that differ by layer can't be asked for
        return True


def save_small_model(model_type: str, folder: Path, rope: str = "") -> None:
    """Build the model with random weights from a fixed seed and save it with a tokenizer.

    :raises Exception: whatever transformers raises for it
    """
    torch.manual_seed(sum(map(ord, model_type)))
    model = AutoModelForCausalLM.from_config(small_config(model_type, rope), dtype=torch.float32)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters > 20_000_000:
        raise ValueError(f"{num_parameters / 1e6:.0f} million parameters in the smallest config")
    if model_type in POST_NORM:
        _randomize(model, gain=1.0, embedding_std=1.0, bias_std=0.05)
    else:
        _randomize(model)
    # Some configs force tokens at certain places (BART's); that is not the model's doing.
    tokens = {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    for file in DEMO_MODEL_PATH.glob("tokenizer*"):
        shutil.copy(file, folder)


@torch.no_grad()
def _randomize(
    model: Any, *, gain: float = GAIN, embedding_std: float = 0.3, bias_std: float = 0.3
) -> None:
    """Large matrices, and norms and biases that differ between layers."""
    embedding = model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if embedding is not None and parameter is embedding.weight:
            parameter.normal_(std=embedding_std)
        elif parameter.ndim >= 2:
            parameter.normal_(std=gain * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in name else bias_std))
