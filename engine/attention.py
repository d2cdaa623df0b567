"""The attention and mask functions that transformers models call here, and how they attend.

Registered with transformers under `ATTENTION_NAME`. A model is called with packed tokens and no
cache of its own; the mask function hands each layer a `MaskRule` in place of a mask, and the
attention function finds the stage's cache and the batch's layout in a thread-local, writes the
new K and V, and attends sequence by sequence over past and present.

Sequence by sequence is the fast way on a CPU for prompts: no padding is computed, and each call
reads one contiguous range of the head-major pool. Single new tokens go through one compiled call
for all sequences where there is one. On CUDA the calls are SDPA's, correct but launch-bound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from engine.batch import ForwardBatch
from engine.kv_cache import KVPool, KVShape
from engine.native_attention import DecodeAttention, decode_attention
from queue_api.errors import UnsupportedModelError

__all__ = ["ATTENTION_NAME", "AttentionCall", "MaskRule", "attending"]

ATTENTION_NAME = "batchmill"


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Which keys a query may see: none after itself and, if set, only a window or its chunk."""

    window: int = 0
    """The query's own token and the `window - 1` before it; 0 is no limit."""
    chunk: int = 0
    """Only tokens of the same chunk of so many positions; 0 is no limit."""
    unknown: str = ""
    """What makes the mask one that can't be described; refused by the layer that would use it, as
    models also make masks that none of their layers uses."""

    ndim = 4  # Some models look whether the mask they were given is a prepared one.

    def first_key(self, position: int) -> int:
        """The first position that the query at `position` may see."""
        if self.chunk:
            return position - position % self.chunk
        return max(0, position + 1 - self.window) if self.window else 0

    def mask(self, past: int, count: int, first_key: int) -> torch.Tensor:
        """True where the queries `past .. past+count` may look, from key `first_key` on."""
        query = torch.arange(past, past + count)[:, None]
        key = torch.arange(first_key, past + count)[None, :]
        allowed = key <= query  # [count, L]
        if self.window:
            allowed &= key > query - self.window
        if self.chunk:
            allowed &= key // self.chunk == query // self.chunk
        return allowed


class AttentionCall:
    """What the attention function needs in one stage's forward, and what it reports back."""

    def __init__(self, batch: ForwardBatch, pool: KVPool | None, first_layer: int) -> None:
        self.batch = batch
        self.pool = pool
        """None: attend over the batch's own tokens alone."""
        self.first_layer = first_layer
        self.shapes: dict[int, KVShape] = {}
        """Local layer to the shape of its K and V, as seen."""
        self.rules: dict[int, MaskRule] = {}
        """Local layer to its mask, as seen."""
        self.num_calls = 0


_current = threading.local()


@contextmanager
def attending(call: AttentionCall) -> Iterator[None]:
    """Make `call` the one that attention functions of this thread work for."""
    _current.call = call
    try:
        yield
    finally:
        _current.call = None


# --------------------------------------------------------------------------------------- masks


def _mask_parts(function: Callable[..., Any]) -> set[str]:
    """Names of the functions that transformers' masking_utils composed into `function`."""
    names: set[str] = set()
    todo: list[Callable[..., Any]] = [function]
    while todo:
        current = todo.pop()
        names.add(current.__qualname__.split(".")[0])
        for cell in getattr(current, "__closure__", None) or ():
            content = cell.cell_contents
            parts = content if isinstance(content, tuple) else (content,)
            todo += [part for part in parts if callable(part)]
    return names


