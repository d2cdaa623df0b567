"""`torch.nn.attention.varlen.varlen_attn` as its documentation says, on a CPU, row by row.

There is no such kernel for a CPU, so what the engine hands to it is tested against this one.
"""

from __future__ import annotations

import pytest
import torch

from engine.attention.backend import AttentionBackend
from engine.attention.sdpa import SdpaBackend
from engine.attention.varlen import VarlenBackend
from engine.stages import stage


def reference_varlen_attn(
    query: torch.Tensor,  # [T, H, D]
    key: torch.Tensor,  # [S, Hkv, D], or pages [P, page size, Hkv, D]
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Each sequence's queries over its keys, both ends aligned at the bottom right."""
    for numbers in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert numbers is None or (numbers.dtype == torch.int32 and numbers.stride(-1) == 1)
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    num_sequences = len(cu_seq_q) - 1
    assert int(cu_seq_q[-1]) == len(query)
    group = query.shape[1] // key.shape[-2]
    assert enable_gqa or group == 1
    assert num_splits in {None, 1}
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = torch.full_like(query, torch.nan)
    for i in range(num_sequences):
        start, end = int(cu_seq_q[i]), int(cu_seq_q[i + 1])
        if block_table is not None:
            assert seqused_k is not None
            keys, values = (t[block_table[i].long()].flatten(0, 1) for t in (key, value))
            count = int(seqused_k[i])
        else:
            assert cu_seq_k is not None
            first = int(cu_seq_k[i])
            count = int(seqused_k[i]) if seqused_k is not None else int(cu_seq_k[i + 1]) - first
            assert first >= 0
            assert first + count <= len(key)
            keys, values = key[first:], value[first:]
        assert 0 < end - start <= max_q
        assert end - start <= count <= max_k
        out[start:end] = _attend(query[start:end], keys[:count], values[:count], scale, window_size)
    return out


def _attend(q, k, v, scale: float, window: tuple[int, int]) -> torch.Tensor:
    """q [n, H, D] over k, v [L, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))  # [H, L, D]
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale  # [H, n, L]
    last = torch.arange(q.shape[0])[:, None] + k.shape[1] - q.shape[0]
    place = torch.arange(k.shape[1])[None]
    left, right = window
    hidden = torch.zeros(scores.shape[1:], dtype=torch.bool)
    if left >= 0:
        hidden |= place < last - left
    if right >= 0:
        hidden |= place > last + right
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def install(monkeypatch: pytest.MonkeyPatch, *first: AttentionBackend) -> None:
    """Let stages choose as on CUDA: `first` in turn, the varlen backend by default, then SDPA."""
    backends = [*(first or (VarlenBackend(reference_varlen_attn),)), SdpaBackend()]
    monkeypatch.setattr(stage, "backends_for", lambda device, dtype: backends)
