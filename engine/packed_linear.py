"""Linear layers whose weights are laid out for oneDNN's matrix product, once, when loaded.

`F.linear` hands MKL or oneDNN a plain matrix, which they rearrange in every call; with few rows
that costs more than the product. On one AVX-512 core, float32, [rows, 512] x [512, 1408], GFLOP/s
at 4 / 16 / 64 / 512 rows: 38 / 73 / 92 / 98 with `F.linear`, 75 / 101 / 108 / 107 packed. The
operators are those that inductor's freezing uses; they have no public name.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

__all__ = ["PackedLinear", "can_pack", "pack_linears"]


class PackedLinear(nn.Module):
    """Computes what the `nn.Linear` it is made from does, on a CPU in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        # Shape, dtype and device for who asks. Who reads the values gets no number, which the
        # check at load finds; the plain matrix would take its memory a second time.
        stand_in = torch.full((1, 1), math.nan).expand(linear.weight.shape)
        self.weight = nn.Parameter(stand_in, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] to [..., out_features]."""
        out = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return cast(torch.Tensor, out)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True where packed weights are known to pay."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_linears(model: nn.Module) -> None:
    """Replace each `nn.Linear` in `model`; subclasses of it may do more and stay as they are."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
