"""K and V of a stage's own layers, on its device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.batch import CacheCopy
from engine.kernels.fused_functions import fused_layers

__all__ = ["KVPool", "KVShape"]


@dataclass(frozen=True)
class KVShape:
    """Heads and head sizes of one layer's cache."""

    num_heads: int
    key_size: int
    value_size: int

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in this layer."""
        return self.num_heads * (self.key_size + self.value_size) * dtype.itemsize


class KVPool:
    """K and V of a stage's own layers, on its device.

    Tensors are [Hkv, S, D] to all, so that one sequence's range of slots is a plain view for SDPA.
    How they lie in memory is decided here: head by head, as a CPU reads them best, or token by
    token, as a kernel for all sequences at once wants them (transposed, they are contiguous then).
    Index 0 is the stage's first layer, whatever that layer's number in the model.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        num_slots: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        token_major: bool = False,
    ) -> None:
        self.num_slots = num_slots
        is_plain = device.type == "cpu" and dtype == torch.float32 and not token_major
        self._fused = fused_layers() if is_plain else None

        def empty(num_heads: int, size: int) -> torch.Tensor:
            if token_major:
                rows = torch.empty(num_slots, num_heads, size, device=device, dtype=dtype)
                return rows.transpose(0, 1)
            return torch.empty(num_heads, num_slots, size, device=device, dtype=dtype)

        # Uninitialized: on a CPU, memory that no token has used stays untouched by the system.
        self.keys = [empty(s.num_heads, s.key_size) for s in shapes]  # each [Hkv, S, D]
        self.values = [empty(s.num_heads, s.value_size) for s in shapes]  # each [Hkv, S, D]

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' `key` and `value` [Hkv, T, D]; return the layer's whole K and V."""
        keys, values = self.keys[layer], self.values[layer]
        for pool, rows in ((keys, key), (values, value)):
            if self._fused is not None and rows.stride(2) == 1:
                self._fused.write_slots(rows, slots, pool)
            else:
                pool.index_copy_(1, slots, rows)
        return keys, values

    def copy(self, copies: Iterable[CacheCopy]) -> None:
        """Copy K and V between ranges of slots, in all layers."""
        for copy in copies:
            source = slice(copy.source, copy.source + copy.length)
            destination = slice(copy.destination, copy.destination + copy.length)
            for tensor in (*self.keys, *self.values):
                tensor[:, destination] = tensor[:, source]
