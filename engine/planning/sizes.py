"""Sizes of a model's parts, from its config and its files' headers; no weight is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.models.checkpoint import Checkpoint, layer_of
from engine.plan import StageSpec
from queue_api.wire.errors import ModelNotFoundError

__all__ = ["ModelSizes", "Part"]


@dataclass(frozen=True)
class Part:
    """A layer, or what stands before or behind the layers."""

    num_params: int = 0
    num_matrix_params: int = 0
    """Those of matrices that every token is multiplied with, or may be."""
    num_active_params: float = 0.0
    """Those that a token is multiplied with: of a mixture of experts, the chosen ones'."""

    def __add__(self, other: Part) -> Part:
        return Part(
            self.num_params + other.num_params,
            self.num_matrix_params + other.num_matrix_params,
            self.num_active_params + other.num_active_params,
        )


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model's parts, in parameters and elements."""

    layers: tuple[Part, ...]
    first: Part
    """Before the layers: the embedding. It looks up and multiplies nothing."""
    last: Part
    """Behind the layers: final norm and head."""
    common_params: int
    """In every stage: embeddings of positions and whatever else is small and not cut."""
    shared_params: int
    """Of the embedding that is the head, too; counted in both of the above."""
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int

    @property
    def slot_elements(self) -> int:
        """Elements that one token takes in a layer's cache."""
        return self.num_kv_heads * (self.key_size + self.value_size)

    def stage_params(self, stage: StageSpec) -> int:
        """Parameters that a stage holds."""
        total = sum(part.num_params for part in self.layers[stage.first_layer : stage.end_layer])
        total += stage.is_first * self.first.num_params + stage.is_last * self.last.num_params
        return total + self.common_params - (stage.is_first and stage.is_last) * self.shared_params

    @classmethod
    def read(cls, checkpoint: Checkpoint, model_config: Any) -> ModelSizes:
        """Take them from the headers of the weight files and the config.

        :raises ModelNotFoundError: if a header can't be read
        """
        config = model_config.get_text_config()
        shapes = tensor_shapes(checkpoint)
        lists = checkpoint.layer_lists(config.num_hidden_layers)
        layers = [Part()] * config.num_hidden_layers
        first, last, common, shared = Part(), Part(), 0, 0
        for name, shape in shapes.items():
            layer = layer_of(name, lists)
            if layer is not None:
                layers[layer] += _part(shape, _active_share(name, config))
            elif _is_behind(name):
                last += _part(shape)
            elif len(shape) == 2 and shape[0] >= config.vocab_size:
                first += _part(shape, 0.0)
            else:
                common += math.prod(shape)
        if last.num_active_params == 0:  # no head: it is the embedding
            last += Part(first.num_params, first.num_params, float(first.num_params))
            shared = first.num_params
        return cls(tuple(layers), first, last, common, shared, **_attention_sizes(config))


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The shape of each tensor, from the headers of the weight files.

    :raises ModelNotFoundError: if a file is missing or damaged
    """
    shapes: dict[str, list[int]] = {}
    for name in sorted(set(checkpoint.weight_map.values())):
        path = checkpoint.folder / name
        try:
            if checkpoint.hub_id and not path.exists():
                shapes |= _hub_shapes(checkpoint, name)
                continue
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except Exception as error:  # the Hub's client has many
            raise ModelNotFoundError(f"{path}: can't read its header ({error})") from error
        header.pop("__metadata__", None)
        shapes |= {tensor: entry["shape"] for tensor, entry in header.items()}
    return shapes


def _hub_shapes(checkpoint: Checkpoint, file_name: str) -> dict[str, list[int]]:
    """The same of a file that is still at the Hub: its header alone is fetched."""
    from huggingface_hub import parse_safetensors_file_metadata

    assert checkpoint.hub_id is not None
    found = parse_safetensors_file_metadata(
        checkpoint.hub_id, file_name, revision=checkpoint.revision
    )
    return {name: list(info.shape) for name, info in found.tensors.items()}


def _part(shape: Sequence[int], active_share: float = 1.0) -> Part:
    size = math.prod(shape)
    matrix = size if len(shape) > 1 and active_share else 0
    return Part(size, matrix, matrix * active_share)


def _is_behind(name: str) -> bool:
    """True for the final norm and the head, by the names that they go by."""
    words = name.lower()
    if any(word in words for word in ("emb", "wte", "wpe")):
        return False
    return any(word in words for word in ("head", "norm", "ln_f", "output"))


def _active_share(name: str, config: Any) -> float:
    """The share of a layer's tensor that one token is multiplied with."""
    if ".experts." not in name:
        return 1.0
    chosen = getattr(config, "num_experts_per_tok", None)
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        if chosen and (total := getattr(config, field, None)):
            return float(chosen) / float(total)
    return 1.0


def _attention_sizes(config: Any) -> dict[str, int]:
    hidden = int(config.hidden_size)
    heads = _number(config, "num_attention_heads")  # 0: another kind of layer, without a cache
    size = _number(config, "head_dim") or hidden // max(1, heads)
    kv_heads = _number(config, "num_key_value_heads") or heads
    key_size = value_size = size
    if getattr(config, "kv_lora_rank", None):  # MLA: our pool holds what the attention is given
        kv_heads = heads
        key_size = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
        value_size = int(config.v_head_dim)
    return {
        "hidden_size": hidden,
        "intermediate_size": _number(config, "intermediate_size") or 4 * hidden,
        "vocab_size": int(config.vocab_size),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "key_size": key_size,
        "value_size": value_size,
    }


def _number(config: Any, name: str) -> int:
    """A field of the config, 0 if it isn't there; the largest if each layer has its own."""
    value = getattr(config, name, None) or 0
    return int(max(value) if isinstance(value, list | tuple) else value)
