"""Attention sequence by sequence, with PyTorch's SDPA: what every device, dtype and mask can do.

On a CPU it is the fast way for prompts, too: no padding is computed, and each call reads one
contiguous range of the head-major pool. On CUDA it is correct but bound by its many launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

from engine.attention.backend import AttentionTask
from engine.attention.masks import MaskRule
from engine.batch import ForwardBatch
from engine.transfer import moved
from queue_api.wire.errors import EngineError

__all__ = ["SdpaBackend"]


@dataclass(frozen=True, slots=True)
class VisibleSegment:
    """One sequence's part of an attention call: packed tokens, slots and mask."""

    start: int
    end: int
    first_slot: int
    end_slot: int
    is_causal: bool
    """The plain lower triangle, which SDPA knows without a mask."""
    mask: torch.Tensor | None  # [count, L], 0 or -inf


class SdpaBackend:
    """One call per sequence."""

    name = "SDPA per sequence"
    token_major = False
    capturable = False

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
        for segment in _segments_of(task, query):
            k = keys[:, segment.first_slot : segment.end_slot]
            v = values[:, segment.first_slot : segment.end_slot]
            q = query[:, segment.start : segment.end]
            result = (_sdpa if task.is_plain else _explicit)(q, k, v, task, segment)
            out[segment.start : segment.end] = result.transpose(0, 1)
        return out


def _segments_of(task: AttentionTask, query: torch.Tensor) -> list[VisibleSegment]:
    """The batch's segments under its rule: made once per batch, then shared by all layers."""
    key = (task.rule, query.device, query.dtype)
    segments = cast(list[VisibleSegment] | None, task.batch.layouts.get(key))
    if segments is None:
        segments = task.batch.layouts[key] = _segments(task.batch, task.rule, query)
    return segments


def _segments(batch: ForwardBatch, rule: MaskRule, query: torch.Tensor) -> list[VisibleSegment]:
    """The batch's segments as `rule` shows them, in their order.

    :raises EngineError: if the batch is one of a CUDA graph, which has no sequences
    """
    if not batch.segments:
        raise EngineError("a layer attends sequence by sequence, which a CUDA graph can't replay")
    segments = []
    for segment in batch.segments:
        start, count, past = segment.start, segment.count, segment.past
        first_key = rule.first_key(past)
        # Without slots the batch's own K and V serve, where a sequence lies at its packed place.
        base = start if batch.slots is None else segment.first_slot
        mask = None
        causal = count > 1 and past == 0 and rule.first_key(count - 1) == 0
        if count > 1 and not causal:
            allowed = rule.mask(past, count, first_key)
            mask = torch.zeros(allowed.shape, dtype=query.dtype)
            mask = moved(mask.masked_fill_(~allowed, float("-inf")), query.device)
        segments.append(
            VisibleSegment(
                start, start + count, base + first_key, base + past + count, causal, mask
            )
        )
    return segments


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, task: AttentionTask, segment: VisibleSegment
) -> torch.Tensor:
    """SDPA of q [H, n, D] over k, v [Hkv, L, D], without repeating K and V for grouped heads."""
    num_heads, count, _ = q.shape
    num_kv = k.shape[0]
    group = num_heads // num_kv
    if count == 1:  # The heads of a group become the rows of one query: [1, Hkv, group, D].
        rows = q.reshape(1, num_kv, group, -1)
        result = F.scaled_dot_product_attention(rows, k[None], v[None], scale=task.scale)
        return result.reshape(num_heads, 1, -1)
    # K and V heads become the batch, broadcast over their query heads: views, no copies.
    result = F.scaled_dot_product_attention(
        q.reshape(num_kv, group, count, -1),
        k[:, None].expand(-1, group, -1, -1),
        v[:, None].expand(-1, group, -1, -1),
        attn_mask=segment.mask,
        is_causal=segment.is_causal,
        scale=task.scale,
    )
    return result.reshape(num_heads, count, -1)


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    task: AttentionTask,
    segment: VisibleSegment,
) -> torch.Tensor:
    """Attention with soft-capped scores or sinks, which SDPA doesn't know; q [H, n, D]."""
    num_heads, count, _ = q.shape
    softcap, sinks = task.softcap, task.sinks
    group = num_heads // k.shape[0]
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * task.scale  # [H, n, L]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = segment.mask
    if segment.is_causal:
        mask = torch.full((count, count), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:  # One more key per head, whose value is nothing.
        sink = sinks.to(scores.dtype).view(-1, 1, 1).expand(num_heads, count, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights @ v.repeat_interleave(group, 0)
