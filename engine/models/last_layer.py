"""The model's last layer, which owes its output only for the tokens whose logits are due.

Of a prompt that is one token. The others' keys and values are needed, and in the layers below their
output, too, which gives the next layer's keys and values; but what the last layer does behind its
attention nobody reads. So its own forward is called twice: for the others until its attention has
written their keys and values, which ends that call, then for the tokens that are due.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from engine.attention.hook import AttentionCall, CacheWrittenError, attending, current_call
from engine.transfer import moved
from queue_api.wire.errors import UnsupportedModelError

__all__ = ["LastLayer"]


class LastLayer:
    """Stands in for one layer's forward; the layer's class isn't touched."""

    def __init__(self, layer: nn.Module) -> None:
        self._own = layer.forward
        self.trims = False
        """Whether output that isn't due is left out; set by the stage, which tries it first."""

        @functools.wraps(self._own)  # who looks at the layer's parameters finds its own
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        layer.forward = forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives for the tokens that are due, and zeros for all others.

        :raises UnsupportedModelError: if the layer's output comes before its attention
        """
        call = current_call()
        if not self.trims or call is None or call.pool is None:
            return self._own(*args, **kwargs)
        rows, num_tokens = call.batch.logit_rows, call.batch.num_tokens
        if num_tokens == 1 or len(rows) == num_tokens:
            return self._own(*args, **kwargs)
        is_due = torch.zeros(num_tokens, dtype=torch.bool)
        is_due[rows if len(rows) else -1] = True
        others, due = (~is_due).nonzero()[:, 0], is_due.nonzero()[:, 0]
        try:
            self._run(call.of_tokens(others, writes_only=True), others, num_tokens, args, kwargs)
        except CacheWrittenError:
            out = self._run(call.of_tokens(due), due, num_tokens, args, kwargs)
            return self._spread(out, due, num_tokens)
        raise UnsupportedModelError("a last layer whose output comes before its attention")

    def _run(
        self,
        part: AttentionCall,
        tokens: torch.Tensor,
        num_tokens: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The layer's own forward for `tokens` [n] of all `num_tokens`."""

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(cut, value))
            if isinstance(value, torch.Tensor) and value.shape[:2] == (1, num_tokens):
                return value.index_select(1, moved(tokens, value.device))
            return value

        with attending(part):
            return self._own(*map(cut, args), **{name: cut(kwargs[name]) for name in kwargs})

    def _spread(self, out: Any, tokens: torch.Tensor, num_tokens: int) -> Any:
        """Output for some tokens, [1, n, E] or first in a tuple, among zeros: [1, T, E]."""
        if isinstance(out, tuple):
            return (self._spread(out[0], tokens, num_tokens), *out[1:])
        spread = out.new_zeros(1, num_tokens, out.shape[2])
        return spread.index_copy_(1, moved(tokens, out.device), out)
