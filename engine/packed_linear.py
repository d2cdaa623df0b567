"""Linear layers whose weights are laid out for a CPU's matrix product, once, when loaded.

`F.linear` hands MKL or oneDNN a plain matrix, which they rearrange in every call; with few rows
that costs more than the product. On two AVX-512 cores of Intel's, float32, all products of M1 of
the benchmarks, weights read from memory, GFLOP/s at 16 / 32 / 64 / 128 / 512 rows: 165 / 254 /
290 / 300 / 315 with `packed_product.c`, 118 / 178 / 240 / 288 / 300 laid out for MKL. Without a
compiler MKL's or oneDNN's operators serve, which are those that inductor's freezing uses; they
have no public name.
"""

from __future__ import annotations

import math
from typing import Protocol, cast

import torch
from torch import nn

from engine.packed_product import packed_product

__all__ = ["PackedLinear", "can_pack", "pack_linears"]

# MKL's layout serves any number of rows, but is made for one, which matters with several threads:
# on two, one made for 512 gives 159 and 194 GFLOP/s at 64 and 128 rows, one for 16 286 at 512.
MKL_ROWS = 128


class PackedLinear(nn.Module):
    """Computes what the `nn.Linear` it is made from does, on a CPU in float32."""

    def __init__(self, linear: nn.Linear, layout: Layout) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        self._layout = layout
        self._packed = layout.pack(weight)
        self.bias = linear.bias
        # Shape, dtype and device for who asks. Who reads the values gets no number, which the
        # check at load finds; the plain matrix would take its memory a second time.
        stand_in = torch.full((1, 1), math.nan).expand(weight.shape)
        self.weight = nn.Parameter(stand_in, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] to [..., out_features]."""
        return self._layout.linear(x, self._packed, self.weight, self.bias)


class Layout(Protocol):
    """A way to lay weights out."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [outputs, inputs], laid out."""

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x` [..., inputs] to [..., outputs]; `weight` has the plain one's shape alone."""


class _Panels:
    def __init__(self) -> None:
        product = packed_product()
        assert product is not None
        self.pack = product.pack
        self._product = product

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return self._product(x, packed, bias, weight.shape[0])


class _Mkl:
    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, torch.ops.mkl._mkl_reorder_linear_weight(weight, MKL_ROWS))

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        # Told another number of rows than there are, it would take the plain weight.
        rows = x.numel() // weight.shape[1]
        return cast(torch.Tensor, torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows))


class _OneDnn:
    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(weight))

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        weight: torch.Tensor,  # noqa: ARG002 - a layout is asked so
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        return cast(torch.Tensor, linear(x, packed, bias, "none", [], ""))


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True where packed weights are known to pay."""
    return device.type == "cpu" and dtype == torch.float32 and _layout() is not None


def _layout() -> Layout | None:
    """The fastest there is here."""
    if packed_product() is not None:
        return _Panels()
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear"):
        return _Mkl()
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return _OneDnn()
    return None


def pack_linears(model: nn.Module) -> None:
    """Replace each `nn.Linear` in `model`; subclasses of it may do more and stay as they are."""
    layout = _layout()
    assert layout is not None, "ask can_pack before"
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.numel():
                setattr(module, name, PackedLinear(child, layout))
