"""`fused_layers.c` in place of what a model's layers do between their matrix products.

Norms, gates and rotations as the models write them are five to ten operators each, all of which
read and write whole activations; fused they read and write them once. A part of a model is
replaced only if the fused one gives what the part itself gives on random numbers, and the check of
a stage that loads then compares the model's whole output. The model's classes aren't touched.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels.fused_functions import FusedLayers, can_rotate, fused_layers, is_plain
from engine.models.module_replacement import replace_modules
from engine.weights.layout import LaidOutLinear

__all__ = ["FusedRMSNorm", "fuse_layers"]

ROTATION = "apply_rotary_pos_emb"
"""The function that transformers' attention modules rotate query and key with."""
_TOLERANCE = 1e-5


def fuse_layers(model: nn.Module) -> None:
    """Replace what can be in `model`, whose linear layers are laid out already."""
    fused = fused_layers()
    if fused is None:
        return
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        replace_modules(model, lambda module: _fused_norm(module, fused))
        for module in list(model.modules()):
            _fuse_gate(module, fused)
            _fuse_rotation(module, fused)


# --------------------------------------------------------------------------------------- norms


class FusedRMSNorm(nn.Module):
    """Computes what a model's own RMS norm does, on a CPU in float32."""

    _scale: torch.Tensor

    def __init__(
        self, weight: nn.Parameter, scale: torch.Tensor, eps: float, fused: FusedLayers
    ) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps
        self.register_buffer("_scale", scale, persistent=False)
        self._fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., E] to the same shape."""
        if not is_plain(x):
            return F.rms_norm(x, x.shape[-1:], self._scale, self.variance_epsilon)
        return self._fused.rms_norm(x, self._scale, self.variance_epsilon)


def _fused_norm(norm: nn.Module, fused: FusedLayers) -> FusedRMSNorm | None:
    """Its fused twin, if it is a norm that has one: by the weight, or by one more, as Gemma's."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "RMSNorm" not in type(norm).__name__ or not isinstance(weight, nn.Parameter):
        return None
    if not isinstance(eps, float) or weight.dim() != 1 or weight.dtype != torch.float32:
        return None
    x = torch.randn(3, len(weight))
    for scale in (weight.detach(), weight.detach() + 1):
        twin = FusedRMSNorm(weight, scale, eps, fused)
        if _same(lambda: norm(x), twin(x)):
            return twin
    return None


# --------------------------------------------------------------------------------------- gates


def _fuse_gate(mlp: nn.Module, fused: FusedLayers) -> None:
    """Gate in place what a gated layer's products, which nobody else has, come to."""
    products = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(product, LaidOutLinear) for product in products):
        return
    gate, up, down = cast(list[LaidOutLinear], products)

    def forward(x: torch.Tensor) -> torch.Tensor:
        gated, ups = gate(x), up(x)
        if is_plain(gated):
            return cast(torch.Tensor, down(fused.silu_gate(gated, ups)))
        return cast(torch.Tensor, down(F.silu(gated) * ups))

    x = torch.randn(1, 3, gate.in_features)
    if gate.out_features == up.out_features and _same(lambda: mlp(x), forward(x)):
        mlp.forward = forward


# ----------------------------------------------------------------------------------- rotations


def _fuse_rotation(attention: nn.Module, fused: FusedLayers) -> None:
    """Let one module's forward, as it is written, find our rotation by the name of its own."""
    written = type(attention).forward
    if not isinstance(written, types.FunctionType) or ROTATION not in written.__code__.co_names:
        return
    own = written.__globals__.get(ROTATION)
    if not callable(own):
        return
    rotation = _rotation(own, fused)
    q, k = torch.randn(1, 3, 2, 8).transpose(1, 2), torch.randn(1, 3, 1, 8).transpose(1, 2)
    cosine, sine = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    ours = rotation(q, k, cosine, sine)
    if _same(lambda: torch.cat(own(q, k, cosine, sine), 1), torch.cat(ours, 1)):
        forward = types.FunctionType(
            written.__code__,
            {**written.__globals__, ROTATION: rotation},
            written.__name__,
            written.__defaults__,
            written.__closure__,
        )
        forward.__kwdefaults__ = written.__kwdefaults__
        attention.forward = types.MethodType(forward, attention)


def _rotation(own: Callable[..., Any], fused: FusedLayers) -> Callable[..., Any]:
    def rotation(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not can_rotate(q, cos, sin) or not can_rotate(k, cos, sin):
            return own(q, k, cos, sin, *args, **kwargs)
        return fused.rotate(q, cos, sin), fused.rotate(k, cos, sin)

    return rotation


def _same(own: Callable[[], Any], ours: torch.Tensor) -> bool:
    """Whether the model's own part gives ours; one that can't take the numbers doesn't."""
    try:
        expected = own()
    except Exception:  # any model code may fail in any way
        return False
    return (
        isinstance(expected, torch.Tensor)
        and expected.shape == ours.shape
        and torch.allclose(expected, ours, rtol=_TOLERANCE, atol=_TOLERANCE)
    )
