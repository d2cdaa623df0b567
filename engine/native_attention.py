"""`decode_attention.c`, called with checked arguments.

A batch's single new tokens otherwise cost one SDPA call per sequence and layer.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from engine.attention_backend import AttentionTask
from engine.native_library import native_library
from engine.sdpa import attend_spans, plan_of

__all__ = ["CompiledBackend", "DecodeAttention", "decode_attention"]


class DecodeAttention:
    """Attention of a batch's single new tokens, over the keys and values of one layer's pool."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.attend_decodes
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = [
            *(pointer, size, size, pointer, pointer, pointer),
            *(size, size, size, size, size, ctypes.c_float),
            *(pointer, size, size, ctypes.c_int),
        ]
        self._function.restype = ctypes.c_int

    @staticmethod
    def takes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these are what the C code reads: float32 on a CPU, rows without gaps."""
        return (
            all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (query, keys, values))
            and query.stride(-1) == 1
            and keys.is_contiguous()
            and values.is_contiguous()
            and keys.shape[:2] == values.shape[:2]
            and query.shape[-1] == keys.shape[-1]
            and query.shape[0] % keys.shape[0] == 0
        )

    def __call__(  # noqa: PLR0917 - as many as attention has
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        spans: torch.Tensor,
        scale: float,
    ) -> None:
        """Write the spans' rows of `out`.

        :param query: [H, T, D] that `takes` accepts with `keys` [Hkv, S, D], `values` [Hkv, S, Dv]
        :param out: [T, H, Dv] contiguous
        :param spans: [n, 3] int64, each a row of T, its first slot and the slot after its last
        :raises ValueError: if a span lies outside the tensors
        """
        num_heads, num_rows, key_size = query.shape
        num_kv, num_slots, value_size = values.shape
        shortest, longest = (int(n) for n in (spans[:, 2] - spans[:, 1]).aminmax())
        lowest_row, lowest_slot, _ = spans.amin(0).tolist()
        highest_row, _, last_slot = spans.amax(0).tolist()
        lowest = min(lowest_row, lowest_slot, shortest - 1)
        if lowest < 0 or highest_row >= num_rows or last_slot > num_slots:
            raise ValueError(f"spans outside {num_rows} rows and {num_slots} slots: {spans}")
        if not out.is_contiguous() or out.shape != (num_rows, num_heads, value_size):
            raise ValueError(f"out of shape {tuple(out.shape)} isn't contiguous [T, H, Dv]")
        failed = self._function(
            *(query.data_ptr(), query.stride(0), query.stride(1)),
            *(keys.data_ptr(), values.data_ptr(), out.data_ptr()),
            *(num_kv, num_heads // num_kv, num_slots, key_size, value_size, scale),
            *(spans.data_ptr(), len(spans), longest, torch.get_num_threads()),
        )
        if failed:
            raise MemoryError(f"no memory for the scores of {longest} keys")


class CompiledBackend:
    """Single new tokens in one compiled call, all others sequence by sequence."""

    name = "compiled decodes, SDPA per sequence"
    token_major = False
    capturable = False

    def __init__(self, decode: DecodeAttention) -> None:
        self._decode = decode

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        task: AttentionTask,
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        num_heads, num_tokens, _ = query.shape
        out = query.new_empty(num_tokens, num_heads, values.shape[2])
        plan = plan_of(task, query)
        spans = plan.spans
        plain = len(plan.singles) > 0 and task.is_plain
        if plain and DecodeAttention.takes(query, keys, values):
            self._decode(query, keys, values, out, plan.singles, task.scale)
            spans = plan.longer
        attend_spans(spans, query, keys, values, task, out=out)
        return out


@functools.cache
def decode_attention() -> DecodeAttention | None:
    """The compiled function; None where it can't be had."""
    library = native_library("decode_attention")
    return None if library is None else DecodeAttention(library)
