"""Which attention a stage uses, by device and dtype: the one place that says so."""

from __future__ import annotations

import torch

from engine.attention.backend import AttentionBackend
from engine.attention.native import NativeBackend, native_attention
from engine.attention.sdpa import SdpaBackend
from engine.attention.varlen import VarlenBackend, find_kernel

__all__ = ["backends_for"]


def backends_for(device: torch.device, dtype: torch.dtype) -> list[AttentionBackend]:
    """The backends that may serve, the fastest first; the last one serves always.

    A stage takes the first that gives the model's own output when it is loaded.
    """
    backends: list[AttentionBackend] = [SdpaBackend()]
    if device.type == "cpu" and dtype == torch.float32 and (native := native_attention()):
        backends.insert(0, NativeBackend(native))
    half = dtype in {torch.bfloat16, torch.float16}
    if device.type == "cuda" and half and (kernel := find_kernel()):
        backends.insert(0, VarlenBackend(kernel))
    return backends
