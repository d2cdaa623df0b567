"""Can a model be cut here? What its layers are given besides hidden states says so.

Only hidden states travel between stages. Positions and masks are the same in every stage; anything
else that depends on the text (a second residual stream, keys of an earlier layer, per-layer
embeddings) would be missing behind a cut, without an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["LayerInputs", "hidden_place"]

_FROM_POSITIONS = {
    "alibi",
    "attention_mask",
    "attention_scaling",
    "cache_position",
    "causal_mask",
    "freqs_cis",
    "logits_to_keep",
    "mask",
    "position_bias",
    "position_embeddings",
    "position_ids",
    "sinusoidal_pos",
}


class LayerInputs:
    """Records, while entered, what layers are given besides hidden states, and what they return."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._given: list[dict[str, list[torch.Tensor]]] = []
        self._outputs: list[Any] = []

    def __enter__(self) -> LayerInputs:
        for layer in self._layers:
            self._handles += [
                layer.register_forward_pre_hook(self._before, with_kwargs=True),
                layer.register_forward_hook(lambda _, __, out: self._outputs.append(out)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(layer.forward).parameters)
        named = {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}
        hidden = names[hidden_place(layer)]
        # Copies: a model may go on writing into what it has handed over.
        self._given.append(
            {
                name: [tensor.clone() for tensor in _tensors(value)]
                for name, value in {**named, **kwargs}.items()
                if name != hidden
            }
        )

    def differ(self, other: LayerInputs) -> str:
        """Name of an input that isn't the same for another text, or nothing."""
        for mine, theirs in zip(self._given, other._given, strict=True):
            for name, tensors in mine.items():
                if not _equal(tensors, theirs.get(name, [])):
                    return name
        return ""

    def strange(self) -> str:
        """Of a lone layer, which can't show what follows from its output: anything unusual."""
        if len(self._layers) > 1:
            return ""
        for name, tensors in self._given[0].items():
            if tensors and name not in _FROM_POSITIONS:
                return name
        out = self._outputs[0]
        length = self._length()
        for part in out[1:] if isinstance(out, tuple) else ():
            # Some models return attention weights, which nothing reads.
            if any(tensor.shape[-2:] != (length, length) for tensor in _tensors(part)):
                return "another output"
        return ""

    def _length(self) -> int:
        out = self._outputs[0]
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden.shape[1]


def hidden_place(layer: nn.Module) -> int:
    """Where a layer takes the hidden states, counted in its forward's parameters."""
    names = list(inspect.signature(layer.forward).parameters)
    return names.index("hidden_states") if "hidden_states" in names else 0


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))
