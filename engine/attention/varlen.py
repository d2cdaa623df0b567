"""All sequences of a batch in one call of `torch.nn.attention.varlen.varlen_attn`, on CUDA.

The kernel takes packed queries and, for each sequence, where its keys begin in a token-major
tensor and how many they are. That is what a contiguous range of slots is: the pool is that tensor,
and neither a block table nor pages are needed. FlashAttention 2, which torch brings, reads
`cu_seq_k` as mere beginnings as soon as `seqused_k` is given (`BlockInfo` in its `block_info.h`,
2.8), in any order and with gaps; with a block table it wants pages of 256 tokens. As the documented
meaning is narrower, `check.py` tries it on the device before a stage relies on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from engine.attention.backend import AttentionTask
from engine.attention.sdpa import SdpaBackend
from engine.batch import ForwardBatch
from engine.transfer import moved

__all__ = ["VarlenBackend", "VarlenLayout", "find_kernel", "layout_of"]

Kernel = Callable[..., torch.Tensor]

NEEDED = {"window_size", "seqused_k", "enable_gqa", "scale"}
"""Arguments that the kernel must have; torch 2.11 has it without them."""
LARGEST_HEAD = 256
HEAD_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """Where a batch's queries and keys lie, N sequences; all int32 on the device."""

    query_starts: torch.Tensor  # [N + 1], in the packed tokens; the last is their number
    key_starts: torch.Tensor  # [N + 1], in the pool's slots; the last is not read
    key_counts: torch.Tensor  # [N], past and new
    max_queries: int
    max_keys: int


def layout_of(batch: ForwardBatch, device: torch.device) -> VarlenLayout:
    """The batch's layout: made and moved once per batch, then shared by all layers."""
    key = (VarlenLayout, device)
    layout = cast(VarlenLayout | None, batch.layouts.get(key))
    if layout is None:
        parts = batch.segments
        size = len(parts)
        firsts = [s.start if batch.slots is None else s.first_slot for s in parts]
        counts = [s.past + s.count for s in parts]
        starts = [*(s.start for s in parts), batch.num_tokens]
        numbers = torch.tensor([*starts, *firsts, 0, *counts], dtype=torch.int32)
        numbers = moved(numbers, device)
        query_starts, key_starts, key_counts = numbers.split([size + 1, size + 1, size])
        longest = max(s.count for s in parts)
        layout = VarlenLayout(query_starts, key_starts, key_counts, longest, max(counts))
        batch.layouts[key] = layout
    return layout


class VarlenBackend:
    """One call per layer; what the kernel doesn't know goes sequence by sequence."""

    name = "varlen_attn"
    token_major = True
    capturable = True

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._others = SdpaBackend()
        # Keys aren't split by the longest sequence: its sums don't depend on its neighbours.
        self._options = {"num_splits": 1} if "num_splits" in _parameters(kernel) else {}

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        task: AttentionTask,
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        size, rule = keys.shape[2], task.rule
        fits = size == values.shape[2] and size <= LARGEST_HEAD and size % HEAD_MULTIPLE == 0
        if not (fits and task.is_plain) or rule.chunk:
            return self._others.attend(query, keys, values, task)
        layout = layout_of(task.batch, query.device)
        if rule.window:
            window = (rule.window - 1, 0)
        else:  # A single query sees all keys; told so, the kernel reads them once for a group.
            window = (-1, -1) if layout.max_queries == 1 else (-1, 0)
        return self._kernel(
            query.transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            layout.query_starts,
            layout.key_starts,
            layout.max_queries,
            layout.max_keys,
            scale=task.scale,
            window_size=window,
            enable_gqa=query.shape[0] != keys.shape[0],
            seqused_k=layout.key_counts,
            **self._options,
        )


def find_kernel() -> Kernel | None:
    """torch's `varlen_attn`; None if it isn't there or lacks an argument."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel = cast(Kernel, varlen_attn)
    return kernel if _parameters(kernel) >= NEEDED else None


def _parameters(kernel: Kernel) -> set[str]:
    return set(inspect.signature(kernel).parameters)
