"""Each field of a generation config that counts, or is left out by name, with a telling value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.sampling.model_defaults import APPLIED_FIELDS, SAMPLING_FIELDS, UNSUPPORTED_FIELDS

__all__ = ["ALL_FIELDS", "ARCHITECTURES", "change_generation_config", "is_applied", "values_for"]

ARCHITECTURES = ("llama", "gemma2", "gpt2", "mixtral", "mamba", "granitemoehybrid", "bart")
"""Packed ones, with windows, learned positions and experts; a single and a mixed one; one whose
encoder is left out."""
Texts = list[list[int]]
_EOS = 2


def _ending_early(texts: Texts, **fields: Any) -> dict[str, Any]:
    """With ends of text that random models come to, in most of their texts but not at once."""
    ends = {text[5] for text in texts[::2] if len(text) > 5}
    return {**fields, "eos_token_id": sorted({_EOS, *ends})}


_VALUES: dict[str, Callable[[Texts], dict[str, Any]]] = {
    "sequence_bias": lambda texts: {
        "sequence_bias": [
            [[texts[0][0]], -50.0],
            [texts[1][:2], -50.0],
            [[texts[2][-1]], 3.0],
        ]
    },
    "encoder_repetition_penalty": lambda _: {"encoder_repetition_penalty": 1.5},
    "repetition_penalty": lambda _: {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": lambda _: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": lambda _: {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": lambda texts: {
        "bad_words_ids": [[texts[0][0]], texts[1][:2], texts[2][:3]],
    },
    "min_length": lambda texts: _ending_early(texts, min_length=40),
    "min_new_tokens": lambda texts: _ending_early(texts, min_new_tokens=12),
    "forced_bos_token_id": lambda _: {"forced_bos_token_id": 7},
    "forced_eos_token_id": lambda _: {"forced_eos_token_id": _EOS},
    "remove_invalid_values": lambda _: {"remove_invalid_values": True},
    "exponential_decay_length_penalty": lambda _: {"exponential_decay_length_penalty": [2, 1.5]},
    "suppress_tokens": lambda texts: {"suppress_tokens": sorted({text[0] for text in texts})},
    "begin_suppress_tokens": lambda texts: {
        "begin_suppress_tokens": sorted({text[0] for text in texts})
    },
    "renormalize_logits": lambda _: {"renormalize_logits": True},
    "stop_strings": lambda _: {"stop_strings": ["e", "an"]},
    # Of samples; greedy texts are the same.
    "temperature": lambda _: {"do_sample": True, "temperature": 0.7},
    "top_k": lambda _: {"do_sample": True, "top_k": 20},
    "top_p": lambda _: {"do_sample": True, "top_p": 0.9},
    "min_p": lambda _: {"do_sample": True, "min_p": 0.1},
}
_LEFT_OUT: Mapping[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 3},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 2},
    "guidance_scale": {"guidance_scale": 1.5},
    "diversity_penalty": {"num_beams": 4, "diversity_penalty": 0.5},
    "penalty_alpha": {"penalty_alpha": 0.6},
    "token_healing": {"token_healing": True},
    "watermarking_config": {"watermarking_config": {"bias": 2.0}},
    "dola_layers": {"dola_layers": "high"},
    "constraints": {"constraints": [[5, 6]]},
    "force_words_ids": {"force_words_ids": [[5, 6]]},
    "max_time": {"max_time": 3.0},
    "typical_p": {"do_sample": True, "typical_p": 0.5},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.01},
}
NO_EFFECT = frozenset({"remove_invalid_values", "renormalize_logits", *SAMPLING_FIELDS})
"""They leave greedy texts as they are."""
ALL_FIELDS = (*APPLIED_FIELDS, *SAMPLING_FIELDS, *UNSUPPORTED_FIELDS)
"""What the engine knows: a field that comes to it and has no value here ends the sweep at once."""
if set(ALL_FIELDS) != {*_VALUES, *_LEFT_OUT}:
    raise KeyError(f"without a value here: {sorted({*ALL_FIELDS} ^ {*_VALUES, *_LEFT_OUT})}")


def is_applied(name: str) -> bool:
    """Whether texts are those of `generate` with the field; else a warning names it."""
    return name in _VALUES


def values_for(name: str, texts: Texts) -> dict[str, Any]:
    """What to write in the file, so that it matters to a model that would write these texts."""
    return _VALUES[name](texts) if name in _VALUES else _LEFT_OUT[name]


def change_generation_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Put the fields in a model's generation_config.json."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(fields)))
