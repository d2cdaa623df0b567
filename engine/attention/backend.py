"""What an attention backend is: the one seam between the models' attention and who computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.attention.masks import MaskRule
from engine.batch import ForwardBatch

__all__ = ["AttentionBackend", "AttentionTask"]


@dataclass(frozen=True, slots=True)
class AttentionTask:
    """What one layer's attention is: whose tokens, which keys they see, how those are weighed."""

    batch: ForwardBatch
    rule: MaskRule
    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [H]

    @property
    def is_plain(self) -> bool:
        """Nothing but scaled softmax."""
        return self.softcap is None and self.sinks is None


class AttentionBackend(Protocol):
    """Attends to a batch's new tokens over the cache of one layer."""

    name: str
    """For the log."""
    token_major: bool
    """Whether the pool should lie in memory as [S, Hkv, D]; it is handed over as [Hkv, S, D]."""
    capturable: bool
    """Whether a CUDA graph of it serves other batches: it depends on device tensors alone."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        task: AttentionTask,
    ) -> torch.Tensor:
        """The attention's output [T, H, Dv].

        :param query: [H, T, D], the batch's packed tokens
        :param keys: [Hkv, S, D], with `values` [Hkv, S, Dv]: the layer's pool, the new tokens
            written; for a batch without slots [Hkv, T, D], its own tokens alone
        """
        ...
