"""`decode_attention.c` and `prompt_attention.c`, called with checked arguments.

A batch otherwise costs one SDPA call per sequence and layer.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, cast

import torch

from engine.attention.backend import AttentionTask
from engine.attention.masks import MaskRule
from engine.attention.sdpa import SdpaBackend
from engine.batch import ForwardBatch
from engine.kernels.native_library import native_library

__all__ = ["NativeAttention", "NativeBackend", "SegmentTable", "native_attention"]


@dataclass(frozen=True)
class SegmentTable:
    """A batch's segments, as the C code reads them, and what bounds them."""

    decodes: torch.Tensor
    """[n, 3] int64: a row of T, its first slot and the slot after its last."""
    prompts: torch.Tensor
    """[n, 4] int64: a first row of T, a number of rows, the sequence's first slot, and its tokens
    before them."""
    longest: int
    """Keys of any segment."""
    num_rows: int
    """Rows that `out` needs at least."""
    num_slots: int
    """Slots that the pool needs at least."""

    @classmethod
    def of(cls, batch: ForwardBatch, rule: MaskRule) -> SegmentTable:
        """All of the batch's segments under `rule`.

        :raises ValueError: if one begins before the first row or slot, or has no key
        """
        decodes, prompts = [], []
        longest = num_rows = num_slots = 0
        for segment in batch.segments:
            # Without slots the batch's own K and V serve, where a sequence lies as it is packed.
            slot = segment.start if batch.slots is None else segment.first_slot
            first = rule.first_key(segment.past)
            end = segment.past + segment.count
            if min(segment.start, slot, segment.past, segment.count - 1) < 0:
                raise ValueError(f"a segment outside rows and slots: {segment}")
            if segment.count == 1:
                decodes.append((segment.start, slot + first, slot + end))
            else:
                prompts.append((segment.start, segment.count, slot, segment.past))
            longest = max(longest, end - first)
            num_rows = max(num_rows, segment.start + segment.count)
            num_slots = max(num_slots, slot + end)
        return cls(
            decodes=torch.tensor(decodes, dtype=torch.int64).reshape(-1, 3),
            prompts=torch.tensor(prompts, dtype=torch.int64).reshape(-1, 4),
            longest=longest,
            num_rows=num_rows,
            num_slots=num_slots,
        )


class NativeAttention:
    """Attention of a batch's new tokens, over the keys and values of one layer's pool."""

    def __init__(self, decodes: ctypes.CDLL, prompts: ctypes.CDLL) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        layer: list[Any] = [
            *(pointer, size, size, pointer, pointer, pointer),
            *(size, size, size, size, size, ctypes.c_float),
        ]
        segments: list[Any] = [pointer, size, size, ctypes.c_int]
        self._decodes = decodes.attend_decodes
        self._decodes.argtypes = [*layer, *segments]
        self._prompts = prompts.attend_prompts
        self._prompts.argtypes = [*layer, size, size, *segments]
        for function in (self._decodes, self._prompts):
            function.restype = ctypes.c_int

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
        segments: SegmentTable,
        rule: MaskRule,
        scale: float,
    ) -> torch.Tensor:
        """The attention's output [T, H, Dv]; rows of no segment are left alone.

        :param query: [H, T, D] that `takes` accepts with `keys` [Hkv, S, D], `values` [Hkv, S, Dv]
        :raises ValueError: if a segment lies outside the tensors
        :raises MemoryError: if there is none for a sequence's scores
        """
        num_heads, num_rows, key_size = query.shape
        num_kv, num_slots, value_size = values.shape
        if segments.num_rows > num_rows or segments.num_slots > num_slots:
            raise ValueError(f"segments outside {num_rows} rows and {num_slots} slots: {segments}")
        out = query.new_empty(num_rows, num_heads, value_size)
        layer = (
            *(query.data_ptr(), query.stride(0), query.stride(1)),
            *(keys.data_ptr(), values.data_ptr(), out.data_ptr()),
            *(num_kv, num_heads // num_kv, num_slots, key_size, value_size, scale),
        )
        threads, failed = torch.get_num_threads(), 0
        if count := len(segments.decodes):
            pointer = segments.decodes.data_ptr()
            failed |= self._decodes(*layer, pointer, count, segments.longest, threads)
        if count := len(segments.prompts):
            pointer, mask = segments.prompts.data_ptr(), (rule.window, rule.chunk)
            failed |= self._prompts(*layer, *mask, pointer, count, segments.longest, threads)
        if failed:
            raise MemoryError(f"no memory for the scores of {segments.longest} keys")
        return out


class NativeBackend:
    """All sequences in one native call for prompts and one for single new tokens."""

    name = "native attention"
    token_major = False
    capturable = False

    def __init__(self, attention: NativeAttention) -> None:
        self._attention = attention
        self._other = SdpaBackend()

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        task: AttentionTask,
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        if not task.is_plain or not NativeAttention.takes(query, keys, values):
            return self._other.attend(query, keys, values, task)
        key = (SegmentTable, task.rule)
        segments = cast(SegmentTable | None, task.batch.layouts.get(key))
        if segments is None:
            segments = task.batch.layouts[key] = SegmentTable.of(task.batch, task.rule)
        return self._attention(query, keys, values, segments, task.rule, task.scale)


@functools.cache
def native_attention() -> NativeAttention | None:
    """The native functions; None where they can't be had."""
    libraries = [native_library(name) for name in ("decode_attention", "prompt_attention")]
    if None in libraries:
        return None
    return NativeAttention(*cast(list[ctypes.CDLL], libraries))
