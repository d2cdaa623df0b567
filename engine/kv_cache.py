"""A stage's KV cache and the allocator of its slots."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.fused_layers import fused_layers

__all__ = ["CacheCopy", "KVPool", "KVShape", "SlotAllocator"]


@dataclass(frozen=True)
class KVShape:
    """Heads and head sizes of one layer's cache."""

    num_heads: int
    key_size: int
    value_size: int

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in this layer."""
        return self.num_heads * (self.key_size + self.value_size) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class CacheCopy:
    """Slots `source ..` to be copied to `destination ..`; the two don't overlap.

    Those of a micro-batch are made in its order: one may write where an earlier one has read.
    """

    source: int
    destination: int
    length: int
    is_move: bool = False
    """The source was the sequence's own range, given up for the new one."""


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


class SlotAllocator:
    """Hands out contiguous ranges of slots, the lowest that fits.

    Invariant: `_free` holds the free ranges as (first, length), sorted, none empty and no two
    touching; free and used ranges together cover all slots exactly once.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free: list[tuple[int, int]] = [(0, num_slots)]
        self._used: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return self.num_slots - sum(self._used.values())

    def allocate(self, length: int) -> int | None:
        """First slot of a free range of `length` (at least 1), or None if there is none."""
        for i, (first, room) in enumerate(self._free):
            if room >= length:
                self._free[i : i + 1] = [(first + length, room - length)] if room > length else []
                self._used[first] = length
                return first
        return None

    def free(self, first: int) -> None:
        """Give back the range that `allocate` returned.

        :raises KeyError: if no range in use begins there
        """
        length = self._used.pop(first)
        i = bisect.bisect(self._free, (first, 0))
        end = first + length
        if i < len(self._free) and self._free[i][0] == end:
            end += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == first:
            i -= 1
            first = self._free.pop(i)[0]
        self._free.insert(i, (first, end - first))

    def extend(self, first: int, length: int) -> int:
        """Add free slots behind a range until it has `length`, or as far as they go.

        :returns: the range's new length; the old one if that is `length` or more
        :raises KeyError: if no range in use begins there
        """
        used = self._used[first]
        end = first + used
        i = bisect.bisect(self._free, (end, 0))
        if used >= length or i == len(self._free) or self._free[i][0] != end:
            return used
        room = self._free[i][1]
        taken = min(room, length - used)
        self._free[i : i + 1] = [(end + taken, room - taken)] if room > taken else []
        self._used[first] = used + taken
        return used + taken

    def shrink(self, first: int, length: int) -> None:
        """Give back all but the first `length` (at least 1) slots of a range.

        :raises KeyError: if no range in use begins there
        """
        rest = self._used[first] - length
        if rest:
            self._used[first] = length
            self._used[first + length] = rest
            self.free(first + length)
