"""The attention function that transformers models call here.

Registered with transformers under `ATTENTION_NAME`, with the mask function of `masks.py`. A model
is called with packed tokens and no cache of its own; the mask function hands each layer a
`MaskRule` in place of a mask, and the attention function finds the stage's cache and the batch's
layout in a thread-local, writes the new K and V, and lets the stage's backend attend over past
and present.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from engine.attention.backend import AttentionBackend, AttentionTask
from engine.attention.kv_pool import KVPool, KVShape
from engine.attention.masks import MaskRule, describe_mask
from engine.batch import ForwardBatch
from queue_api.wire.errors import UnsupportedModelError

__all__ = [
    "ATTENTION_NAME",
    "AttentionCall",
    "CacheWrittenError",
    "attend_packed",
    "attending",
    "current_call",
]

ATTENTION_NAME = "batchmill"


class AttentionCall:
    """What the attention function needs in one stage's forward, and what it reports back."""

    def __init__(
        self,
        batch: ForwardBatch,
        pool: KVPool | None,
        first_layer: int,
        backend: AttentionBackend,
        *,
        writes_only: bool = False,
    ) -> None:
        self.batch = batch
        self.pool = pool
        """None: attend over the batch's own tokens alone."""
        self.first_layer = first_layer
        self.backend = backend
        self.writes_only = writes_only
        """End the forward with `CacheWrittenError` instead of attending."""
        self.shapes: dict[int, KVShape] = {}
        """Local layer to the shape of its K and V, as seen."""
        self.rules: dict[int, MaskRule] = {}
        """Local layer to its mask, as seen."""
        self.num_heads: dict[int, int] = {}
        """Local layer to its query heads, as seen."""
        self.num_calls = 0

    def of_tokens(self, tokens: torch.Tensor, *, writes_only: bool = False) -> AttentionCall:
        """The same for some of the batch's packed tokens, [n] int64, ascending."""
        part = self.batch.of_tokens(tokens)
        return AttentionCall(
            part, self.pool, self.first_layer, self.backend, writes_only=writes_only
        )


class CacheWrittenError(Exception):
    """Ends a forward of which nothing but the new K and V was wanted; they are written."""


_current = threading.local()


def current_call() -> AttentionCall | None:
    """The one that attention functions of this thread work for now."""
    return getattr(_current, "call", None)


@contextmanager
def attending(call: AttentionCall) -> Iterator[None]:
    """Make `call` the one that attention functions of this thread work for."""
    before = current_call()
    _current.call = call
    try:
        yield
    finally:
        _current.call = before


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
    :raises CacheWrittenError: if the call wants nothing else
    """
    call: AttentionCall = _current.call
    if not isinstance(attention_mask, MaskRule):
        raise UnsupportedModelError("a mask that doesn't come from transformers' mask functions")
    if attention_mask.unknown:
        raise UnsupportedModelError(f"a mask made of {attention_mask.unknown}")
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError("attention with a position bias")
    if not query.shape[2] == key.shape[2] == value.shape[2] == call.batch.num_tokens:
        # As of a last layer that takes an earlier one's keys: those are of all tokens.
        raise UnsupportedModelError("keys of other tokens than the queries'")
    layer = cast(int, module.layer_idx) - call.first_layer
    call.num_calls += 1
    if call.pool is not None:
        slots = call.batch.on(query.device)[1]
        assert slots is not None
        keys, values = call.pool.write(layer, slots, key[0], value[0])  # each [Hkv, S, D]
        if call.writes_only:
            raise CacheWrittenError
    else:
        call.rules[layer] = attention_mask
        call.shapes[layer] = KVShape(key.shape[1], key.shape[3], value.shape[3])
        call.num_heads[layer] = query.shape[1]
        keys, values = key[0], value[0]  # each [Hkv, T, D]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    task = AttentionTask(call.batch, attention_mask, scale, softcap, sinks)
    out = call.backend.attend(query[0], keys, values, task)
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, attend_packed)
AttentionMaskInterface.register(ATTENTION_NAME, describe_mask)
