"""Weights rounded to eight bits, and what they stand for.

Symmetric, with one scale for each output: the largest of its weights is 127 (the row-wise absmax
of Dettmers et al., "LLM.int8()", 2022). Activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Int8Weight", "round_weights"]

_LARGEST = 127


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A linear layer's weight in eight bits."""

    values: torch.Tensor
    """[outputs, inputs] int8."""
    scales: torch.Tensor
    """[outputs] float32; a value times its output's scale is the weight."""

    @classmethod
    def nearest(cls, weight: torch.Tensor) -> Int8Weight:
        """The nearest to `weight` [outputs, inputs] float32."""
        scales = weight.abs().amax(dim=1) / _LARGEST
        steps = scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return cls((weight / steps).round().to(torch.int8), scales)

    def numbers(self) -> torch.Tensor:
        """[outputs, inputs] float32."""
        return self.values * self.scales[:, None]


@torch.no_grad()
def round_weights(layers: Iterable[nn.Module]) -> dict[nn.Linear, Int8Weight]:
    """Round the weights of all `nn.Linear` in `layers` where they are; what each one stands for.

    Subclasses of it may do more and stay as they are.
    """
    rounded = {}
    for layer in layers:
        for module in layer.modules():
            if type(module) is nn.Linear and module.weight.numel():
                rounded[module] = Int8Weight.nearest(module.weight)
                module.weight.copy_(rounded[module].numbers())
    return rounded
