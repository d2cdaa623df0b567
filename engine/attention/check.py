"""A backend against attention sequence by sequence, on random numbers, before a stage relies on it.

The probe compares a model's output on sixteen tokens; this adds what they can't show: sequences
longer than a kernel's blocks, windows that cut, ranges of slots in any order and with gaps between
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from engine.attention.backend import AttentionBackend, AttentionTask
from engine.attention.kv_pool import KVPool, KVShape
from engine.attention.masks import MaskRule
from engine.attention.sdpa import SdpaBackend
from engine.batch import ForwardBatch, Segment
from queue_api.wire.errors import EngineError

__all__ = ["AttentionMismatchError", "Heads", "check_attention"]

_MIXED = [(0, 70), (300, 1), (131, 40), (0, 1), (517, 1)]
"""(past, new tokens) of the sequences of a mixed batch."""
_DECODES = [(300, 1), (0, 1), (517, 1)]
_WINDOW = 100
_GAP = 5


class AttentionMismatchError(EngineError):
    """A backend's numbers aren't those of attention sequence by sequence."""


@dataclass(frozen=True)
class Heads:
    """What the check depends on of a layer."""

    num_heads: int
    shape: KVShape
    rule: MaskRule


def check_attention(
    backend: AttentionBackend, layers: Iterable[Heads], device: torch.device, dtype: torch.dtype
) -> None:
    """Compare `backend` with the reference for each kind of layer.

    :raises AttentionMismatchError: if a row is off by more than rounding
    """
    for layer in set(layers):
        rule = layer.rule
        rule = replace(rule, window=_WINDOW if rule.window else 0, chunk=_WINDOW * bool(rule.chunk))
        for lengths in (_MIXED, _DECODES):
            error = _error(backend, replace(layer, rule=rule), lengths, device, dtype)
            if not error <= (1e-4 if dtype == torch.float32 else 2e-2):  # NaN, too
                raise AttentionMismatchError(f"attention is off by {error:.1e} ({layer})")


def _error(
    backend: AttentionBackend,
    layer: Heads,
    lengths: list[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The largest relative error of a row and head."""
    batch, num_slots = _batch(lengths)
    shape = layer.shape
    pool = KVPool([shape], num_slots, device=device, dtype=dtype, token_major=backend.token_major)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch.num_tokens, layer.num_heads, shape.key_size, generator=generator)
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    query = query.to(device, dtype).transpose(0, 1)  # [H, T, D], strided as models hand it over
    args = query, pool.keys[0], pool.values[0]
    task = AttentionTask(batch, layer.rule, shape.key_size**-0.5)
    found, expected = (b.attend(*args, task).float() for b in (backend, SdpaBackend()))
    difference = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(difference.max())


def _batch(lengths: list[tuple[int, int]]) -> tuple[ForwardBatch, int]:
    """A batch of such sequences, the first ones' slots behind the later ones', and all slots."""
    num_slots = sum(past + count + _GAP for past, count in lengths)
    segments: list[Segment] = []
    start, end_slot = 0, num_slots
    for number, (past, count) in enumerate(lengths):
        end_slot -= past + count + _GAP
        segments.append(Segment(start, count, past, end_slot, number))
        start += count
    numbers = torch.arange(start)  # what attention reads of the tokens is their segments alone
    return ForwardBatch(segments, numbers, numbers, numbers, numbers[:0]), num_slots
