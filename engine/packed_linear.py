"""Linear layers whose weights are laid out for a CPU's matrix product, once, when loaded.

`F.linear` hands MKL or oneDNN a plain matrix, which they rearrange in every call; with few rows
that costs more than the product. On two AVX-512 cores of Intel's, float32, the seven products of
a layer of 512 hidden numbers, GFLOP/s at 32 / 64 / 128 / 512 rows: 130 / 194 / 241 / 287 with
`F.linear`, 156 / 205 / 253 / 291 laid out for oneDNN, 178 / 232 / 283 / 302 for MKL. The operators
are those that inductor's freezing uses; they have no public name.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

__all__ = ["PackedLinear", "can_pack", "pack_linears"]

# MKL's layout serves any number of rows, but is made for one, which matters with several threads:
# on two, one made for 512 gives 159 and 194 GFLOP/s at 64 and 128 rows, one for 16 286 at 512.
MKL_ROWS = 128


class PackedLinear(nn.Module):
    """Computes what the `nn.Linear` it is made from does, on a CPU in float32.

    With MKL where torch has it, else with oneDNN.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        self._uses_mkl = _has_mkl()
        if self._uses_mkl:
            self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, MKL_ROWS)
        else:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = linear.bias
        # Shape, dtype and device for who asks. Who reads the values gets no number, which the
        # check at load finds; the plain matrix would take its memory a second time.
        stand_in = torch.full((1, 1), math.nan).expand(weight.shape)
        self.weight = nn.Parameter(stand_in, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] to [..., out_features]."""
        if self._uses_mkl:
            # Told another number of rows than there are, it would take the plain weight.
            rows = x.numel() // self.in_features
            out = torch.ops.mkl._mkl_linear(x, self._packed, self.weight, self.bias, rows)
        else:
            out = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return cast(torch.Tensor, out)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True where packed weights are known to pay."""
    return device.type == "cpu" and dtype == torch.float32 and (_has_mkl() or _has_onednn())


def _has_mkl() -> bool:
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack_linears(model: nn.Module) -> None:
    """Replace each `nn.Linear` in `model`; subclasses of it may do more and stay as they are."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
