"""The functions of `fused_layers.c`, checked calls: what norms, gates and rotations come to."""

from __future__ import annotations

import ctypes
import functools

import torch

from engine.kernels.native_library import native_library

__all__ = ["FusedLayers", "can_rotate", "fused_layers", "is_plain"]


class FusedLayers:
    """The functions of `fused_layers.c`; all tensors are such as `is_plain` accepts."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._rms_norm = library.rms_norm
        self._rms_norm.argtypes = (pointer, pointer, pointer, size, size, ctypes.c_float, threads)
        self._silu_gate = library.silu_gate
        self._silu_gate.argtypes = (pointer, pointer, size, threads)
        self._rotate = library.rotate
        self._rotate.argtypes = (
            *(pointer, pointer, size, size),
            *(pointer, pointer),
            *(size, size, size, threads),
        )
        self._write_slots = library.write_slots
        self._write_slots.argtypes = (
            *(pointer, size, size),
            *(pointer, pointer),
            *(size, size, size, size, threads),
        )
        for function in (self._rms_norm, self._silu_gate, self._rotate, self._write_slots):
            function.restype = None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm of `x` [..., E] times `weight` [E]."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._rms_norm(
            *(x.data_ptr(), weight.data_ptr(), out.data_ptr()),
            *(x.numel() // size, size, eps, torch.get_num_threads()),
        )
        return out

    def silu_gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, written into `gate`; of one shape, both contiguous."""
        self._silu_gate(gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads())
        return gate

    def rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """Rotary positions for `x` [1, H, T, D] that `can_rotate` accepts with [1, T, D]."""
        _, num_heads, num_tokens, size = x.shape
        # Not like `x`, which may be a part of each head: that has gaps, and its like has none.
        out = x.new_empty(1, num_tokens, num_heads, size).transpose(1, 2)
        self._rotate(
            *(x.data_ptr(), out.data_ptr(), x.stride(1), x.stride(2)),
            *(cosine.data_ptr(), sine.data_ptr(), num_heads, num_tokens, size),
            torch.get_num_threads(),
        )
        return out

    def write_slots(self, rows: torch.Tensor, slots: torch.Tensor, pool: torch.Tensor) -> None:
        """Write `rows` [H, T, D] to `slots` [T] of `pool` [H, S, D], which is contiguous.

        The caller vouches for the slots.
        """
        num_heads, num_tokens, size = rows.shape
        self._write_slots(
            *(rows.data_ptr(), rows.stride(0), rows.stride(1), slots.data_ptr(), pool.data_ptr()),
            *(num_heads, num_tokens, pool.shape[1], size, torch.get_num_threads()),
        )


@functools.cache
def fused_layers() -> FusedLayers | None:
    """The native functions; None where they can't be had."""
    library = native_library("fused_layers")
    return None if library is None else FusedLayers(library)


def can_rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
    """Whether `x` is [1, H, T, D], rows without gaps, and the others are [1, T, D] for it."""
    return (
        x.dim() == 4
        and x.stride(3) == 1
        and x.shape[3] % 2 == 0
        and cosine.shape == sine.shape == (1, x.shape[2], x.shape[3])
        and cosine.is_contiguous()
        and sine.is_contiguous()
        and x.shape[0] == 1
        and is_plain(x)
        and cosine.dtype == sine.dtype == torch.float32
    )


def is_plain(x: torch.Tensor) -> bool:
    """Whether the C code can read it: float32 on a CPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu"
