"""Linear layers whose weights are laid out for a CPU's matrix product, once, when loaded.

`F.linear` hands MKL or oneDNN a plain matrix, which they rearrange in every call; with few rows
that costs more than the product. On two AVX-512 cores of Intel's, float32, all products of M1 of
the benchmarks, weights read from memory, GFLOP/s at 16 / 32 / 64 / 128 / 512 rows: 165 / 254 /
290 / 300 / 315 with `panel_product.c`, 118 / 178 / 240 / 288 / 300 laid out for MKL. Without a
compiler MKL's or oneDNN's operators serve, which are those that inductor's freezing uses; they
have no public name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import nn

from engine.kernels.panel_product import panel_product
from engine.models.module_replacement import replace_modules
from engine.weights.int8 import QuantizedLinear, is_plain_linear

__all__ = ["LaidOutLinear", "can_lay_out", "lay_out_linears", "lays_out_int8"]

# MKL's layout serves any number of rows, but is made for one, which matters with several threads:
# on two, one made for 512 gives 159 and 194 GFLOP/s at 64 and 128 rows, one for 16 286 at 512.
MKL_ROWS = 128
_GIVE_BACK_BYTES = 64 << 20


class Product(Protocol):
    """A weight, laid out one way or another, and the product with it."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` [..., inputs] to [..., outputs]."""


class LaidOutLinear(nn.Module):
    """Computes what the linear layer it is made from does, on a CPU in float32."""

    def __init__(self, linear: nn.Linear | QuantizedLinear, product: Product) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._product = product
        self.bias = linear.bias
        # Shape, dtype and device for who asks. Who reads the values gets no number, which the
        # check at load finds; the plain matrix would take its memory a second time.
        shape_alone = _shape_alone(linear.out_features, linear.in_features)
        self.weight = nn.Parameter(shape_alone, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] to [..., out_features]."""
        return self._product(x, self.bias)


def _shape_alone(outputs: int, inputs: int) -> torch.Tensor:
    """[outputs, inputs] that take the memory of one number, which is none."""
    return torch.full((1, 1), math.nan).expand(outputs, inputs)


class _Panels:
    def __init__(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        multiply = panel_product()
        assert multiply is not None
        self._multiply = multiply
        self._laid_out = multiply.lay_out(weight)
        self._outputs = weight.shape[0]
        self._scales = scales

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._multiply(x, self._laid_out, bias, self._outputs, self._scales)


class _Mkl:
    def __init__(self, weight: torch.Tensor) -> None:
        self._laid_out = torch.ops.mkl._mkl_reorder_linear_weight(weight, MKL_ROWS)
        self._shape_alone = _shape_alone(*weight.shape)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        plain = self._shape_alone
        # Told another number of rows than there are, it would take the plain weight.
        rows = x.numel() // plain.shape[1]
        return cast(torch.Tensor, torch.ops.mkl._mkl_linear(x, self._laid_out, plain, bias, rows))


class _OneDnn:
    def __init__(self, weight: torch.Tensor) -> None:
        self._laid_out = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        return cast(torch.Tensor, linear(x, self._laid_out, bias, "none", [], ""))


def can_lay_out(device: torch.device, dtype: torch.dtype) -> bool:
    """True where laid-out weights are known to pay."""
    return device.type == "cpu" and dtype == torch.float32 and _layout() is not None


def lays_out_int8() -> bool:
    """True if quantized weights are multiplied with as they are."""
    return panel_product() is not None


def _layout() -> Callable[[torch.Tensor], Product] | None:
    """Of `weight` [outputs, inputs], the fastest there is here."""
    if panel_product() is not None:
        return _Panels
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear"):
        return _Mkl
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return _OneDnn
    return None


def lay_out_linears(model: nn.Module, give_back: Callable[[], None] | None = None) -> None:
    """Replace each `nn.Linear` in `model`; subclasses of it may do more and stay as they are.

    Quantized weights are laid out as they are where there is a product with such weights, else as
    the numbers that they stand for.

    :param give_back: called now and then, for the memory of the weights that were replaced
    """
    layout = _layout()
    assert layout is not None, "ask can_lay_out before"
    replaced_bytes = 0

    def replacement(module: nn.Module) -> LaidOutLinear | None:
        nonlocal replaced_bytes
        if replaced_bytes > _GIVE_BACK_BYTES and give_back is not None:
            give_back()
            replaced_bytes = 0
        if (new := laid_out(module)) is not None:
            replaced_bytes += 4 * math.prod(new.weight.shape)
        return new

    def laid_out(module: nn.Module) -> LaidOutLinear | None:
        if isinstance(module, QuantizedLinear) and lays_out_int8():
            return LaidOutLinear(module, _Panels(module.quantized.values, module.quantized.scales))
        if isinstance(module, QuantizedLinear) or is_plain_linear(module):
            return LaidOutLinear(module, layout(module.weight.detach()))
        return None

    replace_modules(model, replacement)
