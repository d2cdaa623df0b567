"""Linear layers whose weights are rounded to eight bits when they are loaded.

Symmetric, with one scale for each output: the largest of its weights is 127 (the row-wise absmax
of Dettmers et al., "LLM.int8()", 2022). Activations stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Int8Weight", "RoundedLinear", "round_linears"]

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
        scales = torch.linalg.vector_norm(weight, math.inf, dim=1) / _LARGEST
        steps = scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return cls((weight / steps).round_().to(torch.int8), scales)

    def numbers(self) -> torch.Tensor:
        """[outputs, inputs] float32."""
        return self.values * self.scales[:, None]


class RoundedLinear(nn.Module):
    """Computes what the `nn.Linear` it is made from does, with the rounded weight.

    Slow, for it expands its weight each time: it is there to be laid out for the product that takes
    the eight bits as they lie, and to say beforehand what that has to give.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.rounded = Int8Weight.nearest(linear.weight.detach())
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features] float32, made anew."""
        return self.rounded.numbers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] to [..., out_features]."""
        return F.linear(x, self.weight, self.bias)


def round_linears(layers: Iterable[nn.Module]) -> int:
    """Replace each `nn.Linear` in `layers`; how many weights that were.

    Subclasses of it may do more and stay as they are.
    """
    num_rounded = 0
    for layer in layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and child.weight.numel():
                    setattr(module, name, RoundedLinear(child))
                    num_rounded += child.weight.numel()
    return num_rounded