def describe_mask(
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> MaskRule:
    """The mask function: say what the mask is instead of drawing it.

    Known are masks made of causal, sliding and chunked parts.
    """
    overlays = _mask_parts(mask_function) - {"and_masks", "causal_mask_function"}
    if not use_vmap and not overlays:
        return MaskRule()
    if not use_vmap and local_size:
        if overlays == {"sliding_window_overlay"}:
            return MaskRule(window=local_size)
        if overlays == {"chunked_overlay"}:
            return MaskRule(chunk=local_size)
    return MaskRule(unknown=", ".join(sorted(overlays)) or "custom parts")


# ----------------------------------------------------------------------------------- attention


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence's part of an attention call: packed tokens, slots and mask."""

    start: int
    end: int
    first_slot: int
    end_slot: int
    is_causal: bool
    """The plain lower triangle, which SDPA knows without a mask."""
    mask: torch.Tensor | None  # [count, L], 0 or -inf


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a batch is attended to under one mask rule."""

    spans: list[_Span]
    longer: list[_Span]
    """Those of more than one new token."""
    singles: torch.Tensor
    """Those of one, [n, 3] int64: the packed token, its first slot, the slot after its last."""


def _plan(call: AttentionCall, rule: MaskRule, query: torch.Tensor) -> _Plan:
    """The batch's plan under `rule`: made once per batch, then shared by all layers."""
    key = (rule, query.device, query.dtype)
    plan = cast(_Plan | None, call.batch.plans.get(key))
    if plan is None:
        spans = _spans(call, rule, query)
        longer = [span for span in spans if span.end - span.start > 1]
        singles = [(s.start, s.first_slot, s.end_slot) for s in spans if s.end - s.start == 1]
        rows = torch.tensor(singles, dtype=torch.int64).reshape(-1, 3)
        plan = call.batch.plans[key] = _Plan(spans, longer, rows)
    return plan


def _spans(call: AttentionCall, rule: MaskRule, query: torch.Tensor) -> list[_Span]:
    """All of the batch's spans under `rule`, in the order of its segments."""
    spans = []
    for segment in call.batch.segments:
        start, count, past = segment.start, segment.count, segment.past
        first_key = rule.first_key(past)
        # Without a pool the batch's own K and V serve, where a sequence lies at its packed place.
        base = start if call.pool is None else segment.first_slot
        mask = None
        causal = count > 1 and past == 0 and rule.first_key(count - 1) == 0
        if count > 1 and not causal:
            allowed = rule.mask(past, count, first_key)
            mask = torch.zeros(allowed.shape, dtype=query.dtype)
            mask = mask.masked_fill_(~allowed, float("-inf")).to(query.device)
        spans.append(
            _Span(start, start + count, base + first_key, base + past + count, causal, mask)
        )
    return spans


def attend_packed(  # noqa: PLR0917 - transformers calls it so
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: `query` [1, H, T, D], `key` and `value` [1, Hkv, T, D].

    :returns: [1, T, H, D] and no attention weights
    :raises UnsupportedModelError: for a bias or a mask that isn't understood here
    """
    call: AttentionCall = _current.call
    if not isinstance(attention_mask, MaskRule):
        raise UnsupportedModelError("a mask that doesn't come from transformers' mask functions")
    if attention_mask.unknown:
        raise UnsupportedModelError(f"a mask made of {attention_mask.unknown}")
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError("attention with a position bias")
    layer = cast(int, module.layer_idx) - call.first_layer
    call.num_calls += 1
    if call.pool is not None:
        slots = call.batch.on(query.device)[1]
        assert slots is not None
        keys, values = call.pool.write(layer, slots, key[0], value[0])  # each [Hkv, S, D]
    else:
        call.rules[layer] = attention_mask
        call.shapes[layer] = KVShape(key.shape[1], key.shape[3], value.shape[3])
        keys, values = key[0], value[0]  # each [Hkv, T, D]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    _, num_heads, num_tokens, _ = query.shape
    out = query.new_empty(num_tokens, num_heads, value.shape[3])  # [T, H, D]
    plan = _plan(call, attention_mask, query)
    spans = plan.spans
    plain = len(plan.singles) > 0 and softcap is None and sinks is None
    takes = plain and DecodeAttention.takes(query[0], keys, values)
    if takes and (decode := decode_attention()):
        decode(query[0], keys, values, out, plan.singles, scale)
        spans = plan.longer
    for span in spans:
        k = keys[:, span.first_slot : span.end_slot]
        v = values[:, span.first_slot : span.end_slot]
        q = query[0, :, span.start : span.end]
        if softcap is None and sinks is None:
            result = _sdpa(q, k, v, scale, span)
        else:
            result = _explicit(q, k, v, scale, span, softcap=softcap, sinks=sinks)
        out[span.start : span.end] = result.transpose(0, 1)
    return out[None], None


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, span: _Span
) -> torch.Tensor:
    """SDPA of q [H, n, D] over k, v [Hkv, L, D], without repeating K and V for grouped heads."""
    num_heads, count, _ = q.shape
    num_kv = k.shape[0]
    group = num_heads // num_kv
    if count == 1:  # The heads of a group become the rows of one query: [1, Hkv, group, D].
        rows = q.reshape(1, num_kv, group, -1)
        result = F.scaled_dot_product_attention(rows, k[None], v[None], scale=scale)
        return result.reshape(num_heads, 1, -1)
    # K and V heads become the batch, broadcast over their query heads: views, no copies.
    result = F.scaled_dot_product_attention(
        q.reshape(num_kv, group, count, -1),
        k[:, None].expand(-1, group, -1, -1),
        v[:, None].expand(-1, group, -1, -1),
        attn_mask=span.mask,
        is_causal=span.is_causal,
        scale=scale,
    )
    return result.reshape(num_heads, count, -1)


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    span: _Span,
    *,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft-capped scores or sinks, which SDPA doesn't know; q [H, n, D]."""
    num_heads, count, _ = q.shape
    group = num_heads // k.shape[0]
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale  # [H, n, L]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = span.mask
    if span.is_causal:
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


AttentionInterface.register(ATTENTION_NAME, attend_packed)
AttentionMaskInterface.register(ATTENTION_NAME, describe_mask)
