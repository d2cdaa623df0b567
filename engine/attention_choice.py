"""Which attention a stage uses, by device and dtype: the one place that says so."""

from __future__ import annotations

import torch

from engine.attention_backend import AttentionBackend
from engine.native_attention import CompiledBackend, native_attention
from engine.sdpa import SdpaBackend
from engine.varlen_attention import VarlenBackend, find_kernel

__all__ = ["backends_for"]


def backends_for(device: torch.device, dtype: torch.dtype) -> list[AttentionBackend]:
    """The backends that may serve, the fastest first; the last one serves always.

    A stage takes the first that gives the model's own output when it is loaded.
    """
    backends: list[AttentionBackend] = [SdpaBackend()]
    if device.type == "cpu" and dtype == torch.float32 and (compiled := native_attention()):
        backends.insert(0, CompiledBackend(compiled))
    half = dtype in {torch.bfloat16, torch.float16}
    if device.type == "cuda" and half and (kernel := find_kernel()):
        backends.insert(0, VarlenBackend(kernel))
    return backends
