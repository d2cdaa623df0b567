"""Linear layers whose weights are quantized to eight bits when they are loaded.

Symmetric, with one scale for each output: the largest of its weights is 127 (the row-wise absmax
of Dettmers et al., "LLM.int8()", 2022). Activations stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from engine.models.module_replacement import replace_modules

__all__ = [
    "Int8Weight",
    "QuantizedLinear",
    "is_plain_linear",
    "quantize_linears",
]

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
        scales.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros
        return cls((weight / scales[:, None]).round_().to(torch.int8), scales)

    def numbers(self) -> torch.Tensor:
        """[outputs, inputs] float32."""
        return self.values * self.scales[:, None]


class QuantizedLinear(nn.Module):
    """Computes what the `nn.Linear` it is made from does, with the quantized weight.

    Slow, for it expands its weight each time. It says what the product that takes the eight bits as
    they lie has to give, and is replaced by that.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.quantized = Int8Weight.nearest(linear.weight.detach())
        self.bias = linear.bias
        # A model's dtype is that of its first parameter, and its norms may have none.
        self.dtype_alone = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features] float32, made anew."""
        return self.quantized.numbers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] to [..., out_features]."""
        return F.linear(x, self.weight, self.bias)


def quantize_linears(root: nn.Module, *, in_float32: bool = False) -> int:
    """Quantize the weight of each `nn.Linear` below `root`; how many parameters that were.

    Subclasses of it may do more and stay as they are.

    :param in_float32: keep an `nn.Linear` with the numbers that the quantized weight stands for,
        else put a `QuantizedLinear` in its place
    """
    num_quantized = 0

    def quantized(module: nn.Module) -> nn.Module | None:
        nonlocal num_quantized
        if not is_plain_linear(module):
            return None
        num_quantized += module.weight.numel()
        return _in_float32(module) if in_float32 else _in_eight_bits(module)

    replace_modules(root, quantized)
    return num_quantized


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True for an `nn.Linear`, and no subclass of it, that has a weight."""
    return type(module) is nn.Linear and module.weight.numel() > 0


def _in_eight_bits(linear: nn.Linear) -> QuantizedLinear:
    quantized = QuantizedLinear(linear)
    # Its memory is free before the next one's.
    linear.weight = None  # type: ignore[assignment]
    return quantized


def _in_float32(linear: nn.Linear) -> nn.Linear:
    # A new tensor: the old one may be part of a mapped file that others keep mapped, and what is
    # written into it stays in memory with it.
    numbers = Int8Weight.nearest(linear.weight.detach()).numbers()
    linear.weight = nn.Parameter(numbers, requires_grad=False)
    return linear
